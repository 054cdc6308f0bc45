"""Publishing at QoS 1, done when the broker has said so: the other direction of a session.

A publisher is a session without subscriptions that ends with its connection. Nothing is queued: a
message is with the broker, or its caller is told that it isn't and may try again; after a lost
connection nobody knows, and trying again may publish it twice. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Protocol, cast

import aiomqtt
import mqtt5

from weir.adaptor.broker import Broker, SessionSettings, Silence, WrongVersion, log
from weir.adaptor.connection5 import Connection, in_words
from weir.adaptor.events import Event
from weir.adaptor.jsonformat import to_json
from weir.adaptor.mqttbinding import Dialect, properties
from weir.adaptor.session import Session5
from weir.adaptor.session311 import Session311

HIGHEST_ID = 65_535
PATIENCE = 15.0
"""Seconds for the broker's PUBACK."""

REFUSED_FOR_GOOD = (
    mqtt5.PubAckReasonCode.NOT_AUTHORIZED,
    mqtt5.PubAckReasonCode.TOPIC_NAME_INVALID,
    mqtt5.PubAckReasonCode.PAYLOAD_FORMAT_INVALID,
)


class NotPublished(Exception):
    """str() says why. `for_good`: trying again won't help. `lost`: the connection ended while the
    message was on its way, perhaps because of it."""

    def __init__(self, text: str, *, for_good: bool = False, lost: bool = False) -> None:
        super().__init__(text)
        self.for_good, self.lost = for_good, lost


class Publisher(Protocol):
    """What both kinds can do."""

    async def publish(
        self,
        topic: str,
        event: Event,
        *,
        dialect: Dialect = "spec",
        correlation: bytes | None = None,
    ) -> None:
        """The event in the CloudEvents MQTT binding; done when the broker has it. `dialect`,
        `correlation` (data of a reply): where there are properties. Raises NotPublished."""


def _settings(client_id: str, keep_alive: int) -> SessionSettings:
    return SessionSettings(client_id, keep_alive=keep_alive, expiry=0, clean_start=True)


class Publisher5(Session5):
    """Binary mode: attributes as user properties, the payload as it is."""

    def __init__(self, broker: Broker, client_id: str, keep_alive: int) -> None:
        super().__init__(broker, _settings(client_id, keep_alive), (), lambda message, ticket: None)
        self._asked: dict[int, asyncio.Future[mqtt5.PubAckPacket]] = {}
        self._last = 0
        self._room: asyncio.Event = asyncio.Event()

    async def publish(
        self,
        topic: str,
        event: Event,
        *,
        dialect: Dialect = "spec",
        correlation: bytes | None = None,
    ) -> None:
        connection = await self._with_room()
        packet_id = self._free_id()
        try:
            content_type, pairs, payload = properties(event, dialect)
            packet = mqtt5.PublishPacket(
                topic,
                payload,
                qos=mqtt5.QoS.AT_LEAST_ONCE,
                packet_id=packet_id,
                content_type=content_type,
                correlation_data=correlation,
                user_properties=pairs,
            ).write()
        except ValueError as error:  # a topic or an attribute that MQTT has no text for
            raise NotPublished(f"MQTT can't carry the event: {error}", for_good=True) from error
        if connection.largest is not None and len(packet) > connection.largest:
            raise NotPublished(
                f"the broker {self.broker} takes no more than {connection.largest} bytes",
                for_good=True,
            )
        answer: asyncio.Future[mqtt5.PubAckPacket] = asyncio.get_running_loop().create_future()
        self._asked[packet_id] = answer
        connection.write(packet)
        await asyncio.wait(
            (answer, connection.lost), timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED
        )
        if not answer.done():  # the id stays taken until the answer or the end of the connection
            raise NotPublished(
                f"the broker {self.broker} did not acknowledge the message",
                lost=connection.lost.done(),
            )
        code = answer.result().reason_code
        if code.value >= 0x80:
            raise NotPublished(
                f"the broker {self.broker} refuses the message: {in_words(code)}",
                for_good=code in REFUSED_FOR_GOOD,
            )

    async def _with_room(self) -> Connection:
        """The connection, once the broker takes one more. Raises NotPublished."""
        until = asyncio.get_running_loop().time() + PATIENCE
        while True:
            connection = self._connection
            if connection is None or not self.connected:
                raise NotPublished(self.error or f"not connected to the broker {self.broker} yet")
            if len(self._asked) < connection.send_window:
                return connection
            self._room.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._room.wait()
            except TimeoutError:
                raise NotPublished(
                    f"the broker {self.broker} is busy with what it got before"
                ) from None

    def _free_id(self) -> int:
        while True:
            self._last = self._last % HIGHEST_ID + 1
            if self._last not in self._asked:
                return self._last

    def published(self, packet: mqtt5.PubAckPacket) -> bool:
        answer = self._asked.pop(packet.packet_id, None)
        self._room.set()
        if answer is not None and not answer.done():
            answer.set_result(packet)
        return answer is not None

    def _down(self) -> None:
        super()._down()
        self._asked.clear()
        self._room.set()


class Publisher311(Session311):
    """Structured mode: 3.1.1 has no properties. Its PUBACK says nothing but that it came."""

    def __init__(self, broker: Broker, client_id: str, keep_alive: int) -> None:
        super().__init__(broker, _settings(client_id, keep_alive), (), lambda message, ticket: None)
        self._lost_it = asyncio.Event()
        """Set while there is no connection: paho does not tell those who wait for a PUBACK."""

    async def publish(
        self,
        topic: str,
        event: Event,
        *,
        dialect: Dialect = "spec",
        correlation: bytes | None = None,
    ) -> None:
        client = self.client
        if client is None or not self.connected:
            raise NotPublished(self.error or f"not connected to the broker {self.broker} yet")
        publishing = asyncio.ensure_future(
            client.publish(topic, to_json(event), 1, timeout=PATIENCE)
        )
        lost = asyncio.ensure_future(self._lost_it.wait())
        try:
            await asyncio.wait((publishing, lost), return_when=asyncio.FIRST_COMPLETED)
            if not publishing.done():
                raise NotPublished(
                    f"the broker {self.broker} went before it acknowledged the message", lost=True
                )
            publishing.result()
        except ValueError as error:
            raise NotPublished(f"MQTT can't carry the event: {error}", for_good=True) from error
        except aiomqtt.MqttError as error:
            raise NotPublished(
                f"the broker {self.broker} did not acknowledge the message: {error}"
            ) from error
        finally:
            publishing.cancel()
            lost.cancel()

    def _up(self, granted: dict[str, str]) -> None:
        super()._up(granted)
        self._lost_it.clear()

    def _down(self) -> None:
        super()._down()
        self._lost_it.set()


class AnyPublisher:
    """A publisher that stays connected, by the protocol asked for; `auto` finds it as the sessions
    do: 5 first, 3.1.1 for a broker that refuses it, both in turn for one that is silent."""

    def __init__(self, broker: Broker, client_id: str, protocol: str, keep_alive: int) -> None:
        self._broker, self._client_id, self._keep_alive = broker, client_id, keep_alive
        self._protocol = protocol
        self.session = self._new(Publisher311 if protocol == "3.1.1" else Publisher5)

    def _new(self, kind: type[Publisher5 | Publisher311]) -> Publisher5 | Publisher311:
        return kind(self._broker, self._client_id, self._keep_alive)

    async def run(self) -> None:
        """Until `close()`. Raises WrongVersion when the broker won't speak what was asked for."""
        tentative = self._protocol == "auto"
        kinds = itertools.cycle((Publisher311, Publisher5))
        while True:
            try:
                return await self.session.run(tentative=tentative)
            except (WrongVersion, Silence) as error:
                kind = cast(type[Publisher5 | Publisher311], next(kinds))
                if not tentative or (isinstance(error, WrongVersion) and kind is Publisher5):
                    raise
                log.warning("%s Trying MQTT %s.", error, kind.protocol)
            self.session = self._new(kind)

    async def publish(
        self,
        topic: str,
        event: Event,
        *,
        dialect: Dialect = "spec",
        correlation: bytes | None = None,
    ) -> None:
        """Raises NotPublished."""
        await self.session.publish(topic, event, dialect=dialect, correlation=correlation)

    async def close(self) -> None:
        await self.session.close()
