"""HTTP/2 through the relay where one stream could harm another, or a late frame an early one."""

from __future__ import annotations

import asyncio
import socket
import struct
import tracemalloc
from collections.abc import Awaitable, Callable

import pytest

from tests.relay.h2pair import Gate, Pair
from tests.relay.h2rig import (
    CANCEL,
    DATA,
    END_STREAM,
    GOAWAY,
    NO_ERROR,
    PADDED,
    PING,
    REFUSED_STREAM,
    WINDOW_UPDATE,
    Fields,
    Message,
    Speaker,
    frame,
    request,
    reset,
    settings,
    window,
)
from tests.relay.rig import PATIENCE
from weir.proxy.wire.h2.hpack import Block
from weir.proxy.wire.h2.user import UserLink, UserStream

MakePair = Callable[..., Awaitable[Pair]]
INITIAL_WINDOW = 4
STREAM_WINDOW = 256 << 10  # as the relay sets it
OK: Fields = [(":status", "200")]


def credited(speaker: Speaker) -> int:
    """By how much the relay made the connection's window larger."""
    frames = [got for got in speaker.frames if got.kind == WINDOW_UPDATE and not got.stream]
    return sum(int.from_bytes(got.payload, "big") for got in frames)


async def begun(client: Speaker, stream: int) -> None:
    """Until its response has."""
    await client.until(lambda: stream in client.messages and bool(client.messages[stream].heads))


@pytest.mark.parametrize("how", ["reset", "closed"])
async def test_a_whole_response_is_delivered_whatever_becomes_of_the_rest_of_the_request(
    pair: MakePair, how: str
) -> None:
    """RFC 9113, 8.1: an early response, then RST_STREAM NO_ERROR; the client is slow to take it."""

    async def early(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(
            speaker.headers(stream, OK),
            speaker.data(stream, b"x" * 5000),
            speaker.headers(stream, [("grpc-status", "0")], True),
            reset(stream, NO_ERROR) if how == "reset" else b"",
        )
        await speaker.writer.drain()
        if how == "closed":
            speaker.writer.close()

    made = await pair()
    made.user.on("/", early, early=True)
    client = await made.client((INITIAL_WINDOW, 1000))
    client.credits = False
    client.send(client.headers(1, request("/", "POST")))
    await client.until(lambda: 1 in client.messages and len(client.messages[1].body) == 1000)
    if how == "closed":
        await made.user.gone(1)
    else:
        user = made.user.connections[0]  # the reset was read once a later ping is answered
        user.send(frame(PING, 0, 0, b"12345678"))
        async with asyncio.timeout(PATIENCE):
            while not [got for got in user.frames if got.kind == PING]:
                await asyncio.sleep(0.002)
    client.send(window(1, 100_000))
    got = await client.message(1)
    assert (len(got.body), got.trailers) == (5000, {"grpc-status": "0"})
    assert got.ended


async def test_downloads_that_nobody_reads_do_not_hold_up_other_streams(pair: MakePair) -> None:
    """Each may fill the window of its stream; that of the connection stays open for the others."""
    spent = 0
    full = asyncio.Event()

    async def large(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, OK))
        for _ in range(16):  # the window of a stream
            await spend(speaker, 16384)
            speaker.send(speaker.data(stream, b"x" * 16384))
        if spent == 8 * STREAM_WINDOW:
            full.set()

    async def small(speaker: Speaker, stream: int, message: Message) -> None:
        await spend(speaker, 100)
        speaker.send(speaker.headers(stream, OK), speaker.data(stream, b"y" * 100, True))

    async def spend(speaker: Speaker, size: int) -> None:
        nonlocal spent
        while 65535 + credited(speaker) - spent < size:
            await asyncio.sleep(0.002)
        spent += size

    made = await pair()
    made.user.on("/large", large)
    made.user.on("/small", small)
    client = await made.client((INITIAL_WINDOW, 1000))
    client.send(window(0, 1 << 24))
    client.credits = False
    for stream in range(1, 17, 2):
        client.ask(stream, request("/large"))
    async with asyncio.timeout(PATIENCE):
        await full.wait()
    got = await client.get(17, path="/small")
    assert len(got.body) == 100
    assert [len(client.messages[stream].body) for stream in range(1, 17, 2)] == [1000] * 8


async def test_uploads_that_wait_for_their_turn_do_not_hold_up_the_one_that_has_it(
    pair: MakePair,
) -> None:
    async def counted(speaker: Speaker, stream: int, message: Message) -> None:
        said = str(len(message.body)).encode()
        speaker.send(speaker.headers(stream, OK), speaker.data(stream, said, True))

    made = await pair(container_concurrency=1)
    made.user.on("/", counted)
    client = await made.client()
    streams = list(range(1, 15, 2))
    size = 300_000
    left = dict.fromkeys(streams, size)
    rooms = dict.fromkeys([0, *streams], 65535)
    rooms.update(dict.fromkeys(streams, STREAM_WINDOW))
    for stream in streams:
        client.send(client.headers(stream, request("/", "POST")))
    seen = 0

    def upload() -> None:
        nonlocal seen
        for got in client.frames[seen:]:
            if got.kind == WINDOW_UPDATE:
                rooms[got.stream] += int.from_bytes(got.payload, "big")
        seen = len(client.frames)
        for stream in reversed(streams):  # those that wait come first
            while left[stream]:
                piece = min(left[stream], 16384, rooms[0], rooms[stream])
                if piece <= 0:
                    break
                left[stream] -= piece
                rooms[0] -= piece
                rooms[stream] -= piece
                client.send(client.data(stream, b"x" * piece, not left[stream]))

    while not all(s in client.messages and client.messages[s].over for s in streams):
        upload()
        await client.frame()
    for stream in streams:
        assert client.messages[stream].body == b"%d" % size


@pytest.mark.parametrize("kind", ["empty", "padded"])
async def test_frames_without_a_byte_are_not_kept_while_a_stream_waits(
    pair: MakePair, kind: str
) -> None:
    made = await pair(container_concurrency=1)
    gate = Gate()
    made.user.on("/slow", gate)
    client = await made.client()
    client.ask(1, request("/slow"))
    await made.user.received(1)
    client.send(client.headers(3, request("/", "POST")))
    await made.counted(2)
    nothing = frame(DATA, 0, 3) if kind == "empty" else frame(DATA, PADDED, 3, b"\0")
    burst = nothing * 500 + client.data(3, b"x")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(100):
            client.send(burst)
            await client.writer.drain()
            await asyncio.sleep(0)
        client.send(frame(PING, 0, 0, b"12345678"))
        await client.until(lambda: any(got.kind == PING for got in client.frames))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    gate.open()
    client.send(frame(DATA, END_STREAM, 3))
    got = await client.message(3)
    assert got.body == b"x" * 100
    assert grown < 1_000_000


async def test_calls_that_all_end_by_their_clients_cancelling_are_no_attack(
    pair: MakePair,
) -> None:
    """A gRPC watch has no other end: it streams until nobody wants to hear."""

    async def watch(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, OK), speaker.data(stream, b"event"))

    made = await pair()
    made.user.on("/watch", watch)
    client = await made.client()
    for number in range(700):
        stream = 2 * number + 1
        client.ask(stream, request("/watch"))
        await begun(client, stream)
        client.send(reset(stream, CANCEL))
    assert (await client.get(1401)).status == 200


async def test_uploads_that_a_goaway_disowns_give_the_connections_window_back(
    pair: MakePair,
) -> None:
    async def leave(speaker: Speaker, stream: int, message: Message) -> None:
        await asyncio.sleep(0)
        speaker.send(frame(GOAWAY, 0, 0, struct.pack(">II", 0, NO_ERROR)))

    made = await pair()
    made.user.settings = [(INITIAL_WINDOW, 0)]
    made.user.on("/", leave, early=True)
    client = await made.client()
    for number in range(100):
        room = 65535 - number * 200_000
        await client.until(lambda room=room: room + credited(client) >= 200_000)  # type: ignore[misc]
        stream = 2 * number + 1
        client.send(client.headers(stream, request("/", "POST")))
        client.send(*(client.data(stream, b"x" * 10_000) for _ in range(20)))
        assert (await client.message(stream)).status == 502


async def test_a_client_that_opens_its_windows_late_gets_all_it_asked_for(pair: MakePair) -> None:
    """Much may wait for it, more than a peer may leave unread."""

    async def large(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, OK))
        speaker.send(*(speaker.data(stream, b"x" * 16384) for _ in range(16)))
        speaker.send(speaker.headers(stream, [("x-end", "1")], True))

    made = await pair()
    made.user.on("/", large)
    client = await made.client((INITIAL_WINDOW, 0))
    client.send(window(0, 1 << 24))
    client.credits = False
    streams = range(1, 63, 2)
    for stream in streams:
        client.ask(stream, request("/"))
        await begun(client, stream)
    user = made.user.connections[0]
    user.send(frame(PING, 0, 0, b"12345678"))  # answered when all of that was read
    async with asyncio.timeout(PATIENCE):
        while not [got for got in user.frames if got.kind == PING]:
            await asyncio.sleep(0.002)
    client.send(settings((INITIAL_WINDOW, 1 << 20)))
    for stream in streams:
        got = await client.message(stream)
        assert (len(got.body), got.trailers) == (STREAM_WINDOW, {"x-end": "1"})


async def test_a_busy_client_is_asked_to_go_in_two_steps_and_loses_nothing(pair: MakePair) -> None:
    """RFC 9113, section 6.8: a request that is on its way at the first step is still served."""
    made = await pair()
    gate = Gate()
    made.user.on("/slow", gate)
    client = await made.client()
    client.ask(1, request("/slow"))
    await made.user.received(1)
    made.relay.close_idle()
    await client.until(lambda: client.goaway is not None)
    assert client.goaway is not None
    assert (client.goaway.payload[:4], client.goaway.code) == (b"\x7f\xff\xff\xff", NO_ERROR)
    assert (await client.get(3)).status == 200
    made.relay.close_idle()
    client.ask(5, request("/"), b"with a body")
    assert (await client.message(5)).reset == REFUSED_STREAM
    assert client.goaway.payload[:4] == b"\0\0\0\3"
    made.relay.close_idle()
    gate.open()
    assert (await client.message(1)).body == b"held"
    await made.settled()
    made.relay.close_idle()
    goaway = await client.closed()
    assert goaway is not None
    assert (goaway.payload[:4], goaway.code) == (b"\0\0\0\3", NO_ERROR)


class Asking:
    """Somebody who wants a stream, and is told what became of it."""

    def __init__(self) -> None:
        self.told: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def opened(self, stream: UserStream) -> None:
        self.told.set_result("a stream")

    def unreachable(self, why: str) -> None:
        self.told.set_result(why)

    def response_headers(self, block: Block | None, ended: bool) -> None: ...

    def response_data(self, piece: bytes, ended: bool) -> None: ...

    def response_reset(self, code: int) -> None: ...

    def response_lost(self, why: str, untouched: bool) -> None:
        self.told.set_result(f"{why} (untouched: {untouched})")


@pytest.mark.parametrize(
    ("said", "ends", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", True, "does not speak HTTP/2 (untouched: False)"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False, "does not speak HTTP/2 (untouched: False)"),
        (b"", True, "EOF (untouched: True)"),
        (settings() + frame(GOAWAY, 0, 0, bytes(8)), False, "shutting down (untouched: True)"),
        (settings(), False, "a stream"),
    ],
)
async def test_a_user_container_that_ends_before_it_was_asked_keeps_nobody_waiting(
    said: bytes, ends: bool, why: str
) -> None:
    """It may have said so before we knew that the connection stands."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peers: list[socket.socket] = []

        async def connect() -> socket.socket:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
            peers.append(theirs)
            theirs.sendall(said)
            if ends:
                theirs.shutdown(socket.SHUT_WR)
            ours.setblocking(False)
            return ours

        link, asking = UserLink(connect), Asking()
        link.ask(asking)
        async with asyncio.timeout(PATIENCE):
            assert (await asking.told).endswith(why)
        link.close()
        for peer in peers:
            peer.close()
