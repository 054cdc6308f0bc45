"""HTTP/2 responses that their client does not want to the end (contract 3.12)."""

from __future__ import annotations

import asyncio

from tests.contract.http2 import Stream
from tests.contract.scenario import scenario
from tests.contract.scenarios.http2 import ask, speaking, tell
from tests.contract.world import World

HEAD = [(":status", "200"), ("content-type", "a/b")]


async def begins(stream: Stream) -> None:
    """A response that has begun, and does not end by itself."""
    await stream.headers(HEAD)
    await stream.data(b"begun")
    await stream.ended.wait()
    await stream.side.lost.wait()


async def floods(stream: Stream) -> None:
    """A response without end, as fast as it is taken."""
    await stream.headers(HEAD)
    while True:
        await stream.data(bytes(16384))


@scenario("3.12")
async def h2c_a_client_that_resets_within_a_response(world: World) -> None:
    """The user container hears of it, and the connection serves on."""
    async with speaking(world) as (side, user):
        user.on("/begins", begins)
        stream = await side.stream(ask("/begins", method="POST"), end=False)
        world.note("body so far", await stream.until(5))
        await stream.reset(8)
        async with asyncio.timeout(5):
            await user.streams[0].ended.wait()
        await tell(world, "the next", await side.stream(ask("/next")))


@scenario("3.12")
async def h2c_a_client_that_leaves_within_a_response(world: World) -> None:
    async with speaking(world) as (side, user):
        user.on("/begins", begins)
        stream = await side.stream(ask("/begins", method="POST"), end=False)
        world.note("body so far", await stream.until(5))
        side.close()
        async with asyncio.timeout(5):
            await user.streams[0].ended.wait()


@scenario("3.12", SERVING_REQUEST_METRICS_BACKEND="")
async def h2c_a_client_that_resets_a_flood(world: World) -> None:
    """Without metrics: upstream, what is counted depends on where in the body it was."""
    async with speaking(world) as (side, user):
        user.on("/floods", floods)
        stream = await side.stream(ask("/floods"))
        await stream.until(100_000)
        await stream.reset(8)
        async with asyncio.timeout(5):
            await user.streams[0].ended.wait()
        user.streams[0].got.body = b""
        await tell(world, "the next", await side.stream(ask("/next")))


@scenario("3.12")
async def h2c_the_user_container_resets_within_a_response(world: World) -> None:
    async def resets(stream: Stream) -> None:
        await stream.headers(HEAD)
        await stream.data(b"begun")
        await stream.reset(2)

    async with speaking(world) as (side, user):
        user.on("/resets", resets)
        stream = await side.stream(ask("/resets"))
        await stream.all()
        world.note("ended by a reset", stream.got.reset is not None)
        await tell(world, "the next", await side.stream(ask("/next")))
