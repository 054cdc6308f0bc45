"""One connection of an MQTT 5 session: the codec `mqtt5` (sans-I/O) on a protocol of our own.

Owns framing, the handshake, keep-alive in both directions, and what a broker's reason codes mean in
words. What messages are for, and when they are acknowledged, is the session's business.
"""

from __future__ import annotations

import asyncio
import enum
import ssl
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import mqtt5

from weir.adaptor.broker import Broker, BrokerError, Silence, WrongVersion, log

if TYPE_CHECKING:
    from weir.adaptor.session import Session5

T = TypeVar("T")

LARGEST_PACKET = 16 << 20
"""Bytes. Told to the broker as Maximum Packet Size; it must not send us larger ones."""

_V3_CONNACK = b"\x20\x02"

_CREDENTIALS = "check the user and password {where}"
_ADVICE = {
    "CLIENT_ID_NOT_VALID": "choose another client id prefix",
    "BAD_USER_NAME_OR_PASSWORD": _CREDENTIALS,
    "NOT_AUTHORIZED": f"{_CREDENTIALS}, and the broker's ACL",
    "BANNED": "ask the broker's operator",
    "SERVER_BUSY": "it will be tried again",
    "SERVER_UNAVAILABLE": "it will be tried again",
    "SESSION_TAKEN_OVER": "another client uses this client id; give each adaptor its own prefix",
    "USE_ANOTHER_SERVER": "point the broker URL at the server it names",
    "SERVER_MOVED": "point the broker URL at the server it names",
    "QUOTA_EXCEEDED": "raise the broker's quota",
    "CONNECTION_RATE_EXCEEDED": "it will be tried again, ever more slowly",
    "BAD_AUTHENTICATION_METHOD": "it wants enhanced authentication, which is not offered here",
}


def in_words(code: enum.IntEnum) -> str:
    """`bad user name or password (0x86)`."""
    return f"{code.name.lower().replace('_', ' ')} (0x{code.value:02X})"


def explain(packet: mqtt5.ConnAckPacket | mqtt5.DisconnectPacket, broker: Broker) -> str:
    """A reason code in words, with the broker's own and what to do."""
    code = packet.reason_code
    said = [in_words(code)]
    if packet.reason_str:
        said.append(f'the broker says "{packet.reason_str}"')
    if packet.server_reference:
        said.append(f"it names the server {packet.server_reference}")
    if code.name in _ADVICE:
        said.append(_ADVICE[code.name].format(where=broker.credentials_are))
    return "; ".join(said)


def packet_size(head: bytes | bytearray) -> int:
    """Bytes of the packet that begins here; 0 while its first bytes do not tell.

    Raises ValueError for a packet larger than we told the broker to send.
    """
    length = 0
    for position, byte in enumerate(head[1:5]):
        length |= (byte & 0x7F) << (7 * position)
        if not byte & 0x80:
            if length > LARGEST_PACKET:
                raise ValueError(f"a packet of {length} bytes; the limit is {LARGEST_PACKET}")
            return position + 2 + length
    return 0


class Connection(asyncio.Protocol):
    """One TCP or TLS connection: frames in, packets out, and a watchdog over both."""

    def __init__(self, session: Session5) -> None:
        self._loop = asyncio.get_running_loop()
        self._session, self._settings, self._broker = session, session.settings, session.broker
        self._arrived = session._arrived
        self._transport: asyncio.Transport | None = None
        self._rest = bytearray()
        self._connack: asyncio.Future[mqtt5.ConnAckPacket] = self._loop.create_future()
        self._asked: dict[int, asyncio.Future[int]] = {}
        self.resumed = False
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self.can_number_subscriptions = True
        self.send_window = 65_535
        """Publishes of ours that the broker takes before it has acknowledged one."""
        self.largest: int | None = None
        """Bytes of a packet that the broker takes."""
        self._keep_alive = float(session.settings.keep_alive)
        self._heard = self._said = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._pings: deque[list[int]] = deque()
        """Of the PINGREQs without an answer: the packet ids that their answer proves."""
        self._unproven: list[int] = []
        self._proving = False
        self._wanted = 0
        self._reading = True
        self._held = False
        self._stopped = False

    # --- asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        if self._stopped:
            return  # unacknowledged, so it comes again
        rest, start = self._rest, 0
        if rest:  # only what its packet lacks is added to it, the others are read where they are
            start = self._wanted - len(rest) if self._wanted else len(data)
            rest += memoryview(data)[:start]
            if len(rest) < self._wanted:
                return
            whole = bytes(rest)
            rest.clear()
            self._consume(whole)
            if rest:
                rest += memoryview(data)[start:]
            if rest or start >= len(data) or self.lost.done():
                return
        self._consume(data, start)

    def _consume(self, data: bytes, start: int = 0) -> None:
        try:
            end = self._read(data, start)
            if end < len(data):
                self._rest += memoryview(data)[end:]
                self._wanted = packet_size(self._rest)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 (the codec panics on a topic not in UTF-8)
            self._refuse(data, error)

    def _refuse(self, data: bytes, error: BaseException) -> None:
        """An old broker answers our CONNECT with a CONNACK of its own version."""
        if not self._connack.done() and data.startswith(_V3_CONNACK):
            self._connack.set_exception(
                WrongVersion(f"the broker {self._broker} does not speak MQTT 5; use 3.1.1 or auto")
            )
        else:
            self._end(f"sent what is not MQTT 5: {error}")

    def _read(self, data: bytes, start: int) -> int:
        """Dispatch every whole packet; returns where the first incomplete one begins."""
        view, end = memoryview(data), len(data)
        read, publish, arrived = mqtt5.read, mqtt5.PublishPacket, self._arrived
        line, (most, most_bytes) = self._session._line, self._session.room()
        while start < end and self._reading:
            if line.bytes > most_bytes or len(line) > most:
                self._pause()
                break
            try:
                packet, size = read(view[start:])
            except IndexError:
                break
            start += size
            if type(packet) is publish:
                if not packet.topic or packet.topic_alias is not None or packet.packet_id == 0:
                    raise ValueError("a PUBLISH with a topic alias or without a packet id")
                arrived(packet)
            else:
                self._dispatch(packet)
        return start

    def _pause(self) -> None:
        """The broker sends more than our Receive Maximum: mosquitto 2.0.11 does, once
        acknowledgements flow. TCP holds it where the protocol does not."""
        self._reading = False
        if self._transport is not None and not self._held:
            self._held = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """The window has room again: first for what was read already, then for more."""
        if self._reading or self._stopped or self.lost.done() or self._transport is None:
            return
        self._reading = True
        data = bytes(self._rest)
        self._rest.clear()
        self._consume(data)
        if self._reading and self._held and not self.lost.done():
            self._held = False
            self._heard = self._loop.time()
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, ssl.SSLError):  # TLS 1.3 refuses a client only after its handshake
            self._fail(self._broker.unreachable(exc))
        else:
            self._fail(self._session._lost(f": {exc}" if exc else ""))

    # --- packets ---

    def _dispatch(self, packet: mqtt5.Packet) -> None:
        if isinstance(packet, mqtt5.ConnAckPacket):
            self.resumed = packet.session_present
            if not packet.session_present:
                self._session.session_lost()
            if not self._connack.done():
                self._connack.set_result(packet)
        elif isinstance(packet, mqtt5.SubAckPacket | mqtt5.UnsubAckPacket):
            answer = self._asked.pop(packet.packet_id, None)
            if answer is not None and not answer.done():
                answer.set_result(max(each.value for each in packet.reason_codes))
        elif isinstance(packet, mqtt5.DisconnectPacket):
            self._end(f"ended the session: {explain(packet, self._broker)}")
        elif isinstance(packet, mqtt5.PingRespPacket):
            self._ponged()
        elif isinstance(packet, mqtt5.PubRelPacket):
            self._session.released(packet.packet_id)
        elif not (isinstance(packet, mqtt5.PubAckPacket) and self._session.published(packet)):
            self._end(f"sent an unexpected {type(packet).__name__}")

    async def handshake(self) -> None:
        settings, broker = self._settings, self._broker
        username, password = broker.credentials()
        self.write(
            mqtt5.ConnectPacket(
                settings.client_id,
                username=username,
                password=None if password is None else password.encode(),
                clean_start=self._session._clean,
                keep_alive=settings.keep_alive,
                session_expiry_interval=settings.expiry,
                receive_max=settings.receive_maximum,
                max_packet_size=LARGEST_PACKET,
            ).write()
        )
        connack = await self.answered(self._connack, "CONNACK")
        if connack.reason_code is mqtt5.ConnAckReasonCode.UNSUPPORTED_PROTOCOL_VERSION:
            raise WrongVersion(f"the broker {broker} does not speak MQTT 5; use 3.1.1 or auto")
        if connack.reason_code.value >= 0x80:
            raise BrokerError(
                f"the broker {broker} refuses the session: {explain(connack, broker)}"
            )
        kept = connack.session_expiry_interval
        if kept is not None and kept < settings.expiry:
            log.warning(
                "the broker %s keeps the session for %d s only, not the %d s asked for; "
                "what is published while we are away for longer is lost",
                *(broker, kept, settings.expiry),
            )
        self.can_number_subscriptions = connack.subscription_id_available
        self.send_window, self.largest = connack.receive_max, connack.max_packet_size
        if connack.server_keep_alive is not None:
            self._keep_alive = float(connack.server_keep_alive)
        self._watch()

    def ask(self, packet: mqtt5.SubscribePacket | mqtt5.UnsubscribePacket) -> asyncio.Future[int]:
        """The reason code of the answer; of several the worst."""
        answer: asyncio.Future[int] = self._loop.create_future()
        self._asked[packet.packet_id] = answer
        self.write(packet.write())
        return answer

    async def answered(self, answer: asyncio.Future[T], name: str) -> T:
        """The answer, unless the connection ends or the broker keeps silent."""
        await asyncio.wait(
            (answer, self.lost),
            timeout=self._settings.handshake,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if answer.done():
            return answer.result()
        answer.cancel()
        answer.add_done_callback(lambda end: end.cancelled() or end.exception())  # a gather fails
        if self.lost.done():
            self.lost.result()
        raise Silence(f"the broker {self._broker} sends no {name}; does it speak MQTT 5?")

    # --- keep-alive ---

    def _watch(self) -> None:
        """Ping when we had nothing to say for half the keep-alive; give up when the broker has
        been silent for one and a half of it, though pinged."""
        if self._keep_alive <= 0 or self.lost.done():
            return
        now = self._loop.time()
        if not self._held and now - self._heard > 1.5 * self._keep_alive:
            self._end(f"has been silent for {now - self._heard:.0f} s, pings included")
            return
        if now - min(self._said, self._heard) >= self._keep_alive / 2:
            self._ping([])
        self._timer = self._loop.call_later(self._keep_alive / 4, self._watch)

    def _ping(self, proves: list[int]) -> None:
        self._pings.append(proves)
        self.write(mqtt5.PingReqPacket().write())

    def _ponged(self) -> None:
        proven = self._pings.popleft() if self._pings else []
        if not proven:
            return
        if self._session.journal is not None:
            self._session.journal.acknowledged(proven)
        self._proving = False
        if self._unproven:
            self.prove([])

    def prove(self, packet_ids: Sequence[int]) -> None:
        """Tell the journal when the broker has dealt with the acknowledgements of these: it has
        when it answers a PINGREQ that we sent after them. One such PINGREQ at a time."""
        self._unproven += packet_ids
        if not self._proving:
            self._proving = True
            proves, self._unproven = self._unproven, []
            self._ping(proves)

    # --- the end ---

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self.lost.done():
            self._said = self._loop.time()
            self._transport.write(data)

    def stop_reading(self) -> None:
        self._reading, self._stopped = False, True

    async def disconnect(self) -> None:
        """DISCONNECT without a new expiry keeps the session; then wait until it is written."""
        if self._transport is None or self.lost.done():
            return
        self.write(mqtt5.DisconnectPacket().write())
        self._transport.close()
        await asyncio.wait((self.lost,), timeout=self._settings.handshake)

    def _end(self, reason: str) -> None:
        self._fail(BrokerError(f"the broker {self._broker} {reason}"))

    def _fail(self, error: BrokerError) -> None:
        """The first reason wins; what is to be acknowledged dies with the connection."""
        self._reading = False  # whatever came behind it
        if not self.lost.done():
            self.lost.set_exception(error)
            self.lost.exception()
        self.abort()

    def abort(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self.lost.done():
            self.lost.cancel()
        if self._transport is not None:
            self._transport.abort()
