"""HTTP/2 that breaks the rules: each is ended with the right code, and nothing is left behind."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from tests.relay.h2pair import Pair
from tests.relay.h2rig import (
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH,
    REFUSED_STREAM,
    RST,
    SETTINGS,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    Client,
    Fields,
    Message,
    Speaker,
    frame,
    never,
    request,
    reset,
    settings,
    window,
)

MakePair = Callable[..., Awaitable[Pair]]
OPEN = b"\x82\x86\x84\x41\x03a.b"  # GET http / a.b


def head(stream: int, ended: bool = True) -> bytes:
    return frame(HEADERS, END_HEADERS | (END_STREAM if ended else 0), stream, OPEN)


# ---- the connection ends ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "code"),
    [
        (frame(DATA, 0, 0, b"x"), PROTOCOL_ERROR),
        (frame(DATA, 0, 5, b"x"), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 0, OPEN), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 2, OPEN), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + OPEN), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS | PADDED, 1), FRAME_SIZE_ERROR),
        (frame(HEADERS, 0, 1, OPEN) + frame(PING, 0, 0, bytes(8)), PROTOCOL_ERROR),
        (frame(HEADERS, 0, 1, OPEN) + frame(CONTINUATION, 4, 3), PROTOCOL_ERROR),
        (frame(CONTINUATION, END_HEADERS, 1, OPEN), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 1, b"\xbe"), COMPRESSION_ERROR),
        (frame(HEADERS, END_HEADERS, 1, b"\x3f\xff\xff\x7f"), COMPRESSION_ERROR),
        (frame(RST, 0, 1, bytes(3)), FRAME_SIZE_ERROR),
        (frame(RST, 0, 1, bytes(4)), PROTOCOL_ERROR),
        (frame(SETTINGS, 0, 1), PROTOCOL_ERROR),
        (frame(SETTINGS, 0, 0, bytes(5)), FRAME_SIZE_ERROR),
        (frame(SETTINGS, 1, 0, bytes(6)), FRAME_SIZE_ERROR),
        (settings((4, 1 << 31)), FLOW_CONTROL_ERROR),
        (settings((5, 100)), PROTOCOL_ERROR),
        (settings((2, 2)), PROTOCOL_ERROR),
        (frame(PING, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
        (frame(PING, 0, 1, bytes(8)), PROTOCOL_ERROR),
        (frame(GOAWAY, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
        (frame(PUSH, END_HEADERS, 1, bytes(4) + OPEN), PROTOCOL_ERROR),
        (frame(WINDOW_UPDATE, 0, 0, bytes(3)), FRAME_SIZE_ERROR),
        (window(0, 0), PROTOCOL_ERROR),
        (window(0, (1 << 31) - 1), FLOW_CONTROL_ERROR),
        (window(7, 1), PROTOCOL_ERROR),
        (frame(PRIORITY, 0, 1, bytes(4)), FRAME_SIZE_ERROR),
        (frame(DATA, 0, 1, b"")[:3] + b"\xff" * 6, None),
        (b"\x00\x40\x01" + frame(PING, 0, 0)[3:], FRAME_SIZE_ERROR),
        (head(1) + head(1), None),
    ],
)
async def test_a_broken_rule_ends_the_connection_with_its_code(
    pair: MakePair, what: bytes, code: int | None
) -> None:
    made = await pair()
    made.user.on("/", never)
    client = await made.client()
    client.send(what)
    if code is None:  # cut short, or let pass: it hangs nothing
        client.abort()
    else:
        goaway = await client.closed()
        assert goaway is not None
        assert goaway.code == code
    await made.settled()


async def test_data_after_the_end_of_a_stream_ends_the_connection(pair: MakePair) -> None:
    made = await pair()
    made.user.on("/", never)
    client = await made.client()
    client.send(head(1), frame(DATA, 0, 1, b"x"))
    goaway = await client.closed()
    assert goaway is not None
    assert goaway.code == STREAM_CLOSED
    await made.settled()


async def test_what_is_no_preface_ends_the_connection(pair: MakePair) -> None:
    made = await pair()
    client = await made.bare()
    client.send(PREFACE[:18] + b"XM\r\n\r\n")
    goaway = await client.closed()
    assert goaway is not None
    assert goaway.code == PROTOCOL_ERROR


async def test_more_data_than_the_window_ends_the_connection(pair: MakePair) -> None:
    """It is credited ahead to streams that wait, but not without end."""
    made = await pair(container_concurrency=4)
    made.user.on("/", never)
    client = await made.client()
    client.send(*(head(stream) for stream in (1, 3, 5, 7)))
    for stream in range(9, 89, 2):  # these wait for their turn, so nobody takes their bodies
        client.send(head(stream, ended=False))
        client.send(*[frame(DATA, 0, stream, bytes(16384)) for _ in range(16)])
    goaway = await client.closed()
    assert goaway is not None
    assert goaway.code == FLOW_CONTROL_ERROR
    await made.settled()


@pytest.mark.parametrize(
    "flood",
    [
        frame(PING, 0, 0, bytes(8)),
        settings(),
        frame(PRIORITY, 0, 1, bytes(5)),
        frame(0x55, 0, 0),
    ],
)
async def test_floods_of_frames_that_mean_nothing_are_ended(pair: MakePair, flood: bytes) -> None:
    made = await pair()
    client = await made.client()
    client.send(flood * 11_000)
    goaway = await client.closed()
    assert goaway is not None
    assert goaway.code == ENHANCE_YOUR_CALM


async def test_a_flood_of_continuations_is_ended(pair: MakePair) -> None:
    made = await pair()
    client = await made.client()
    client.send(frame(HEADERS, 0, 1, OPEN))
    piece = frame(CONTINUATION, 0, 1, b"\x00\x01a\x7f\x80\x7e" + b"v" * 16000)
    client.send(piece * 100)
    goaway = await client.closed()
    assert goaway is not None
    assert goaway.code == ENHANCE_YOUR_CALM


async def test_rapid_resets_are_ended_and_leave_nothing_in_flight(pair: MakePair) -> None:
    made = await pair()
    made.user.on("/", never)
    client = await made.client()
    client.send(*[head(stream) + reset(stream) for stream in range(1, 2001, 2)])
    goaway = await client.closed()
    assert goaway is not None
    assert goaway.code == ENHANCE_YOUR_CALM
    await made.settled()
    assert made.relay.counters().requests < 600


# ---- only the stream ends --------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        [(":method", "GET"), (":scheme", "http")],
        [(":method", "GET"), (":path", "/")],
        [(":scheme", "http"), (":path", "/")],
        [*request(), (":path", "/")],
        [*request(), (":status", "200")],
        [*request(), (":method", "GET")],
        [*request(), ("Upper", "case")],
        [*request(), ("connection", "close")],
        [*request(), ("transfer-encoding", "chunked")],
        [*request(), ("upgrade", "websocket")],
        [*request(), ("te", "gzip")],
        [*request(), ("content-length", "1")],
        [*request(), ("content-length", "x")],
        [*request(), ("content-length", "0"), ("content-length", "1")],
        [*request(), ("x", "a\r\nb: c")],
        [*request(), ("x", "a\0")],
        [*request(), ("x", "a\x01")],
        [*request(), ("x", "a\x7f")],
        [*request(), ("x y", "z")],
        [*request("nowhere")],
        [*request("/a b")],
        [*request("*")],
        [(":method", "G E T"), (":scheme", "http"), (":path", "/")],
        [(":method", "GET"), (":scheme", "gopher"), (":path", "/")],
        [(":method", "CONNECT"), (":authority", "a.b:1")],
        [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a b")],
        [("a", "b"), *request()],
    ],
    ids=str,
)
async def test_a_malformed_request_is_reset_and_reaches_nobody(
    pair: MakePair, fields: Fields
) -> None:
    made = await pair()
    client = await made.client()
    client.ask(1, fields)
    got = await client.message(1)
    assert (got.reset, got.heads) == (PROTOCOL_ERROR, [])
    assert (await client.get(3)).status == 200
    assert len(made.user.requests) == 1
    await made.settled()


@pytest.mark.parametrize(("length", "body"), [("3", b"xxxx"), ("5", b"xxxx")])
async def test_a_body_that_is_not_of_its_length_is_reset(
    pair: MakePair, length: str, body: bytes
) -> None:
    made = await pair()
    client = await made.client()
    client.ask(1, request("/", "POST", ("content-length", length)), body)
    assert (await client.message(1)).reset == PROTOCOL_ERROR
    await made.settled()
    assert (await client.get(3)).status == 200


async def test_more_streams_than_allowed_are_refused(pair: MakePair) -> None:
    made = await pair()
    made.user.on("/", never)
    client = await made.client()
    client.send(*[head(stream) for stream in range(1, 511, 2)])
    for stream in range(501, 511, 2):
        assert (await client.message(stream)).reset == REFUSED_STREAM
    assert made.relay.counters().requests == 250


async def test_fields_of_more_than_a_megabyte_are_431(pair: MakePair) -> None:
    made = await pair()
    client = await made.client()
    client.decoder.max_header_list_size = 1 << 22
    adds = b"\x40\x01a\x7f\x81\x1e" + b"v" * 3968
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, OPEN + adds + b"\xbe" * 2000))
    client.encoder.header_table.add(b"a", b"v" * 3968)
    assert (await client.message(1)).status == 431
    assert (await client.get(3)).status == 200, "and the table is as it should be"


# ---- a user container that breaks the rules ----------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        [("content-type", "a/b")],
        [(":status", "20")],
        [(":status", "101")],
        [(":status", "200"), (":path", "/")],
        [(":status", "200"), ("x", "a\nb")],
        [(":status", "200"), ("content-length", "x")],
    ],
    ids=str,
)
async def test_a_malformed_response_is_502(pair: MakePair, answer: Fields) -> None:
    async def say(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, answer, True))

    made = await pair()
    made.user.on("/", say)
    client = await made.client()
    assert (await client.get(1)).status == 502
    assert (await client.get(3, path="/good")).status == 200


@pytest.mark.parametrize(
    "what",
    [
        frame(DATA, 0, 1, b"early"),
        frame(PUSH, END_HEADERS, 1, struct.pack(">I", 2) + OPEN),
        window(0, 0),
        frame(HEADERS, END_HEADERS, 1, b"\xbe"),
        frame(DATA, 0, 99, b"x"),
        b"\xff" * 9,
    ],
)
async def test_a_user_container_that_breaks_the_rules_is_502(pair: MakePair, what: bytes) -> None:
    async def say(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(what)

    made = await pair()
    made.user.on("/", say)
    client = await made.client()
    assert (await client.get(1)).status == 502
    assert (await client.get(3, path="/good")).status == 200
    await made.settled()


# ---- garbage ---------------------------------------------------------------------------------


async def chew(client: Client, data: bytes, random: Random) -> None:
    at = 0
    while at < len(data):
        size = random.choice([1, 3, 9, 100, len(data)])
        client.send(data[at : at + size])
        at += size
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(30))
async def test_whatever_comes_the_relay_lives_and_nothing_is_left(
    pair: MakePair, seed: int
) -> None:
    """Valid frames, mutated frames and noise, from clients and from the user container."""
    random = Random(seed)

    def noise() -> bytes:
        kind = random.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 77])
        payload = random.choice(
            [OPEN, b"", bytes(4), bytes(6), bytes(8), random.randbytes(random.randrange(50))]
        )
        data = frame(kind, random.randrange(256), random.choice([0, 1, 1, 3, 5, 7]), payload)
        if random.random() < 0.1:
            spoiled = bytearray(data)
            spoiled[random.randrange(len(data))] = random.randrange(256)
            data = bytes(spoiled)
        return data

    async def say(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(*[noise() for _ in range(random.randrange(10))])

    made = await pair()
    made.user.on("/", say, early=True)
    for _ in range(10):
        client = await made.client()
        await chew(client, b"".join(noise() for _ in range(random.randrange(1, 40))), random)
        client.abort()
    await made.settled()
    client = await made.client()
    assert (await client.get(1, path="/still")).status == 200
