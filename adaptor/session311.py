"""An MQTT 3.1.1 session, for brokers that do not speak 5: aiomqtt over paho.

paho acknowledges by itself on receipt, and aiomqtt's queue discards when it is full; neither may
happen here. So acknowledgements are manual (`manual_ack_set`, `ack`), and messages are taken from
paho's callback, before that queue. 3.1.1 has no Receive Maximum: how much a broker sends ahead is
its own setting (mosquitto: 20). Should it send more than our window, we stop reading the socket
until there is room; if that lasts longer than the keep-alive, the broker hangs up, and what
it sends again after the reconnect is recognised.

aiomqtt has no public way to the paho client it wraps, nor to how its connection ended, and paho
none to bound what it reads; `_client`, `_disconnected` and `_sock_recv` are the only private names
used.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable, Sequence
from typing import Any

import aiomqtt
import mqtt5
import paho.mqtt.client as paho
from aiomqtt.exceptions import MqttConnectError

from weir.adaptor.broker import BrokerError, Session, Silence, Subscription
from weir.adaptor.connection5 import LARGEST_PACKET

LOOK_EVERY = 1.0
"""Seconds between two looks whether the socket was reset."""

_QOS = (mqtt5.QoS.AT_MOST_ONCE, mqtt5.QoS.AT_LEAST_ONCE)


_CREDENTIALS = "check the user and password {where}"
_REFUSALS = {  # paho tells the five return codes of 3.1.1 by the reason codes of 5
    0x84: ("unsupported protocol version (1)", "it does not speak MQTT 3.1.1; use 5 or auto"),
    0x85: ("client id not valid (2)", "choose another client id prefix"),
    0x88: ("server unavailable (3)", "it will be tried again"),
    0x86: ("bad user name or password (4)", _CREDENTIALS),
    0x87: ("not authorized (5)", f"{_CREDENTIALS}, and the broker's ACL"),
}


class Session311(Session):
    protocol = "3.1.1"

    client: aiomqtt.Client | None = None
    _client: paho.Client | None = None
    _reading = True
    _paused = False
    _resumed = False
    _ended: asyncio.Event | None = None
    _too_large: str | None = None

    async def _connect_and_serve(self) -> None:
        if self._clean and self.settings.expiry:
            await self._end_old_session()
        client = self._new_client(clean=self.settings.expiry == 0)
        self._ended = asyncio.Event()
        try:
            async with client:
                self.client = client
                self._up(await self._subscribe(client))
                await self._until_the_end(client)
        except aiomqtt.MqttError as error:
            raise self._explain(error) from error
        finally:
            self._client = self.client = None
            _retrieve(client)
            self._ended.set()

    async def _end_old_session(self) -> None:
        """3.1.1 knows no session that starts anew and then stays: it takes two connections."""
        client = self._new_client(clean=True)
        client._client.on_connect = client._on_connect
        try:
            async with client:
                pass
        except aiomqtt.MqttError as error:
            raise self._explain(error) from error
        finally:
            _retrieve(client)
        self._remembered.forget()

    def _new_client(self, *, clean: bool) -> aiomqtt.Client:
        broker = self.broker
        username, password = broker.credentials()
        if password is not None and username is None:
            raise BrokerError(
                f"the broker {broker} gets a password without a user, which MQTT 3.1.1 forbids; "
                "give the user as well"
            )
        client = aiomqtt.Client(
            broker.host,
            broker.port,
            username=username,
            password=password,
            identifier=self.settings.client_id,
            protocol=aiomqtt.ProtocolVersion.V311,
            clean_session=clean,
            keepalive=self.settings.keep_alive,
            timeout=self.settings.handshake,
            tls_context=broker.ssl_context(),
            transport="tcp" if broker.path is None else "websockets",
            websocket_path=broker.path,
        )
        wrapped: Any = client._client
        wrapped._sock_recv = self._bounded(wrapped._sock_recv)
        client._client.manual_ack_set(True)
        client._client.on_message = self._on_message
        client._client.on_connect = self._watch_connect(client._client.on_connect)
        return client

    def _bounded(self, receive: Callable[[int], bytes]) -> Callable[[int], bytes]:
        """paho asks for all that a packet lacks, up to 256 MiB, and keeps what it gets."""
        self._too_large = None

        def bounded(size: int) -> bytes:
            if size > LARGEST_PACKET:
                self._too_large = f"a packet of {size} bytes; the limit is {LARGEST_PACKET}"
                raise ConnectionAbortedError(self._too_large)
            return receive(size)

        return bounded

    def _watch_connect(self, inner: Callable[..., None] | None) -> Callable[..., None]:
        """aiomqtt's own callback, which does not look at the session present flag."""

        def on_connect(
            client: paho.Client, userdata: Any, flags: paho.ConnectFlags, *more: Any
        ) -> None:
            self._client, self._paused = client, False  # messages may follow before we get a turn
            self._resumed = flags.session_present
            if not flags.session_present:
                self.session_lost()
                self._remembered.forget()
            if inner is not None:
                inner(client, userdata, flags, *more)

        return on_connect

    def _explain(self, error: aiomqtt.MqttError) -> BrokerError:
        if isinstance(error, MqttConnectError):
            code = error.rc if isinstance(error.rc, int) else getattr(error.rc, "value", 0)
            reason, advice = _REFUSALS.get(code, (str(error), "ask the broker's operator"))
            return self.refusal(reason, advice.format(where=self.broker.credentials_are))
        if self._too_large is not None:
            return BrokerError(f"the broker {self.broker} sent {self._too_large}")
        cause = error.__cause__ or error.__context__  # aiomqtt raises some from None
        if self._client is not None:
            return self._lost(f": {cause or error}")
        if isinstance(cause, TimeoutError) or str(error) == "Operation timed out":
            return Silence(f"the broker {self.broker} sends no CONNACK; is it an MQTT broker?")
        return self.broker.unreachable(cause or error)

    async def _subscribe(self, client: aiomqtt.Client) -> dict[str, str]:
        filters = [each.filter for each in self._subscriptions]
        stale = self._remembered.stale(filters)
        self._remembered.wanting(filters)
        wanted = [each for each in self._subscriptions if self._to_be_asked(each)]
        refused = await self._ask_for(client, wanted) if wanted else {}
        if stale:  # after the new ones, so that nothing is missed that both of them match
            await client.unsubscribe(stale)
        self._remembered.holding(filters)
        return refused

    def _to_be_asked(self, each: Subscription) -> bool:
        """In 3.1.1 every SUBSCRIBE brings the retained messages again, so after a mere reconnect
        there is none: the session has kept what was granted before."""
        had = self.ever_connected and self._resumed and each.filter not in self.refused
        return not had or each.retained == "always"

    async def _ask_for(
        self, client: aiomqtt.Client, wanted: Sequence[Subscription]
    ) -> dict[str, str]:
        codes = await client.subscribe([(each.filter, _asked(each)) for each in wanted])
        refused = {}
        for each, code in zip(wanted, codes, strict=True):
            value = code if isinstance(code, int) else int(getattr(code, "value", 0x80))
            if value >= 0x80:
                refused[each.filter] = "refused; check the broker's ACL"
            elif value < _asked(each):
                refused[each.filter] = f"granted QoS {value} only, so messages can be lost"
        return refused

    async def _until_the_end(self, client: aiomqtt.Client) -> None:
        """Returns when we close; raises MqttError when the connection is lost."""
        lost = asyncio.create_task(_lost(client))
        closing = asyncio.create_task(self._closing.wait())
        try:
            while not (lost.done() or closing.done()):
                await asyncio.wait(
                    (lost, closing), timeout=LOOK_EVERY, return_when=asyncio.FIRST_COMPLETED
                )
                if self._client is not None and _is_reset(_socket(self._client)):
                    raise aiomqtt.MqttError("Connection reset by peer")
            if lost.done():
                lost.result()
        finally:
            lost.cancel()
            closing.cancel()
            await asyncio.gather(lost, closing, return_exceptions=True)

    # --- messages ---

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        if not self._reading:
            return  # unacknowledged, so it comes again
        self._arrived(
            mqtt5.PublishPacket(
                message.topic,
                bytes(message.payload),
                qos=_QOS[message.qos],
                retain=bool(message.retain),
                packet_id=message.mid if message.qos else None,
                duplicate=bool(message.dup),
            )
        )
        if self.full and not self._paused:
            self._paused = True
            asyncio.get_running_loop().remove_reader(_socket(client))

    def _write_acks(self, packet_ids: Sequence[int]) -> None:
        client = self._client
        if client is None:
            return
        for packet_id in packet_ids:
            client.ack(packet_id, 1)
        if self.journal is not None:  # paho tells nobody of its PINGRESPs, so this must do
            self.journal.acknowledged(packet_ids)

    def _resume_reading(self) -> None:
        client = self._client
        if self._paused and client is not None:
            number = _socket(client)
            if number >= 0:  # else an acknowledgement has just found the broker gone
                self._paused = False
                asyncio.get_running_loop().add_reader(number, self._read, client)

    def _read(self, client: paho.Client) -> None:
        """What aiomqtt's own reader does, which `remove_reader` took away."""
        client.loop_read()
        sock = client.socket()
        while sock is not None and getattr(sock, "pending", int)() > 0:
            client.loop_read()
            sock = client.socket()

    # --- the end ---

    def stop_reading(self) -> None:
        self._reading = False

    async def close(self) -> None:
        self._closing.set()
        self._flush()
        if self._ended is not None:
            await self._ended.wait()


def _is_reset(number: int) -> bool:
    """A socket that we don't read, for want of room, can be reset without anyone hearing of it:
    uvloop gives up watching it, and then paho's writes never happen. Only the keep-alive would
    find out."""
    if number < 0:
        return False
    poller = select.poll()
    poller.register(number, 0)
    return any(found & (select.POLLERR | select.POLLHUP) for _, found in poller.poll(0))


async def _lost(client: aiomqtt.Client) -> None:
    """Raises MqttError when the connection ends; no message ever reaches the iterator."""
    async for _ in client.messages:
        pass


def _asked(subscription: Subscription) -> int:
    """Never 2: paho sends PUBREC before anyone could have put the message somewhere safe."""
    return min(subscription.qos, 1)


def _socket(client: paho.Client) -> int:
    sock = client.socket()
    return -1 if sock is None else sock.fileno()


def _retrieve(client: aiomqtt.Client) -> None:
    """A connection lost while aiomqtt waits for a SUBACK, or while we close, leaves its reason in a
    future that nobody asks; asyncio would complain about that one."""
    if client._disconnected.done() and not client._disconnected.cancelled():
        client._disconnected.exception()
