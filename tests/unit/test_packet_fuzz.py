"""MQTT 5 as a hostile broker speaks it: any bytes in any pieces end in messages or in an error."""

from __future__ import annotations

import asyncio
from typing import Any

import mqtt5
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.adaptor.broker import Broker, BrokerError, SessionSettings, Ticket
from weir.adaptor.connection5 import LARGEST_PACKET, Connection
from weir.adaptor.session import Session5

CONNACK = b"\x20\x03\x00\x00\x00"


class Wire(asyncio.Transport):
    """Keeps what we say; closed by abort."""

    def __init__(self) -> None:
        super().__init__()
        self.said = b""
        self.aborted = self.paused = False

    def write(self, data: Any) -> None:
        self.said += bytes(data)

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def abort(self) -> None:
        self.aborted = True


class Rig:
    """A connection without a socket. `settle`: acknowledge every message at once."""

    def __init__(self, *, settle: bool = True) -> None:
        self.messages: list[mqtt5.PublishPacket] = []
        self._settle = settle
        broker = Broker.parse("mqtt://hostile")
        settings = SessionSettings("c", receive_maximum=4, keep_alive=0)
        self.session = Session5(broker, settings, [], self._receive)
        self.wire = Wire()
        self.connection = Connection(self.session)
        self.connection.connection_made(self.wire)
        self.session._connection = self.connection

    def _receive(self, message: mqtt5.PublishPacket, ticket: Ticket | None) -> None:
        self.messages.append(message)
        if self._settle and ticket is not None:
            self.session.settle(ticket)

    def feed(self, data: bytes, sizes: list[int]) -> None:
        """In pieces of these sizes, over and over."""
        at = turn = 0
        while at < len(data) and not self.wire.aborted:
            size = sizes[turn % len(sizes)] if sizes else len(data)
            self.connection.data_received(data[at : at + size])
            at, turn = at + size, turn + 1

    @property
    def error(self) -> BaseException | None:
        lost = self.connection.lost
        return lost.exception() if lost.done() and not lost.cancelled() else None


def run(script: Any) -> Any:
    """hypothesis calls no coroutines."""

    async def main() -> Any:
        noise: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: noise.append(what))
        found = script()
        await asyncio.sleep(0)
        assert not noise
        return found

    return asyncio.run(main())


pieces = st.lists(st.integers(1, 40), max_size=5)
topics = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0+#"), min_size=1)
publishes = st.builds(
    lambda topic, payload, qos, number, properties: mqtt5.PublishPacket(
        topic,
        payload,
        qos=mqtt5.QoS(qos),
        packet_id=number if qos else None,
        user_properties=properties,
    ).write(),
    topics,
    st.binary(max_size=300),
    st.integers(0, 1),
    st.integers(1, 65_535),
    st.lists(st.tuples(topics, topics), max_size=3),
)
packets = st.one_of(
    publishes,
    st.sampled_from(
        [
            CONNACK,
            b"\x90\x04\x00\x01\x00\x00",  # SUBACK
            b"\xb0\x04\x00\x01\x00\x00",  # UNSUBACK
            b"\xd0\x00",  # PINGRESP
            b"\x40\x02\x00\x01",  # PUBACK of what nobody published
            b"\x50\x02\x00\x01",  # PUBREC
            b"\x62\x02\x00\x01",  # PUBREL
            b"\x70\x02\x00\x01",  # PUBCOMP
            b"\xe0\x00",  # DISCONNECT
            b"\xf0\x02\x18\x00",  # AUTH
            b"\xc0\x00",  # PINGREQ, which only clients send
            b"\x10\x00",
        ]
    ),
    st.binary(max_size=30),
)


@given(st.lists(publishes, max_size=8), pieces)
def test_messages_come_whole_and_in_order_however_they_are_cut(
    written: list[bytes], sizes: list[int]
) -> None:
    def script() -> None:
        rig = Rig()
        rig.feed(CONNACK + b"".join(written), sizes)
        assert rig.error is None
        expected = [mqtt5.read(memoryview(each))[0] for each in written]
        assert rig.messages == expected

    run(script)


@given(st.lists(packets, max_size=20), pieces, st.booleans())
def test_whatever_a_broker_says_is_a_message_or_ends_the_connection_with_a_reason(
    said: list[bytes], sizes: list[int], settle: bool
) -> None:
    def script() -> None:
        rig = Rig(settle=settle)
        rig.feed(b"".join(said), sizes)
        error = rig.error
        assert (error is not None) is rig.wire.aborted
        assert error is None or (isinstance(error, BrokerError) and "hostile" in str(error))
        assert all(message.topic and message.packet_id != 0 for message in rig.messages)

    run(script)


@given(st.lists(packets, max_size=20), pieces)
def test_how_a_stream_is_cut_changes_nothing(said: list[bytes], sizes: list[int]) -> None:
    def outcome(cuts: list[int]) -> Any:
        rig = Rig()
        rig.feed(b"".join(said), cuts)
        return rig.messages, str(rig.error)

    assert run(lambda: outcome([])) == run(lambda: outcome(sizes))


@pytest.mark.parametrize(
    "packet",
    [
        b"\x32\x09\x00\x00\x00\x01\x03\x23\x00\x05x",  # an alias that we did not offer
        b"\x32\x0a\x00\x01t\x00\x01\x03\x23\x00\x05x",  # the same with its topic
        b"\x32\x06\x00\x01t\x00\x00\x00",  # packet id 0
        b"\x36\x06\x00\x01t\x00\x01\x00",  # QoS 3
        b"\x30\x06\x00\x03\xff\xff\xff\x00",  # a topic that is not UTF-8
        b"\x30\xff\xff\xff\xff\x01",
        b"\x00\x00",
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the codec's panic
def test_a_publish_that_breaks_the_rules_is_not_acknowledged(packet: bytes) -> None:
    def script() -> None:
        rig = Rig()
        rig.feed(CONNACK + packet, [])
        assert not rig.messages
        assert isinstance(rig.error, BrokerError)
        assert rig.wire.said == b""

    run(script)


def test_an_endless_packet_is_refused_by_its_head() -> None:
    def script() -> None:
        rig = Rig()
        rig.connection.data_received(CONNACK + b"\x30\xff\xff\xff\x7f" + b"\0" * 100)
        assert str(LARGEST_PACKET) in str(rig.error)

    run(script)


def test_no_more_is_taken_than_the_window_and_what_was_read_with_it() -> None:
    def script() -> None:
        rig = Rig(settle=False)
        rig.connection.data_received(CONNACK)
        rig.session.connected = True
        for number in range(1, 100):
            if rig.wire.paused:
                break
            rig.connection.data_received(
                mqtt5.PublishPacket(
                    "t", b"x", qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=number
                ).write()
            )
        assert rig.wire.paused and len(rig.messages) == 5

    run(script)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=40), pieces)
def test_messages_come_in_order_also_when_reading_stops_and_goes_on(
    lengths: list[int], sizes: list[int]
) -> None:
    def script() -> None:
        rig = Rig(settle=False)
        rig.connection.data_received(CONNACK)
        rig.session.connected = True
        tickets: list[Ticket] = []

        def receive(message: mqtt5.PublishPacket, ticket: Ticket | None) -> None:
            assert ticket is not None
            rig.messages.append(message)
            tickets.append(ticket)

        rig.session._receive = receive
        written = [
            mqtt5.PublishPacket(
                "t", b"x" * length, qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=number
            ).write()
            for number, length in enumerate(lengths, 1)
        ]
        data, at, turn = b"".join(written), 0, 0
        while at < len(data) or tickets:
            if at < len(data) and not rig.wire.paused:
                size = sizes[turn % len(sizes)] if sizes else len(data)
                rig.connection.data_received(data[at : at + size])
                at, turn = at + size, turn + 1
                continue
            assert len(tickets) <= 5
            rig.session.settle(tickets.pop(0))
            rig.session._flush()
        assert [len(message.payload) for message in rig.messages] == lengths
        assert [message.packet_id for message in rig.messages] == list(range(1, len(lengths) + 1))

    run(script)
