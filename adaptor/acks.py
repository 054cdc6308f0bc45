"""Acknowledgements in the order of arrival ([MQTT-4.6.0-2]), and what a reconnect does to them.

A QoS 1 message holds a Ticket from its arrival until its last event is settled. `ready()` yields
packet ids from the head of the line only, so a message that is slow holds back the acknowledgements
behind it, never the deliveries. Packet ids belong to one connection: after a reconnect nothing of
the old line may be acknowledged, because the broker sends it all again. What it sends again is
recognised (DUP, same packet id, same message) and given its old ticket, so an event that is still
under way, or was delivered and not yet acknowledged, is not delivered a second time.

Pure: knows packet ids and messages, no sockets.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Redeliverable(Protocol):
    """What must be equal for two messages to be one and the same."""

    @property
    def topic(self) -> str: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def duplicate(self) -> bool: ...


M = TypeVar("M", bound=Redeliverable)


@dataclass(slots=True, eq=False)
class Ticket(Generic[M]):
    """`open`: events of this message that are not settled yet. `received`: seconds since the
    epoch, noted by whoever receives it."""

    packet_id: int
    message: M
    open: int = 1
    received: float = 0.0


class AckLine(Generic[M]):
    """The unacknowledged messages of one session, in order of arrival."""

    def __init__(self) -> None:
        self._line: deque[Ticket[M]] = deque()
        self._before: dict[int, Ticket[M]] = {}
        self._orphans: set[Ticket[M]] = set()
        self.bytes = 0
        """Of the payloads of what fills the window."""

    def __len__(self) -> int:
        """Messages that fill the window: unacknowledged on this connection, or still under way
        from a session that the broker has lost."""
        return len(self._line) + len(self._orphans)

    def oldest(self) -> float | None:
        """When the longest unacknowledged message was received."""
        line = [*([self._line[0]] if self._line else []), *self._orphans, *self._before.values()]
        return min((ticket.received for ticket in line), default=None)

    def arrive(self, packet_id: int, message: M) -> tuple[Ticket[M], bool]:
        """The message's ticket, and whether it is new: an old one is already being delivered."""
        self.bytes += len(message.payload)
        if self._before:
            known = self._before.pop(packet_id, None)
            if known is not None and _same(known.message, message):
                self._line.append(known)
                return known, False
        ticket = Ticket(packet_id, message)
        self._line.append(ticket)
        return ticket, True

    def settle(self, ticket: Ticket[M]) -> bool:
        """One event of the message is done. True when the line can become shorter by `ready()`,
        or has just become so."""
        ticket.open -= 1
        if self._orphans and ticket.open <= 0 and ticket in self._orphans:
            self._orphans.discard(ticket)
            self.bytes -= len(ticket.message.payload)
            return True
        return bool(self._line) and self._line[0].open <= 0

    def ready(self) -> list[int]:
        """Packet ids to acknowledge now, in order; they leave the line."""
        line, ids = self._line, []
        while line and line[0].open <= 0:
            ticket = line.popleft()
            self.bytes -= len(ticket.message.payload)
            ids.append(ticket.packet_id)
        return ids

    def disconnected(self) -> None:
        """The connection is gone, and every packet id with it."""
        self._before.update((ticket.packet_id, ticket) for ticket in self._line)
        self.bytes -= sum(len(ticket.message.payload) for ticket in self._line)
        self._line.clear()

    def session_lost(self) -> None:
        """The broker has no session: what was in flight will not come again, and packet ids start
        anew. Its deliveries go on, they just have no one left to tell."""
        lost = [ticket for ticket in self._before.values() if ticket.open > 0]
        self.bytes += sum(len(ticket.message.payload) for ticket in lost)
        self._orphans.update(lost)
        self._before.clear()


def _same(old: Redeliverable, new: Redeliverable) -> bool:
    return new.duplicate and old.topic == new.topic and old.payload == new.payload
