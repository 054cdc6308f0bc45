"""When one of the sides breaks (contract section 3.12)."""

from __future__ import annotations

import asyncio
import contextlib

from tests.contract.scenario import scenario
from tests.contract.user import HELLO
from tests.contract.world import World
from tests.relay.rig import Closed, Peer, Request, die, get, post, request


@scenario("3.12")
async def nobody_listens_on_the_user_port(world: World) -> None:
    await world.user.stop()
    client = await world.client()
    await world.ask("GET", get("/"), client=client)
    await world.ask("POST", post("/", b"x" * 100), client=client)
    await world.ask("HEAD", request("HEAD", "/"), client=client)


@scenario("3.12")
async def the_user_container_closes_without_an_answer(world: World) -> None:
    world.user.on("/die", die)
    client = await world.client()
    await world.ask("GET", get("/die"), client=client)
    await world.ask("POST", post("/die", b"x"), client=client)


@scenario("3.12")
async def the_user_container_resets(world: World) -> None:
    async def reset(peer: Peer, _: Request) -> None:
        peer.reset()
        raise Closed

    world.user.on("/reset", reset)
    response = await world.client()
    await response.send(get("/reset"))
    answer = await response.response()
    world.note("status", answer.status)
    body = answer.body.decode()  # upstream names both ports, one of which is by chance
    world.note("what is said", body.rpartition("read: ")[2])


@scenario("3.8")
async def an_idempotent_request_on_a_stale_connection_is_sent_once_more(world: World) -> None:
    world.user.on("/die", die)
    client = await world.client()
    await world.ask("leaves a connection", get("/"), client=client)
    await world.ask("GET", get("/die"), client=client)
    world.note("asked", sum(request.path == "/die" for request in world.user.requests))
    await world.ask("leaves another", get("/"), client=client)
    await world.ask("POST", post("/die", b"x"), client=client)
    world.note("asked in all", sum(request.path == "/die" for request in world.user.requests))


@scenario("3.8")
async def a_POST_after_the_user_container_closed_an_idle_connection(world: World) -> None:
    """The race that gives POSTs a 502 upstream; here the close was long before."""

    async def answer_and_close(peer: Peer, _: Request) -> None:
        await peer.send(HELLO)
        peer.close()
        raise Closed

    world.user.on("/last", answer_and_close)
    client = await world.client()
    await world.ask("leaves a connection that is closed", get("/last"), client=client)
    await world.user.wait_for(lambda: world.user.open == 0)
    await asyncio.sleep(0.1)
    await world.ask("POST", post("/", b"x"), client=client)


@scenario("3.12")
async def the_user_container_dies_within_a_body_with_a_length(world: World) -> None:
    async def half(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 10\r\n\r\nabc")
        peer.close()
        raise Closed

    world.user.on("/half", half)
    await world.ask("answer", get("/half"))


@scenario("3.12")
async def the_user_container_dies_within_chunks(world: World) -> None:
    go_on = asyncio.Event()

    async def half(peer: Peer, _: Request) -> None:
        await peer.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3\r\nabc\r\n"
        )
        await go_on.wait()
        peer.close()
        raise Closed

    world.user.on("/half", half)
    client = await world.client()
    await client.send(get("/half"))
    world.note("status", (await client.head()).split(b"\r\n")[0])
    world.note("first chunk", await client.exactly(8))
    go_on.set()
    world.note("then", await client.rest())


@scenario("3.12")
async def the_user_container_says_broken_chunks(world: World) -> None:
    async def broken(peer: Peer, _: Request) -> None:
        await peer.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
        )

    world.user.on("/", broken)
    await world.ask("answer", get("/"))


@scenario("3.12")
async def a_client_that_leaves_ends_its_request(world: World) -> None:
    world.user.on("/hang", world.user.hang)
    client = await world.client()
    await client.send(get("/hang"))
    await world.user.received(1)
    client.reset()
    await world.user.left("/hang")
    await world.ask("the next", get("/"))


@scenario("3.12")
async def a_client_that_closes_in_order_ends_its_request_as_well(world: World) -> None:
    world.user.on("/hang", world.user.hang)
    client = await world.client()
    await client.send(get("/hang"))
    await world.user.received(1)
    client.close()
    await world.user.left("/hang")


@scenario("3.12")
async def a_client_that_leaves_within_a_response(world: World) -> None:
    async def forever(peer: Peer, got: Request) -> None:
        with contextlib.suppress(Closed, ConnectionError):
            await peer.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            while True:
                await peer.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        world.user.cut.append(got.path)
        raise Closed

    world.user.on("/forever", forever)
    client = await world.client()
    await client.send(get("/forever"))
    await client.exactly(100_000)
    client.reset()
    await world.user.left("/forever")
