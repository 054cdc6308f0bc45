"""The MQTT 5 codec's edges: packets in pieces, packets too large, versions too old."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from dataclasses import replace

import mqtt5
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from weir.adaptor.broker import (
    FIRST_BACKOFF,
    LONGEST_BACKOFF,
    Broker,
    BrokerError,
    SessionSettings,
    Subscription,
    Ticket,
    WrongVersion,
    reconnect_delay,
)
from weir.adaptor.connection5 import LARGEST_PACKET, packet_size
from weir.adaptor.session import Session5
from weir.adaptor.session311 import Session311


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


async def _broker_311(connack: bytes) -> tuple[asyncio.Server, list[bytes]]:
    """Answers CONNECT with `connack` and reads on; what it got after CONNECT."""
    got: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(connack)
        while data := await reader.read(4096):
            got.append(data)
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0), got


def _session_311(server: asyncio.Server) -> Session311:
    """Settles what it receives at once."""

    def receive(_: mqtt5.PublishPacket, ticket: Ticket | None) -> None:
        assert ticket is not None
        session.settle(ticket)

    broker = Broker("127.0.0.1", server.sockets[0].getsockname()[1])
    subscriptions = [Subscription("a/#", 1, 1)]
    session = Session311(broker, SessionSettings("c", handshake=1.0), subscriptions, receive)
    return session


async def test_a_message_right_behind_the_3_1_1_connack_is_acknowledged() -> None:
    publish = b"\x32\x07\x00\x03a/b\x00\x07"
    server, got = await _broker_311(b"\x20\x02\x01\x00" + publish)
    running = asyncio.create_task(_session_311(server).run())
    await asyncio.sleep(0.3)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    server.close()
    assert b"\x40\x02\x00\x07" in b"".join(got)


async def test_a_connection_lost_in_mid_subscribe_leaves_no_noise() -> None:
    noise: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: noise.append(what["message"]))

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(b"\x20\x03\x00\x00\x00")
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    broker = Broker("127.0.0.1", server.sockets[0].getsockname()[1])
    subscriptions = [Subscription("a/#", 1, 1), Subscription("b/#", 1, 2)]
    session = Session5(broker, SessionSettings("c"), subscriptions, lambda message, ticket: None)
    with pytest.raises(BrokerError):
        await session._connect_and_serve()
    server.close()
    await asyncio.sleep(0.01)
    gc.collect()
    assert not noise


async def test_a_3_1_1_connection_lost_in_mid_subscribe_leaves_no_noise() -> None:
    noise: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: noise.append(what["message"]))

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(b"\x20\x02\x00\x00")
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    with pytest.raises(BrokerError):
        await _session_311(server)._connect_and_serve()
    server.close()
    gc.collect()
    assert not noise


async def test_a_3_1_1_window_with_room_again_after_the_socket_is_gone_raises_nothing() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (b"\x20\x02\x01\x00", b"\x90\x03\x00\x01\x01"):  # CONNACK, SUBACK
            await reader.read(4096)
            writer.write(answer)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    session = _session_311(server)
    running = asyncio.create_task(session.run())
    async with asyncio.timeout(30):
        while not session.connected:
            await asyncio.sleep(0.005)
    assert session._client is not None
    session._paused = True
    session._client._sock_close()  # as paho does when writing an acknowledgement fails
    session._flush()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    server.close()


def test_a_3_1_1_connection_that_is_reset_is_noticed_though_it_is_not_read() -> None:
    """For want of room; and on uvloop, which then tells nobody. The keep-alive would, one day."""
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        for answer in (b"\x20\x02\x01\x00", b"\x90\x03\x00\x01\x01"):  # CONNACK, SUBACK
            await reader.read(4096)
            writer.write(answer)

    async def reset_and_wait() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        session = _session_311(server)
        session.settings = replace(session.settings, keep_alive=3600)
        running = asyncio.create_task(session.run())
        async with asyncio.timeout(60):
            while not session.connected:
                await asyncio.sleep(0.005)
            assert session._client is not None
            session._paused = True
            read = session._client.socket()
            assert read is not None
            asyncio.get_running_loop().remove_reader(read.fileno())
            sock = connections[0].transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connections[0].transport.abort()
            while len(connections) < 2:
                await asyncio.sleep(0.005)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        server.close()

    uvloop.run(reset_and_wait())
