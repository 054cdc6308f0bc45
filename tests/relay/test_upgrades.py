"""Upgraded connections (contract 3.10): a tunnel that counts as one request until it closes."""

from collections.abc import Awaitable, Callable

import pytest

from tests.relay.rig import Client, Closed, Peer, Request, Rig, ok, request

MakeRig = Callable[..., Awaitable[Rig]]

UPGRADE = request("GET", "/ws", "Connection: keep-alive, Upgrade", "Upgrade: echo")
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"


async def echo(peer: Peer, _: Request) -> None:
    await peer.send(SWITCHING)
    while piece := await peer.reader.read(65536):
        await peer.send(piece)
    peer.close()
    raise Closed


async def upgraded(made: Rig) -> Client:
    made.user.on("/ws", echo)
    client = await made.client()
    await client.send(UPGRADE)
    assert await client.head() == SWITCHING
    return client


async def test_bytes_pass_both_ways_and_the_request_counts_until_the_end(rig: MakeRig) -> None:
    made = await rig()
    client = await upgraded(made)
    (got,) = made.user.requests
    assert (got.field("connection"), got.field("upgrade")) == ("Upgrade", "echo")
    for word in (b"hello", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 1000):
        await client.send(word)
        assert await client.exactly(len(word)) == word
    counters = made.relay.counters()
    assert (counters.requests, counters.in_flight) == (1, 1)
    client.close()
    await made.settled(lambda: made.relay.counters().in_flight == 0)
    await made.user.wait_for(lambda: made.user.open == 0)
    assert made.relay.counters().statuses == (1, 0, 0, 0, 0)


async def test_what_the_client_sent_too_early_is_part_of_the_tunnel(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/ws", echo)
    client = await made.client()
    await client.send(UPGRADE + b"early")
    assert await client.head() == SWITCHING
    assert await client.exactly(5) == b"early"


async def test_what_the_user_container_sent_with_its_101_comes_behind_it(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/ws", SWITCHING + b"welcome")
    client = await made.client()
    await client.send(UPGRADE)
    assert await client.exactly(len(SWITCHING) + 7) == SWITCHING + b"welcome"


async def test_the_last_bytes_of_a_side_that_closes_arrive(rig: MakeRig) -> None:
    made = await rig()

    async def farewell(peer: Peer, _: Request) -> None:
        await peer.send(SWITCHING + b"x" * 300_000)
        peer.close()
        raise Closed

    made.user.on("/ws", farewell)
    client = await made.client()
    await client.send(UPGRADE)
    await client.head()
    assert len(await client.rest()) == 300_000
    assert made.relay.counters().in_flight == 0


async def test_an_upgraded_connection_holds_its_slot(rig: MakeRig) -> None:
    made = await rig(container_concurrency=1)
    client = await upgraded(made)
    second = await made.client()
    await second.send(request("GET", "/"))
    await made.settled(lambda: made.relay.counters().waiting == 1)
    client.close()
    assert (await second.response()).status == 200


async def test_an_upgrade_that_is_declined_is_an_ordinary_response(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/ws", ok(b"no", status="400 Bad Request"))
    client = await made.client()
    for _ in range(2):
        assert (await client.ask(UPGRADE)).body == b"no"


@pytest.mark.parametrize(
    ("data", "token"),
    [(UPGRADE, b"other"), (request("GET", "/ws"), b"echo")],
    ids=["another protocol", "nobody asked"],
)
async def test_a_101_for_what_was_not_asked_is_502(rig: MakeRig, data: bytes, token: bytes) -> None:
    made = await rig()
    made.user.on("/ws", SWITCHING.replace(b"echo", token))
    client = await made.client()
    response = await client.ask(data)
    assert response.status == 502
    assert response.body.startswith(b"backend tried to switch protocol ")
    await made.user.wait_for(lambda: made.user.open == 0)
