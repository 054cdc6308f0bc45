"""Somebody else accepts from now on: clients are told between two requests, and none is cut."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tests.relay.h2pair import Gate, Pair
from tests.relay.h2rig import NO_ERROR, request
from tests.relay.rig import PATIENCE, Peer, Rig, get, ok

MakeRig = Callable[..., Awaitable[Rig]]
MakePair = Callable[..., Awaitable[Pair]]


async def test_the_answer_to_the_next_request_of_a_kept_connection_is_its_last(
    rig: MakeRig,
) -> None:
    made = await rig()
    made.user.on("/", ok(b"hello"))
    kept, fresh = await made.client(), await made.client()
    assert (await kept.get()).field("connection") is None
    async with asyncio.timeout(PATIENCE):
        while made.relay.connections < 2:
            await asyncio.sleep(0.002)
    made.relay.retire()
    for client in (kept, fresh):  # one that has not asked yet may still do so
        response = await client.get()
        assert (response.status, response.body) == (200, b"hello")
        assert response.field("connection") == "close"
        assert await client.closed()
    assert made.relay.connections == 0


async def test_a_request_in_flight_is_answered_as_if_nothing_were(rig: MakeRig) -> None:
    made = await rig()
    ready = asyncio.Event()

    async def slow(peer: Peer, _: object) -> None:
        await ready.wait()
        await peer.send(ok(b"hello"))

    made.user.on("/slow", slow)
    client = await made.client()
    await client.send(get("/slow"))
    await made.user.received(1)
    made.relay.retire()
    ready.set()
    response = await client.response()
    assert (response.body, response.field("connection")) == (b"hello", None)
    assert (await client.get("/slow")).field("connection") == "close"


async def test_a_client_of_http2_is_asked_to_go_and_what_is_on_its_way_is_served(
    pair: MakePair,
) -> None:
    made = await pair()
    gate = Gate()
    made.user.on("/slow", gate)
    client = await made.client()
    client.ask(1, request("/slow"))
    await made.user.received(1)
    made.relay.retire()
    await client.until(lambda: client.goaway is not None)
    assert client.goaway is not None
    assert (client.goaway.payload[:4], client.goaway.code) == (b"\x7f\xff\xff\xff", NO_ERROR)
    assert (await client.get(3)).status == 200
    gate.open()
    assert (await client.message(1)).body == b"held"
    await made.settled()
    made.relay.close_idle()
    await client.closed()


async def test_a_client_that_says_only_now_that_it_speaks_http2_is_asked_to_go_as_well(
    pair: MakePair,
) -> None:
    made = await pair()
    client = await made.bare()
    async with asyncio.timeout(PATIENCE):
        while made.relay.connections < 1:
            await asyncio.sleep(0.002)
    made.relay.retire()
    client.begin()
    assert (await client.get(1)).status == 200
    await client.until(lambda: client.goaway is not None)


async def test_who_goes_on_accepting_after_all_keeps_its_clients_again(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/", ok(b"hello"))
    made.relay.retire()
    made.relay.resume()
    client = await made.client()
    assert (await client.get()).field("connection") is None


async def test_only_what_has_been_in_flight_for_long_is_lasting(pair: MakePair) -> None:
    made = await pair()
    gate = Gate()
    made.user.on("/slow", gate)
    assert not made.relay.lasting(0.0)
    client = await made.client()
    client.ask(1, request("/slow"))
    await made.user.received(1)
    assert made.relay.lasting(0.0)
    assert not made.relay.lasting(1000.0)
    gate.open()
    await client.message(1)
    await made.settled()
    assert not made.relay.lasting(0.0)
