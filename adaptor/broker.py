"""What both session kinds share: settings, when to reconnect, and who is told what.

A Session keeps one persistent MQTT session alive across any number of connections, hands every
message to its receiver, and acknowledges a message only when its ticket is settled, in order of
arrival. The two kinds differ in how they talk to the broker and nowhere else.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from mqtt5 import PublishPacket, QoS

from weir.adaptor.acks import AckLine
from weir.adaptor.acks import Ticket as AckTicket
from weir.adaptor.address import Broker as Broker
from weir.adaptor.address import BrokerError as BrokerError
from weir.adaptor.subscriptions import Remembered

Ticket = AckTicket[PublishPacket]
Receiver = Callable[[PublishPacket, Ticket | None], None]
"""Takes a message; the ticket is None for QoS 0. Must not block and must not raise."""

log = logging.getLogger("weir.adaptor")

EXACTLY_ONCE = QoS.EXACTLY_ONCE


class AckJournal(Protocol):
    """Is told what the broker will and won't send again; see journal.py."""

    def acknowledged(self, packet_ids: Sequence[int]) -> None: ...

    def released(self, packet_id: int, done: Callable[[], None]) -> None: ...

    def disconnected(self) -> None: ...

    def session_lost(self) -> None: ...


WINDOW_BYTES = 32 << 20
"""Of payloads that are unacknowledged, per session: a window of large messages is smaller."""

BEFORE_SUBACK = 4

FIRST_BACKOFF, LONGEST_BACKOFF = 0.25, 30.0
STEADY = 10.0
"""Seconds that a connection must have lasted for the next backoff to start from the beginning."""


class WrongVersion(BrokerError):
    """The broker does not speak the protocol version that we asked for."""


class Silence(BrokerError):
    """The broker took our CONNECT and says nothing; some do when they don't know the version."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """`number` is the MQTT 5 subscription identifier: the same for the same filter for ever,
    because messages queued in the broker carry the one of the day they were published.
    `retained`: when the broker sends what it retains."""

    filter: str
    qos: int
    number: int
    retained: Literal["new", "always", "never"] = "new"


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Times in seconds. `expiry`: how long the broker keeps the session while we are away; 3.1.1
    knows only for ever, or 0 for not at all. `handshake`: for each of TCP and TLS, CONNACK, SUBACK.
    `clean_start`: end the old session, with all that is queued in it, at the first connection."""

    client_id: str
    receive_maximum: int = 256
    keep_alive: int = 30
    expiry: int = 7 * 24 * 3600
    handshake: float = 5.0
    clean_start: bool = False


class Session(abc.ABC):
    """One persistent session. `run()` owns everything; `settle()` may be called at any time."""

    protocol: str

    def __init__(
        self,
        broker: Broker,
        settings: SessionSettings,
        subscriptions: Sequence[Subscription],
        receive: Receiver,
        state: Path | None = None,
    ) -> None:
        """`state`: the folder in which the session notes what it is subscribed to."""
        self.broker = broker
        self.settings = settings
        self._subscriptions = tuple(subscriptions)
        self._remembered = Remembered(state, str(broker), settings.client_id, self.protocol)
        self._receive = receive
        self._line: AckLine[PublishPacket] = AckLine()
        self._flush_planned = False
        self._closing = asyncio.Event()
        self._clean = settings.clean_start
        self.journal: AckJournal | None = None
        self._exactly_once: set[int] = set()
        """Packet ids that came at QoS 2: they want PUBREC, and PUBCOMP in the end."""
        self.ever_connected = False
        self.connected = False
        self.since = time.time()
        self.error: str | None = None
        self.refused: dict[str, str] = {}
        self.reconnects = 0

    async def run(self, *, tentative: bool = False) -> None:
        """Connect, and reconnect after every loss, until `close()`. Raises WrongVersion, and
        Silence as long as it was never connected and `tentative`; every other trouble is shown in
        `error` and tried again."""
        attempt = 0
        while not self._closing.is_set():
            started = asyncio.get_running_loop().time()
            try:
                await self._connect_and_serve()
            except WrongVersion:
                raise
            except BrokerError as error:
                if tentative and not self.ever_connected and isinstance(error, Silence):
                    raise
                self.error = str(error)
                if not self._closing.is_set():
                    log.warning("%s", error)
            finally:
                self._down()
            lasted = asyncio.get_running_loop().time() - started
            attempt = 0 if lasted > STEADY else attempt + 1
            await self._pause(reconnect_delay(attempt, random.random()))

    async def _pause(self, seconds: float) -> None:
        """Between two connections; `close()` ends it."""
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            self.reconnects += 1

    @abc.abstractmethod
    async def _connect_and_serve(self) -> None:
        """One connection from dialling to its end. Raises BrokerError for an unwanted end."""

    @abc.abstractmethod
    def _write_acks(self, packet_ids: Sequence[int]) -> None:
        """Send PUBACKs on the current connection, PUBRECs for what came at QoS 2; and tell the
        journal, if there is one, as soon as the broker must have dealt with the PUBACKs."""

    @abc.abstractmethod
    def _resume_reading(self) -> None:
        """The window has room; no effect unless we stopped reading because it had none."""

    @abc.abstractmethod
    def stop_reading(self) -> None:
        """Take no more messages; acknowledgements still go out. Called before `close()`."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Send what is settled, then DISCONNECT in a way that keeps the session. Idempotent."""

    @property
    def unacknowledged(self) -> int:
        return len(self._line)

    def room(self) -> tuple[int, int]:
        """Messages and bytes that may be unacknowledged; with more the broker is not read. Before
        the SUBACK there is more room, because that has to get through what comes before it."""
        times = 1 if self.connected else BEFORE_SUBACK
        return self.settings.receive_maximum * times, WINDOW_BYTES * times

    @property
    def full(self) -> bool:
        most, most_bytes = self.room()
        return len(self._line) > most or self._line.bytes > most_bytes

    @property
    def oldest(self) -> float | None:
        """When the longest unacknowledged message was received; seconds since the epoch."""
        return self._line.oldest()

    def settle(self, ticket: Ticket) -> None:
        """One event of the message is delivered or safe. It is acknowledged as soon as everything
        before it is: at once when nothing else is open, else with all that this turn settles."""
        if self._line.settle(ticket):
            if len(self._line) == 1:
                self._flush()
            else:
                self._plan_flush()

    def _up(self, granted: dict[str, str]) -> None:
        """Connected and subscribed; `granted` maps a filter to why the broker refused it."""
        self.connected, self.since, self.error, self.refused = True, time.time(), None, granted
        self.ever_connected, self._clean = True, False
        for pattern, reason in granted.items():
            log.error("%s refuses the subscription to `%s`: %s", self.broker, pattern, reason)

    def _lost(self, why: str) -> BrokerError:
        """For a connection that ended without a word from the broker."""
        if self.broker.tls and self.broker.certificate is None and not self.ever_connected:
            advice = "perhaps it wants a client certificate: --broker-cert and --broker-key"
        else:
            name = self.settings.client_id
            advice = f"if it goes on doing so, see whether another client uses the client id {name}"
        return BrokerError(f"the broker {self.broker} closed the connection{why}; {advice}")

    def refusal(self, reason: str, advice: str) -> BrokerError:
        """The broker answered CONNECT with no."""
        return BrokerError(f"the broker {self.broker} refuses the session: {reason}; {advice}")

    def forget_subscriptions(self) -> None:
        """The session has ended, and so has the note of it."""
        self._remembered.forget()

    def _down(self) -> None:
        if self.connected:
            self.connected, self.since = False, time.time()
        self._line.disconnected()
        if self.journal is not None:
            self.journal.disconnected()

    def session_lost(self) -> None:
        """The broker has nothing of it any more."""
        self._line.session_lost()
        self._exactly_once.clear()
        if self.journal is not None:
            self.journal.session_lost()

    def _arrived(self, message: PublishPacket) -> None:
        if message.packet_id is None:
            self._receive(message, None)
            return
        if message.qos is EXACTLY_ONCE:
            self._exactly_once.add(message.packet_id)
        ticket, new = self._line.arrive(message.packet_id, message)
        if new:
            self._receive(message, ticket)
        elif ticket.open <= 0:
            self._plan_flush()

    def _plan_flush(self) -> None:
        if not self._flush_planned:
            self._flush_planned = True
            asyncio.get_running_loop().call_soon(self._flush_as_planned)

    def _flush_as_planned(self) -> None:
        self._flush_planned = False
        self._flush()

    def _flush(self) -> None:
        packet_ids = self._line.ready()
        if packet_ids:
            self._write_acks(packet_ids)
        if not self.full:
            self._resume_reading()


async def end_session(session: Session) -> None:
    """End it in the broker, with all that is queued in it. `session`: made with `clean_start` and
    `expiry=0`. Raises BrokerError."""
    running = asyncio.create_task(session.run())
    try:
        while not session.ever_connected:
            await asyncio.sleep(0.02)
            if session.error is not None:
                raise BrokerError(session.error)
            if running.done():
                running.result()
        await session.close()
        session.forget_subscriptions()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def reconnect_delay(attempt: int, chance: float) -> float:
    """Seconds before connection attempt number `attempt`; `chance` in [0, 1) spreads clients that
    lost the same broker at the same moment."""
    wait = min(FIRST_BACKOFF * 2.0 ** min(attempt, 30), LONGEST_BACKOFF)
    return wait * (0.5 + chance / 2)
