"""The MQTT 5 codec's edges: packets in pieces, packets too large, versions too old."""

from __future__ import annotations

import asyncio

import mqtt5
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.adaptor.broker import (
    FIRST_BACKOFF,
    LONGEST_BACKOFF,
    Broker,
    SessionSettings,
    WrongVersion,
    reconnect_delay,
)
from weir.adaptor.session import LARGEST_PACKET, Session5, packet_size


@given(st.integers(0, 300_000))
def test_the_size_of_a_packet_is_known_from_its_first_bytes(size: int) -> None:
    packet = mqtt5.PublishPacket("t", b"x" * size).write()
    assert packet_size(packet[:5]) == len(packet)
    assert packet_size(packet[:1]) == 0


def test_a_packet_larger_than_agreed_is_refused() -> None:
    with pytest.raises(ValueError, match=str(LARGEST_PACKET)):
        packet_size(b"\x30\xff\xff\xff\x7f")


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_reconnects_are_spread_and_bounded(attempt: int, chance: float) -> None:
    delay = reconnect_delay(attempt, chance)
    assert FIRST_BACKOFF / 2 <= delay <= LONGEST_BACKOFF


async def test_a_3_1_1_refusal_is_recognised() -> None:
    """MQTT 3.1.1, 3.1.2.2: CONNACK with return code 1, in a form that is no MQTT 5."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"\x20\x02\x00\x01")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    broker = Broker.parse(f"mqtt://127.0.0.1:{port}")
    session = Session5(broker, SessionSettings("x"), [], lambda message, ticket: None)
    async with server:
        with pytest.raises(WrongVersion, match=r"does not speak MQTT 5"):
            await session.run()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("mqtt://h", "mqtt://h:1883"),
        ("mqtts://h", "mqtts://h:8883"),
        ("mqtt://ann:s%40crt@h:1", "mqtt://h:1"),
        ("mqtt://[::1]:5", "mqtt://[::1]:5"),
    ],
)
def test_a_brokers_address_never_shows_the_password(url: str, shown: str) -> None:
    broker = Broker.parse(url)
    assert str(broker) == shown
    assert "crt" not in repr(broker)


def test_credentials_are_percent_decoded() -> None:
    broker = Broker.parse("mqtt://a%2Fnn:s%40crt@h")
    assert (broker.username, broker.password) == ("a/nn", "s@crt")
