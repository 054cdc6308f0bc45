"""What an HTTP/2 or TLS client makes us remember is bounded, and what it makes us hold weighs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from tests.relay import h2rig
from tests.relay.certificates import make_pair, needs_openssl
from tests.relay.h2pair import Pair
from tests.relay.hostile import block, client_hello, endless_hello, entry, field, head
from tests.relay.podrig import MakePod
from tests.relay.rig import Rig, get, request
from tests.relay.test_weights import cut_all, until, weight
from weir.proxy.contract import MAX_HEAD_BYTES
from weir.proxy.podserver import Role
from weir.proxy.tls import TlsPort
from weir.proxy.wire.h2.hpack import MOST_FIELDS, Decoder, HpackError, TooLarge
from weir.proxy.wire.h2.server import ClientConnection
from weir.proxy.wire.head import RequestHead

MakeRig = Callable[..., Awaitable[Rig]]
MakePair = Callable[..., Awaitable[Pair]]


def test_blocks_that_stand_for_a_lot_are_not_remembered() -> None:
    decoder = Decoder(MAX_HEAD_BYTES)
    decoder.decode(block(b"/", entry(b"a", b"v" * 4000)))
    for number in range(100):
        bomb = block(b"/", field(b"k", b"%d" % number), b"\xbe" * 255)
        assert len(decoder.decode(bomb).fields) == 260
        assert decoder.decode(bomb) is not decoder.decode(bomb)
    assert decoder.weigh() < 100_000


def test_what_is_remembered_is_bounded_and_weighs() -> None:
    decoder = Decoder(MAX_HEAD_BYTES)
    small = block(b"/")
    assert decoder.decode(small) is decoder.decode(small)
    before = decoder.weigh()
    for number in range(10_000):
        decoder.decode(block(b"/%d" % number))
    assert before < 10_000 < decoder.weigh() < 1 << 20


def test_a_block_of_more_fields_than_anybody_sends_is_too_large() -> None:
    decoder = Decoder(MAX_HEAD_BYTES)
    fields = [field(b"%x" % number) for number in range(MOST_FIELDS)]
    assert len(decoder.decode(b"".join(fields)).fields) == MOST_FIELDS
    with pytest.raises(TooLarge):
        decoder.decode(b"".join([*fields, field(b"x")]))
    with pytest.raises(HpackError):
        decoder.decode(b"".join(fields * 3))


async def test_a_head_of_too_many_fields_is_431(pair: MakePair) -> None:
    made = await pair()
    client = await made.client()
    client.send(head(1, block(b"/", *[field(b"x")] * MOST_FIELDS)))
    assert (await client.message(1)).status == 431
    assert (await client.get(3)).status == 200


async def test_each_stream_weighs_and_each_field_of_its_head(pair: MakePair) -> None:
    made = await pair()
    made.user.on("/never", h2rig.never)
    client = await made.client()
    for stream in range(1, 101, 2):
        client.ask(stream, h2rig.request("/never"))
    await made.settled(50)
    assert weight(made) > 50_000
    client.send(head(101, block(b"/never", *[field(b"%x" % n) for n in range(1000, 2500)])))
    await made.settled(51)
    assert weight(made) > 50_000 + 1500 * 100
    cut_all(made)
    await until(lambda: made.relay.connections == 0)


async def test_streams_that_wait_for_their_own_windows_are_not_looked_at_for_the_connections(
    pair: MakePair,
) -> None:
    async def large(speaker: h2rig.Speaker, stream: int, message: h2rig.Message) -> None:
        head = speaker.headers(stream, [(":status", "200")])
        speaker.send(head, speaker.data(stream, b"x" * 10_000, True))

    made = await pair()
    made.user.on("/large", large)
    client = await made.client((4, 100))
    client.credits = False
    for stream in range(1, 21, 2):
        client.ask(stream, h2rig.request("/large"))
    await made.settled(10)
    (found,) = made.relay.clients
    connection = cast(ClientConnection, found)
    streams = connection.streams
    await until(lambda: all(each.queue is not None for each in streams.values()))
    assert len(streams) == 10
    assert not connection._blocked
    client.send(h2rig.settings((4, 20_000)), h2rig.window(0, 100_000))
    for stream in range(1, 21, 2):
        assert len((await client.message(stream)).body) == 10_000


@pytest.mark.parametrize(
    "flood", [h2rig.frame(h2rig.SETTINGS, 1, 0), h2rig.frame(h2rig.GOAWAY, 0, 0, bytes(8))]
)
async def test_floods_of_acknowledgements_and_goodbyes_are_ended(
    pair: MakePair, flood: bytes
) -> None:
    made = await pair()
    client = await made.client()
    client.send(flood * 11_000)
    goaway = await client.closed()
    assert goaway is not None
    assert goaway.code == h2rig.ENHANCE_YOUR_CALM


async def test_more_settings_in_a_frame_than_there_are_end_the_connection(pair: MakePair) -> None:
    made = await pair()
    client = await made.client()
    client.send(h2rig.settings(*[(4, 1)] * 33))
    goaway = await client.closed()
    assert goaway is not None
    assert goaway.code == h2rig.ENHANCE_YOUR_CALM


async def test_trailers_that_wait_for_their_turn_weigh(pair: MakePair) -> None:
    made = await pair(container_concurrency=1)
    made.user.on("/never", h2rig.never)
    client = await made.client()
    client.ask(1, h2rig.request("/never"))
    await made.settled(1)
    client.send(head(3, block(b"/", method=b"\x83"), ended=False))
    client.send(head(3, entry(b"a", b"v" * 4000) + b"\xbe" * 200))
    await until(lambda: weight(made) > 200 * 4000)


async def test_more_trailers_than_gos_server_takes_are_refused(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    await client.send(request("POST", "/", "Transfer-Encoding: chunked") + b"0\r\nX: ")
    await client.send(b"y" * 8000)
    assert (await client.response()).status == 400


async def test_connection_may_not_name_more_fields_than_there_are(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    await client.send(get("/", "Connection: " + ",".join(["x"] * 1002)))
    assert (await client.response()).status == 400


def test_fifty_thousand_lines_of_a_list_are_one_list() -> None:
    lines = b"X-Forwarded-For: 1\r\n" * 50_000
    seen = RequestHead(b"GET / HTTP/1.1\r\nHost: a\r\n" + lines + b"\r\n").seen
    assert seen[b"x-forwarded-for"] == b", ".join([b"1"] * 50_000)


@needs_openssl
@pytest.mark.parametrize("first", [client_hello(), endless_hello(60_000)])
async def test_a_handshake_weighs_and_can_be_cut(pod: MakePod, tmp_path: Any, first: bytes) -> None:
    made = await pod(secure=TlsPort(folder=make_pair(tmp_path).folder))
    client = await made.client(Role.TLS)
    await client.send(first)
    await until(lambda: sum(made.relay.weigh().values()) > 100_000)
    for connection in made.relay.weigh():
        connection.cut()
    await until(lambda: made.relay.connections == 0)


@needs_openssl
async def test_a_handshake_that_is_held_for_want_of_memory_goes_on(
    pod: MakePod, tmp_path: Any
) -> None:
    pair = make_pair(tmp_path)
    made = await pod(secure=TlsPort(folder=pair.folder))
    bare = await made.client(Role.TLS)
    port = bare.writer.get_extra_info("peername")[1]
    connecting = asyncio.create_task(
        asyncio.open_connection("127.0.0.1", port, ssl=pair.trusted(), server_hostname="127.0.0.1")
    )
    await until(lambda: made.relay.connections == 2)
    made.relay.hold(True)
    await asyncio.sleep(0.05)
    made.relay.hold(False)
    reader, writer = await connecting
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()


@needs_openssl
async def test_a_handshake_of_more_than_64_kilobytes_is_cut(pod: MakePod, tmp_path: Any) -> None:
    made = await pod(secure=TlsPort(folder=make_pair(tmp_path).folder))
    client = await made.client(Role.TLS)
    await client.send(endless_hello(120_000))
    assert await client.closed()
