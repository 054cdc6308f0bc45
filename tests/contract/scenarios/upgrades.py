"""Upgraded connections (contract section 3.10), and which timers end them (3.7)."""

from __future__ import annotations

import asyncio
import contextlib
import time

from tests.contract.scenario import scenario
from tests.contract.user import ok
from tests.contract.world import World
from tests.relay.rig import Client, Closed, Peer, Request, get

UPGRADE = ("Connection: Upgrade", "Upgrade: echo")
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"


async def echo(peer: Peer, _: Request) -> None:
    """Says back what it hears, until the other side ends."""
    await peer.send(SWITCHED)
    with contextlib.suppress(ConnectionError):
        while piece := await peer.reader.read(65536):
            await peer.send(piece)
    peer.close()
    raise Closed


async def upgraded(world: World) -> Client:
    world.user.on("/", echo)
    client = await world.client()
    await world.ask("upgrade", get("/", *UPGRADE), client=client)
    return client


@scenario("3.10")
async def bytes_go_both_ways_once_it_has_switched(world: World) -> None:
    client = await upgraded(world)
    for piece in (b"one", b"more", b"x" * 100_000):
        await client.send(piece)
        world.note(f"echo of {len(piece)}", await client.exactly(len(piece)) == piece)
    client.close()
    await world.user.wait_for(lambda: world.user.open == 0)


@scenario("3.10")
async def bytes_right_behind_the_switch_are_not_lost(world: World) -> None:
    async def greets(peer: Peer, _: Request) -> None:
        await peer.send(SWITCHED + b"welcome")
        world.note("heard", await peer.exactly(6))
        peer.close()
        raise Closed

    world.user.on("/", greets)
    client = await world.client()
    await world.ask("upgrade", get("/", *UPGRADE), client=client)
    world.note("welcome", await client.exactly(7))
    await client.send(b"thanks")
    world.note("rest", await client.rest())
    client.close()


@scenario("3.10")
async def the_user_container_ends_an_upgrade(world: World) -> None:
    async def bye(peer: Peer, _: Request) -> None:
        await peer.send(SWITCHED + b"bye")
        peer.close()
        raise Closed

    world.user.on("/", bye)
    client = await world.client()
    await world.ask("upgrade", get("/", *UPGRADE), client=client)
    world.note("rest", await client.rest())
    client.close()  # or else it has not ended for the queue-proxy


@scenario("3.10")
async def an_upgrade_may_be_declined(world: World) -> None:
    world.user.on("/", ok(b"no"))
    client = await world.client()
    await world.ask("answer", get("/", *UPGRADE), client=client)
    await world.ask("the next", get("/next"), client=client)


@scenario("3.10")
async def a_switch_to_another_protocol(world: World) -> None:
    world.user.on("/", SWITCHED.replace(b"echo", b"other"))
    await world.ask("answer", get("/", *UPGRADE))


@scenario("3.10")
async def an_upgrade_by_several_tokens(world: World) -> None:
    world.user.on("/", echo)
    client = await world.client()
    await world.ask(
        "upgrade", get("/", "Connection: keep-alive, upgrade", "Upgrade: ECHO"), client=client
    )


@scenario("5.3")
async def an_upgraded_connection_counts_until_its_end(world: World) -> None:
    client = await upgraded(world)
    _, second = await world.windows(2)
    world.note("in one window", f"{second['average_concurrent_requests']:g}")
    client.close()
    await world.user.wait_for(lambda: world.user.open == 0)


@scenario("3.6", CONTAINER_CONCURRENCY="1")
async def an_upgraded_connection_keeps_its_place(world: World) -> None:
    client = await upgraded(world)
    waits = await world.client()
    world.user.on("/second", ok(b"second"))
    await waits.send(get("/second"))
    await asyncio.sleep(0.3)
    world.note("asked meanwhile", len(world.user.requests))
    client.close()
    await world.answer("the one who waited", waits)


async def chatting(world: World, due: float, limit: float) -> None:
    """An upgraded connection on which something is said all the time: when does it end?"""
    begun = time.monotonic()
    client = await upgraded(world)
    try:
        while time.monotonic() < begun + limit:
            await client.send(b"x")
            await client.exactly(1)
            await asyncio.sleep(0.1)
        world.note("after the limit", "still open")
    except (Closed, ConnectionError):
        world.when("cut", time.monotonic() - begun, due)


@scenario("3.7", REVISION_TIMEOUT_SECONDS="1")
async def the_timeout_ends_an_upgraded_connection(world: World) -> None:
    await chatting(world, 1.0, 4.0)


@scenario("3.7", REVISION_RESPONSE_START_TIMEOUT_SECONDS="1")
async def the_response_start_timer_ends_an_upgraded_connection(world: World) -> None:
    await chatting(world, 1.0, 4.0)


@scenario("3.7", REVISION_IDLE_TIMEOUT_SECONDS="1")
async def the_idle_timer_ends_an_upgraded_connection(world: World) -> None:
    await chatting(world, 1.0, 4.0)
