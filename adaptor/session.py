"""An MQTT 5 session: subscriptions and acknowledgements over one connection after another.

Subscribes at QoS 1, so that a QoS 2 publish arrives at QoS 1, but where a spool keeps messages:
there PUBREC goes out when the message is safe, and PUBCOMP when the journal has forgotten its
packet id. The window is MQTT's own Receive Maximum: the broker never has more unacknowledged
messages out than that. How packets go over a connection is connection5's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import mqtt5

from weir.adaptor.broker import Session
from weir.adaptor.connection5 import Connection, in_words

_QOS = (mqtt5.QoS.AT_MOST_ONCE, mqtt5.QoS.AT_LEAST_ONCE, mqtt5.QoS.EXACTLY_ONCE)

_RETAINED = {
    "new": mqtt5.RetainHandling.SEND_IF_SUBSCRIPTION_NOT_EXISTS,
    "always": mqtt5.RetainHandling.SEND_ALWAYS,
    "never": mqtt5.RetainHandling.SEND_NEVER,
}


HIGHEST_ID = 65_535
"""Subscriptions are numbered from here downwards. Our packet ids are none of the broker's, but some
(mochi-mqtt 2.7) refuse a SUBSCRIBE with the id of a message that they have in flight."""


class Session5(Session):
    protocol = "5"

    _connection: Connection | None = None

    async def _connect_and_serve(self) -> None:
        connection = Connection(self)
        await self._dial(connection)
        self._connection = connection
        try:
            await connection.handshake()
            self._up(await self._subscribe(connection))
            await connection.lost
        finally:
            self._connection = None
            connection.abort()

    async def _dial(self, connection: Connection) -> None:
        broker, loop = self.broker, asyncio.get_running_loop()
        context = broker.ssl_context()
        name = broker.expected_name if context is not None else None
        protocol: asyncio.Protocol = connection
        try:
            async with asyncio.timeout(self.settings.handshake):
                if broker.path is not None:
                    from weir.adaptor.websocket import WebSocket

                    protocol = websocket = WebSocket(connection, str(broker))
                await loop.create_connection(
                    lambda: protocol, broker.host, broker.port, ssl=context, server_hostname=name
                )
                if broker.path is not None:
                    await websocket.opened
        except (OSError, TimeoutError) as error:
            if broker.path is not None:
                websocket.abort()
            raise broker.unreachable(error) from error

    async def _subscribe(self, connection: Connection) -> dict[str, str]:
        """One SUBSCRIBE per filter, because an identifier belongs to the packet. Returns what the
        broker refused. Retained messages come only when the subscription is new."""
        numbered = connection.can_number_subscriptions
        wanted_filters = [each.filter for each in self._subscriptions]
        if not connection.resumed:
            self._remembered.forget()
        stale = self._remembered.stale(wanted_filters)
        self._remembered.wanting(wanted_filters)
        answers: list[asyncio.Future[int]] = []
        for number_of, each in enumerate(self._subscriptions):
            wanted = mqtt5.TopicFilter(
                each.filter,
                max_qos=_QOS[each.qos],
                retain_handling=_RETAINED[each.retained],
            )
            number = each.number if numbered else None
            packet = mqtt5.SubscribePacket(HIGHEST_ID - number_of, [wanted], subscription_id=number)
            answers.append(connection.ask(packet))
        if stale:  # after the new ones, so that nothing is missed that both of them match
            packet_id = HIGHEST_ID - len(answers)
            answers.append(connection.ask(mqtt5.UnsubscribePacket(packet_id, stale)))
        codes = await connection.answered(asyncio.gather(*answers), "SUBACK")
        refused = {}
        for each, code in zip(self._subscriptions, codes, strict=False):
            if code >= 0x80:
                why = in_words(mqtt5.SubAckReasonCode(code))
                refused[each.filter] = f"{why}; check the broker's ACL"
            elif code < each.qos:
                refused[each.filter] = f"granted QoS {code} only, so messages can be lost"
        if not stale or codes[-1] < 0x80:
            self._remembered.holding(wanted_filters)
        return refused

    def released(self, packet_id: int) -> None:
        """PUBREL: the broker has our PUBREC, and the packet id is free once it has PUBCOMP."""
        self._exactly_once.discard(packet_id)
        connection = self._connection
        assert connection is not None
        complete = mqtt5.PubCompPacket(packet_id).write()
        if self.journal is None:
            connection.write(complete)
        else:
            self.journal.released(packet_id, lambda: connection.write(complete))

    def published(self, packet: mqtt5.PubAckPacket) -> bool:
        """Whether we published that; a session that only receives never did."""
        return False

    def _write_acks(self, packet_ids: Sequence[int]) -> None:
        connection = self._connection
        if connection is None:
            return
        if self._exactly_once:
            connection.write(b"".join([self._ack(each) for each in packet_ids]))
        else:
            connection.write(b"".join([mqtt5.PubAckPacket(each).write() for each in packet_ids]))
        if self.journal is not None:
            connection.prove(packet_ids)

    def _ack(self, packet_id: int) -> bytes:
        if packet_id not in self._exactly_once:
            return mqtt5.PubAckPacket(packet_id).write()
        return mqtt5.PubRecPacket(packet_id).write()

    def _resume_reading(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    def stop_reading(self) -> None:
        if self._connection is not None:
            self._connection.stop_reading()

    async def close(self) -> None:
        self._closing.set()
        connection = self._connection
        if connection is not None:
            self._flush()
            await connection.disconnect()
