"""How HTTP/2 streams and connections end, and what the peers set (contract sections 3.8, 3.12)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.relay.h2pair import Gate, Pair
from tests.relay.h2rig import (
    CANCEL,
    GOAWAY,
    INTERNAL_ERROR,
    NO_ERROR,
    REFUSED_STREAM,
    RST,
    Message,
    Speaker,
    frame,
    never,
    request,
    reset,
    settings,
    told,
    window,
)
from tests.relay.rig import UserContainer

MakePair = Callable[..., Awaitable[Pair]]
INITIAL_WINDOW, MAX_STREAMS, TABLE_SIZE = 4, 3, 1


# ---- resets and lost connections -------------------------------------------------------------


async def test_a_client_that_resets_its_stream_ends_it_at_the_user_container(
    pair: MakePair,
) -> None:
    made = await pair()
    made.user.on("/", never)
    client = await made.client()
    client.ask(1, request())
    await made.user.received(1)
    client.send(reset(1, CANCEL))
    user = made.user.connections[0]
    await asyncio.wait_for(made.settled(), 20)
    await made.user.was_reset(0)
    assert made.user.requests[0].reset == CANCEL
    assert made.relay.counters().aborted == 1
    assert (await client.get(3, path="/next")).status == 200
    assert made.user.connections == [user]


async def test_a_client_that_disconnects_ends_all_its_streams(pair: MakePair) -> None:
    made = await pair()
    made.user.on("/", never)
    client = await made.client()
    for stream in (1, 3, 5):
        client.ask(stream, request())
    await made.user.received(3)
    client.abort()
    await made.settled()
    assert made.relay.counters().aborted == 3


async def test_a_reset_before_the_response_is_502_and_after_it_a_reset(pair: MakePair) -> None:
    async def before(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(reset(stream, INTERNAL_ERROR))

    async def after(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, [(":status", "200")]), reset(stream, 0x77))

    made = await pair()
    made.user.on("/before", before)
    made.user.on("/after", after)
    client = await made.client()
    assert (await client.get(1, path="/before")).status == 502
    got = await client.get(3, path="/after")
    assert (got.status, got.reset) == (200, 0x77)


async def test_a_response_before_the_end_of_the_request_stops_the_upload(pair: MakePair) -> None:
    made = await pair()
    made.user.on("/", told, early=True)
    client = await made.client()
    client.send(client.headers(1, request("/", "POST")))
    await client.until(lambda: any(got.kind == RST for got in client.frames))
    got = client.messages[1]
    assert (got.status, got.ended, got.reset) == (200, True, NO_ERROR)
    client.send(client.data(1, b"late", True))  # it had not heard yet
    assert (await client.get(3)).status == 200
    await made.settled()


@pytest.mark.parametrize("begun", [False, True])
async def test_a_user_container_that_dies_is_502_or_a_reset(pair: MakePair, begun: bool) -> None:
    async def perish(speaker: Speaker, stream: int, message: Message) -> None:
        if begun:
            speaker.send(speaker.headers(stream, [(":status", "200")]))
            await speaker.writer.drain()
        speaker.writer.close()

    made = await pair()
    made.user.on("/", perish)
    client = await made.client()
    client.ask(1, request("/", "POST"), b"x")
    got = await client.message(1)
    if begun:
        assert (got.status, got.reset) == (200, INTERNAL_ERROR)
    else:
        assert (got.status, got.body) == (502, b"EOF\n")
    assert (await client.get(3, path="/alive")).status == 200, "on a new connection"


async def test_a_refused_user_port_is_502(pair: MakePair) -> None:
    made = await pair(user_port=1)
    got = await (await made.client()).get(1)
    assert got.status == 502
    assert got.body == b"dial tcp 127.0.0.1:1: connect: connection refused\n"


async def test_a_user_container_of_http_1_is_502(pair: MakePair) -> None:
    old = UserContainer()
    await old.start()
    old.on("*", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    made = await pair(user_port=old.port)
    got = await (await made.client()).get(1)
    assert got.status == 502
    assert got.body.startswith(b"http2: failed reading the frame payload")
    await old.stop()


async def test_a_get_on_a_connection_that_died_unnoticed_is_sent_once_more(pair: MakePair) -> None:
    async def once(speaker: Speaker, stream: int, message: Message) -> None:
        if len(made.user.connections) == 1:
            speaker.writer.close()
        else:
            await told(speaker, stream, message)

    made = await pair()
    made.user.on("/again", once)
    client = await made.client()
    assert (await client.get(1)).status == 200
    assert (await client.get(3, path="/again")).status == 200
    assert len(made.user.connections) == 2


async def test_a_post_is_not_sent_twice(pair: MakePair) -> None:
    async def close(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.writer.close()

    made = await pair()
    made.user.on("/again", close)
    client = await made.client()
    assert (await client.get(1)).status == 200
    client.ask(3, request("/again", "POST"), b"x")
    assert (await client.message(3)).status == 502
    assert [message.heads[0][":path"] for message in made.user.requests] == ["/", "/again"]


async def test_requests_that_a_goaway_disowns_go_to_a_new_connection(pair: MakePair) -> None:
    async def leave(speaker: Speaker, stream: int, message: Message) -> None:
        if len(made.user.connections) == 1:
            speaker.send(frame(GOAWAY, 0, 0, (stream - 2).to_bytes(4, "big") + bytes(4)))
        else:
            await told(speaker, stream, message)

    made = await pair()
    gate = Gate()
    made.user.on("/slow", gate)
    made.user.on("/moved", leave)
    client = await made.client()
    client.ask(1, request("/slow"))
    await made.user.received(1)
    assert (await client.get(3, path="/moved")).status == 200
    gate.open()
    assert (await client.message(1)).body == b"held", "what was begun is answered"
    assert len(made.user.connections) == 2


async def test_a_refused_stream_is_tried_once_more(pair: MakePair) -> None:
    times = 0

    async def refuse(speaker: Speaker, stream: int, message: Message) -> None:
        nonlocal times
        times += 1
        if times == 1:
            speaker.send(reset(stream, REFUSED_STREAM))
        else:
            await told(speaker, stream, message)

    made = await pair()
    made.user.on("/", refuse)
    assert (await (await made.client()).get(1)).status == 200
    assert times == 2


# ---- what the two peers set ------------------------------------------------------------------


async def test_streams_beyond_the_user_containers_limit_wait(pair: MakePair) -> None:
    made = await pair()
    made.user.settings = [(MAX_STREAMS, 2)]
    gate = Gate()
    made.user.on("/slow", gate)
    client = await made.client()
    assert (await client.get(1)).status == 200  # its settings are known from here
    for stream in (3, 5, 7, 9):
        client.ask(stream, request("/slow"))
    await made.user.received(3)
    await made.settled(4)
    assert gate.waiting == 2
    gate.open()
    for stream in (3, 5, 7, 9):
        assert (await client.message(stream)).status == 200


async def test_the_user_containers_windows_are_kept(pair: MakePair) -> None:
    made = await pair()
    made.user.settings = [(INITIAL_WINDOW, 10)]
    made.user.credits = False
    client = await made.client()
    assert (await client.get(1)).status == 200
    client.ask(3, request("/", "POST"), b"0123456789abcdef")
    user = made.user.connections[0]
    while 3 not in user.messages or len(user.messages[3].body) < 10:
        await asyncio.sleep(0.002)
    assert user.messages[3].body == b"0123456789"
    user.send(window(3, 4))
    while len(user.messages[3].body) < 14:
        await asyncio.sleep(0.002)
    user.send(settings((INITIAL_WINDOW, 100)))
    assert (await client.message(3)).body == b"0123456789abcdef"


async def test_a_client_that_gives_no_credit_holds_up_only_its_own_stream(pair: MakePair) -> None:
    async def large(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, [(":status", "200")]))
        for _ in range(4):
            speaker.send(speaker.data(stream, b"x" * 10_000))
        speaker.send(speaker.headers(stream, [("x-end", "1")], True))

    made = await pair()
    made.user.on("/large", large)
    client = await made.client((INITIAL_WINDOW, 1000))
    client.credits = False
    client.ask(1, request("/large"))
    await client.until(lambda: 1 in client.messages and len(client.messages[1].body) == 1000)
    assert (await client.get(3)).status == 200
    client.send(window(1, 500))
    await client.until(lambda: len(client.messages[1].body) == 1500)
    client.send(window(1, 100_000))
    got = await client.message(1)
    assert (len(got.body), got.trailers) == (40_000, {"x-end": "1"})


async def test_the_users_flood_is_held_back_by_windows(pair: MakePair) -> None:
    """An answer without end to a client that takes nothing: the relay buffers a window of it."""

    async def flood(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, [(":status", "200")]))
        room = 256 << 10  # of the stream, as the relay sets it
        while room:
            size = min(room, 16384)
            speaker.send(speaker.data(stream, b"x" * size))
            room -= size

    made = await pair()
    made.user.on("/", flood)
    client = await made.client((INITIAL_WINDOW, 0))
    client.credits = False
    client.ask(1, request())
    await client.until(lambda: 1 in client.messages and bool(client.messages[1].heads))
    user = made.user.connections[0]
    assert not [got for got in user.frames if got.kind == 8 and got.stream == 1], "no credit"
    client.send(window(1, 1 << 20), window(0, 1 << 20))
    await client.until(lambda: len(client.messages[1].body) == 256 << 10)


async def test_a_peer_that_wants_no_table_is_told_that_there_is_none(pair: MakePair) -> None:
    made = await pair()
    made.user.settings = [(TABLE_SIZE, 0)]
    client = await made.client((TABLE_SIZE, 0))
    client.decoder.max_allowed_table_size = 0
    for stream in (1, 3, 5):
        assert (await client.get(stream)).status == 200


# ---- the end ---------------------------------------------------------------------------------


async def test_a_drained_relay_says_goaway_to_idle_clients_and_closes(pair: MakePair) -> None:
    made = await pair()
    client = await made.client()
    assert (await client.get(1)).status == 200
    await made.relay.drained()
    goaway = await client.closed()
    assert goaway is not None
    assert (goaway.payload[:4], goaway.code) == (b"\0\0\0\1", NO_ERROR)


async def test_blanks_around_values_are_passed_on_as_they_came(pair: MakePair) -> None:
    async def blank(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, [(":status", "200"), ("x-b", " c\t")], True))

    made = await pair()
    made.user.on("/", blank)
    client = await made.client()
    got = await client.get(1, ("x-a", " b "), ("user-agent", " kube-probe/1"))
    assert got.final["x-b"] == " c\t"
    assert made.user.requests[0].final["x-a"] == " b ", "and a blank before it makes no probe"


async def test_http_1_clients_are_served_as_before(pair: MakePair) -> None:
    old = UserContainer()
    await old.start()
    made = await pair(user_port=old.port)
    client = await made.bare()
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (await client.reader.readline()) == b"HTTP/1.1 200 OK\r\n"
    await old.stop()


async def test_a_user_container_that_dies_while_it_is_idle_is_dialled_anew(pair: MakePair) -> None:
    made = await pair()
    client = await made.client()
    assert (await client.get(1)).status == 200
    made.user.connections[0].writer.close()
    await made.user.gone(1)
    client.ask(3, request("/", "POST"), b"x")
    assert (await client.message(3)).status == 200
    assert len(made.user.connections) == 2
