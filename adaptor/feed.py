"""Between a route's share of the spool and the pipeline that delivers from it.

Takes each message of its route: writes it, has it acknowledged when it is safe, and hands it to the
pipeline, in order of arrival. Only so much of the spool is in memory: behind a sink that is slow
the rest stays on disk and is read again when its turn comes, as after a restart. An event leaves
the spool when the pipeline says that it needs it no more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from mqtt5 import PublishPacket

from weir.adaptor.broker import Ticket
from weir.adaptor.journal import Journal
from weir.adaptor.keeping import Spooling
from weir.adaptor.outgoing import Flow, Outgoing
from weir.adaptor.spool import Entry
from weir.adaptor.spool_writer import SpoolWriter

AHEAD, AHEAD_BYTES = 256, 8 << 20
"""Of a route's spool that the pipeline has at most, but for one entry that is larger."""

BEST_EFFORT = 1000
"""QoS 0 messages of a route that are not on disk yet; no ticket bounds them, and nobody keeps what
is more. No more bytes of them than the pipeline may have, either."""

SWEEP = 1.0
"""Seconds between two looks for events that are too old."""


class Delivery(Protocol):
    """The pipeline, as seen from here."""

    settle: Callable[[Ticket], None]

    def deliver(self, flow: Flow, message: PublishPacket, entry: Entry) -> None: ...

    def give_up_old(self, flow: Flow) -> None: ...


class Feed:
    """Of one route."""

    def __init__(
        self, flow: Flow, spooling: Spooling, writer: SpoolWriter, journal: Journal, to: Delivery
    ) -> None:
        self.flow, self._age = flow, spooling.age
        self._sweeping: asyncio.TimerHandle | None = None
        self._writer, self._journal, self._to = writer, journal, to
        self._route = flow.route.name
        self.share = writer.share(self._route, spooling.size)
        self._last = 0
        """The newest entry that the pipeline has been given."""
        self._ahead = self._ahead_bytes = 0
        self._more = bool(self.share.count)
        """Whether there are entries on disk that the pipeline has not been given."""
        self._missed = False
        """Whether some were written while we read, perhaps too late for that."""
        self._loading: asyncio.Task[None] | None = None
        self._unsafe = self._unsafe_bytes = 0
        self._stopped = False
        flow.counters.received += self.share.count  # by an earlier life

    def start(self) -> None:
        """Deliver what an earlier life has left."""
        self._load()
        self._sweep()

    # --- in ---

    def take(self, message: PublishPacket, ticket: Ticket | None, event_id: str) -> None:
        mark = None
        if ticket is not None:
            if self._journal.knows(message, self._route):
                self._to.settle(ticket)
                return
            mark = self._journal.note(message, self._route)
        now = time.time()
        self.flow.counters.received += 1
        if ticket is not None:
            ticket.received = now
        elif self._unsafe >= BEST_EFFORT or self._unsafe_bytes >= AHEAD_BYTES:
            self.flow.counters.overflowed += 1
            return
        entry = Entry(self._writer.next_number(), self._route, now, event_id, message.write())
        self._unsafe += 1
        self._unsafe_bytes += entry.size
        self._writer.put(entry, mark, lambda: self._safe(entry, message, ticket))

    def _safe(self, entry: Entry, message: PublishPacket, ticket: Ticket | None) -> None:
        self._unsafe -= 1
        self._unsafe_bytes -= entry.size
        if ticket is not None:
            self._to.settle(ticket)
        if self._more or self._stopped or self._ahead >= AHEAD or self._ahead_bytes >= AHEAD_BYTES:
            self._more = self._missed = True
        elif entry.number > self._last:
            self._hand_over(entry, message)

    # --- out ---

    def _hand_over(self, entry: Entry, message: PublishPacket) -> None:
        self._last = entry.number
        self._ahead += 1
        self._ahead_bytes += entry.size
        self._to.deliver(self.flow, message, entry)

    def gone(self, entry: Entry) -> None:
        """The pipeline needs it no more."""
        self._ahead -= 1
        self._ahead_bytes -= entry.size
        self._writer.remove(entry)
        if self._more:
            self._load()

    def _load(self) -> None:
        """If it is worth the while."""
        roomy = self._ahead <= AHEAD // 2 and self._ahead_bytes <= AHEAD_BYTES // 2
        if self._more and roomy and self._loading is None and not self._stopped:
            self._loading = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        self._missed = False
        limit, most = AHEAD - self._ahead, AHEAD_BYTES - self._ahead_bytes
        found = await self._writer.load(self._route, self._last, limit, most)
        self._loading = None
        self._more = bool(found) or self._missed
        for entry in found:
            try:
                message = entry.message()
            except ValueError as error:
                self._writer.damaged(error, entry.number)
                return
            self._hand_over(entry, message)
        self._load()

    # --- age ---

    def outlived(self, outgoing: Outgoing) -> bool:
        """Whether it has lain here for longer than it may. With `onFailure: block` none ever has:
        there is nowhere to go."""
        route = self.flow.route
        return route.on_failure != "block" and time.time() - outgoing.received > self._age

    def _sweep(self) -> None:
        self._to.give_up_old(self.flow)
        self._sweeping = asyncio.get_running_loop().call_later(SWEEP, self._sweep)

    # --- for people, and the end ---

    @property
    def blocked(self) -> str | None:
        """Why messages of the route are not taken."""
        if self._writer.trouble is not None:
            return self._writer.trouble
        if self.share.blocked:
            return f"the route's share of the spool ({self.share.bound} bytes) is full"
        return None

    def snapshot(self) -> dict[str, object]:
        share = self.share
        return {"events": share.count, "bytes": share.bytes, "of": share.bound}

    def stop(self) -> None:
        """Hands nothing over any more, and lets go what has found no room: it is unacknowledged."""
        self._stopped = True
        self.share.blocked.clear()
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._loading is not None:
            self._loading.cancel()
