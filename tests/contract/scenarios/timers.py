"""The three timers, before and after the response has begun (contract section 3.7)."""

from __future__ import annotations

import asyncio
import contextlib
import time

from tests.contract.scenario import scenario
from tests.contract.user import HELLO
from tests.contract.world import World
from tests.relay.rig import Closed, Peer, Request, get, request

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nTransfer-Encoding: chunked\r\n\r\n"


async def silent(world: World, due: float) -> None:
    """Nothing comes from the user container, which is cut off; the client keeps its connection."""
    world.user.on("/hang", world.user.hang)
    client = await world.client()
    await world.ask("answer", get("/hang"), client=client, due=due)
    await world.user.left("/hang")
    await world.ask("the next request on this connection", get("/"), client=client)


@scenario("3.7", REVISION_TIMEOUT_SECONDS="1")
async def no_answer_within_the_timeout(world: World) -> None:
    await silent(world, 1.0)


@scenario("3.7", REVISION_RESPONSE_START_TIMEOUT_SECONDS="1")
async def no_answer_within_the_response_start_timeout(world: World) -> None:
    await silent(world, 1.0)


@scenario("3.7", REVISION_IDLE_TIMEOUT_SECONDS="1")
async def no_answer_within_the_idle_timeout(world: World) -> None:
    await silent(world, 1.0)


@scenario(
    "3.7",
    REVISION_TIMEOUT_SECONDS="3",
    REVISION_RESPONSE_START_TIMEOUT_SECONDS="2",
    REVISION_IDLE_TIMEOUT_SECONDS="1",
)
async def the_earliest_timer_counts(world: World) -> None:
    await silent(world, 1.0)


@scenario("3.7", REVISION_TIMEOUT_SECONDS="1")
async def an_HTTP_1_0_client_times_out(world: World) -> None:
    world.user.on("/hang", world.user.hang)
    await world.ask("answer", get("/hang").replace(b"HTTP/1.1", b"HTTP/1.0"), due=1.0)


@scenario("3.7", REVISION_TIMEOUT_SECONDS="1")
async def HEAD_times_out(world: World) -> None:
    world.user.on("/hang", world.user.hang)
    await world.ask("answer", request("HEAD", "/hang"), due=1.0)


async def begins(peer: Peer, _: Request) -> None:
    """A response that begins and never ends."""
    await peer.send(CHUNKED + b"3\r\nabc\r\n")
    with contextlib.suppress(ConnectionError):
        await peer.reader.read()
    raise Closed


async def stuck(world: World, due: float, limit: float) -> None:
    """How a response that has begun ends: when, with what, or not within the limit."""
    client = await world.client()
    await client.send(get("/"))
    begun = time.monotonic()
    head = await client.head()
    world.note("status", head.split(b"\r\n")[0])
    data = b""
    try:
        async with asyncio.timeout(limit):
            with contextlib.suppress(ConnectionError):
                while not data.endswith(b"\r\n0\r\n\r\n"):
                    piece = await client.reader.read(65536)
                    if not piece:
                        world.note("closed", True)
                        break
                    data += piece
    except TimeoutError:
        world.note("after the limit", "still open")
    else:
        world.when("the end", time.monotonic() - begun, due)
    world.note("body as sent", data)


@scenario("3.7", REVISION_TIMEOUT_SECONDS="1")
async def a_chunked_response_beyond_the_timeout(world: World) -> None:
    world.user.on("/", begins)
    await stuck(world, 1.0, 3.0)


@scenario("3.7", REVISION_RESPONSE_START_TIMEOUT_SECONDS="1")
async def the_response_start_timer_leaves_a_response_alone_that_has_begun(world: World) -> None:
    world.user.on("/", begins)
    await stuck(world, 0.0, 2.5)


@scenario("3.7", REVISION_IDLE_TIMEOUT_SECONDS="1")
async def a_chunked_response_that_stalls(world: World) -> None:
    world.user.on("/", begins)
    await stuck(world, 1.0, 4.0)


@scenario("3.7", REVISION_IDLE_TIMEOUT_SECONDS="1")
async def a_response_with_a_length_that_stalls(world: World) -> None:
    async def half(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 10\r\n\r\nabc")
        with contextlib.suppress(ConnectionError):
            await peer.reader.read()
        raise Closed

    world.user.on("/", half)
    client = await world.client()
    await client.send(get("/"))
    begun = time.monotonic()
    rest = await client.rest()
    world.when("the end", time.monotonic() - begun, 1.0)
    world.note("body", rest.partition(b"\r\n\r\n")[2])


@scenario("3.7", REVISION_IDLE_TIMEOUT_SECONDS="1")
async def every_write_of_the_response_starts_the_idle_timer_anew(world: World) -> None:
    async def drip(peer: Peer, got: Request) -> None:
        await peer.send(CHUNKED)
        for _ in range(5):
            await asyncio.sleep(0.5)
            await peer.send(b"1\r\nx\r\n")
        await peer.send(b"0\r\n\r\n")

    world.user.on("/", drip)
    await world.ask("answer", get("/"), due=2.5)


@scenario("3.7", REVISION_IDLE_TIMEOUT_SECONDS="1")
async def a_slow_upload_trips_the_idle_timer(world: World) -> None:
    """The queue-proxy answers when it has read the body, which here is half a second later."""
    client = await world.client()
    await client.send(request("POST", "/", "Content-Length: 100"))
    begun = time.monotonic()

    async def drip() -> None:
        with contextlib.suppress(Closed, ConnectionError):
            for _ in range(10):
                await asyncio.sleep(0.2)
                await client.send(b"x" * 10)

    uploading = asyncio.create_task(drip())
    head = await client.head()
    uploading.cancel()
    world.note("status", head.split(b"\r\n")[0])
    world.when("answer", time.monotonic() - begun, 1.0)


@scenario("3.7", CONTAINER_CONCURRENCY="1", REVISION_TIMEOUT_SECONDS="1")
async def a_place_is_free_again_after_a_timeout(world: World) -> None:
    world.user.on("/hang", world.user.hang)
    await world.ask("times out", get("/hang"), due=1.0)
    await world.ask("the next", get("/"))


@scenario("3.7", REVISION_TIMEOUT_SECONDS="2")
async def an_answer_in_time(world: World) -> None:
    world.user.on("/", world.user.slow(1.0, HELLO))
    await world.ask("answer", get("/"), due=1.0)
