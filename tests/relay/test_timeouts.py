"""The three timers (contract 3.7), with timeouts short enough to wait for."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from tests.relay.rig import Closed, Peer, Request, Rig, hang, request, without_date

MakeRig = Callable[..., Awaitable[Rig]]

CHUNKED_START = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
LENGTH_START = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc"


def starts(data: bytes) -> Callable[[Peer, Request], Awaitable[None]]:
    """An answer that begins and never ends."""

    async def answer(peer: Peer, got: Request) -> None:
        await peer.send(data)
        await hang(peer, got)

    return answer


@pytest.mark.parametrize("timer", ["timeout", "response_start_timeout", "idle_timeout"])
async def test_before_the_response_has_begun_every_timer_ends_in_504(
    rig: MakeRig, timer: str
) -> None:
    made = await rig(**{timer: 0.1})
    made.user.on("/hang", hang)
    client = await made.client()
    response = await client.get("/hang")
    assert without_date(response.head) == (
        b"HTTP/1.1 504 Gateway Timeout\r\nDate: -\r\nContent-Length: 15\r\n"
        b"Content-Type: text/plain; charset=utf-8\r\n\r\n"
    )
    assert response.body == b"request timeout"
    await made.user.wait_for(lambda: made.user.open == 0)  # the user container is told
    assert (await client.get("/")).status == 200
    assert made.relay.counters().statuses == (0, 1, 0, 0, 1)


@pytest.mark.parametrize("timer", ["timeout", "idle_timeout"])
async def test_a_chunked_response_that_has_begun_gets_the_text_and_its_end(
    rig: MakeRig, timer: str
) -> None:
    made = await rig(**{timer: 0.1})
    made.user.on("/slow", starts(CHUNKED_START))
    client = await made.client()
    response = await client.get("/slow")
    assert response.status == 200
    assert response.chunks == [b"abc", b"request timeout"]
    await made.user.wait_for(lambda: made.user.open == 0)
    assert (await client.get("/")).status == 200


@pytest.mark.parametrize("timer", ["timeout", "idle_timeout"])
async def test_a_response_with_a_length_that_has_begun_is_cut_short(
    rig: MakeRig, timer: str
) -> None:
    made = await rig(**{timer: 0.1})
    made.user.on("/slow", starts(LENGTH_START))
    client = await made.client()
    await client.send(request("GET", "/slow"))
    assert (await client.head()).startswith(b"HTTP/1.1 200")
    assert await client.rest() == b"abc"


async def test_the_response_start_timer_means_nothing_once_the_response_has_begun(
    rig: MakeRig,
) -> None:
    made = await rig(response_start_timeout=0.05)

    async def answer(peer: Peer, _: Request) -> None:
        await peer.send(CHUNKED_START)
        begun = time.monotonic()
        while time.monotonic() < begun + 0.2:
            await asyncio.sleep(0.01)
        await peer.send(b"0\r\n\r\n")

    made.user.on("/slow", answer)
    client = await made.client()
    assert (await client.get("/slow")).chunks == [b"abc"]


async def test_writes_of_the_response_keep_the_idle_timer_away(rig: MakeRig) -> None:
    made = await rig(idle_timeout=1.0)

    async def answer(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        begun = time.monotonic()
        while time.monotonic() < begun + 1.5:
            await asyncio.sleep(0.05)
            await peer.send(b"1\r\nx\r\n")
        await peer.send(b"0\r\n\r\n")

    made.user.on("/drip", answer)
    client = await made.client()
    response = await client.get("/drip")
    assert set(response.body) == {ord("x")}


@pytest.mark.parametrize("timer", ["response_start_timeout", "idle_timeout"])
async def test_a_slow_upload_is_no_activity(rig: MakeRig, timer: str) -> None:
    made = await rig(**{timer: 0.2})
    made.user.on("/up", hang, unread=True)
    client = await made.client()
    await client.send(request("POST", "/up", "Content-Length: 1000000"))

    async def upload() -> None:
        for _ in range(1000):
            await client.send(b"x")
            await asyncio.sleep(0.01)

    uploading = asyncio.create_task(upload())
    assert (await client.response()).status == 504
    uploading.cancel()


@pytest.mark.parametrize("timer", ["timeout", "response_start_timeout", "idle_timeout"])
async def test_the_earliest_timer_ends_an_upgraded_connection_despite_traffic(
    rig: MakeRig, timer: str
) -> None:
    made = await rig(**{timer: 0.2})

    async def answer(peer: Peer, _: Request) -> None:
        await peer.send(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
        )
        while piece := await peer.reader.read(100):
            await peer.send(piece)
        raise Closed

    made.user.on("/ws", answer)
    client = await made.client()
    await client.send(request("GET", "/ws", "Connection: Upgrade", "Upgrade: echo"))
    assert (await client.head()).startswith(b"HTTP/1.1 101 ")

    async def chat() -> None:
        while True:
            await client.send(b"x")
            await asyncio.sleep(0.01)

    chatting = asyncio.create_task(chat())
    assert set(await client.rest()) <= {ord("x")}
    chatting.cancel()
    await made.user.wait_for(lambda: made.user.open == 0)


async def test_a_client_that_reads_nothing_does_not_outlive_the_timeout(rig: MakeRig) -> None:
    made = await rig(timeout=0.3)

    async def flood(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await peer.send(b"10000\r\n" + b"x" * 65536 + b"\r\n")

    made.user.on("/flood", flood)
    client = await made.client(receive_buffer=4096)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await client.send(request("GET", "/flood"))
    await made.user.received(1)
    await made.settled(lambda: made.relay.counters().in_flight == 0)
    await made.settled(lambda: made.relay.counters().connections == 0)


async def test_one_timer_serves_requests_with_different_deadlines(rig: MakeRig) -> None:
    made = await rig(timeout=0.5, response_start_timeout=0.1)
    made.user.on("/slow", starts(CHUNKED_START))
    made.user.on("/hang", hang)
    streaming, silent = await made.client(), await made.client()
    await streaming.send(request("GET", "/slow"))
    await streaming.head()
    for _ in range(3):
        assert (await silent.get("/hang")).status == 504
    chunks, _ = await streaming.chunked()
    assert chunks == [b"abc", b"request timeout"]
