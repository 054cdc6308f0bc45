"""containerConcurrency (contract 3.6): CC running, ten times as many waiting, then 503."""

import asyncio
from collections.abc import Awaitable, Callable

from tests.relay.rig import Client, Hold, Peer, Request, Rig, ok, request, without_date

MakeRig = Callable[..., Awaitable[Rig]]


async def busy(made: Rig, count: int) -> tuple[Hold, list[Client]]:
    """`count` clients with a request each, sent one after the other; the path is their number."""
    hold = Hold()
    clients = []
    for number in range(count):
        made.user.on(f"/{number}", hold)
        client = await made.client()
        await client.send(request("GET", f"/{number}"))
        await made.counted(number + 1)
        clients.append(client)
    return hold, clients


async def test_the_eleventh_waiter_of_a_limit_of_one_gets_503(rig: MakeRig) -> None:
    made = await rig(container_concurrency=1)
    hold, clients = await busy(made, 11)
    assert made.relay.counters().waiting == 10
    late = await made.client()
    response = await late.get("/late")
    assert without_date(response.head) == (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"X-Content-Type-Options: nosniff\r\nDate: -\r\nContent-Length: 27\r\n\r\n"
    )
    assert response.body == b"pending request queue full\n"
    assert made.relay.counters().requests == 12  # a refused request counts as one
    hold.release(11)
    assert [(await client.response()).body for client in clients] == [b"held"] * 11
    assert (await late.get("/")).status == 200


async def test_never_more_than_the_limit_at_the_user_container_and_first_come_first_served(
    rig: MakeRig,
) -> None:
    made = await rig(container_concurrency=2)
    hold, clients = await busy(made, 8)
    for served in range(8):
        await made.user.received(min(served + 2, 8))
        assert hold.waiting <= 2
        hold.release()
        await clients[served].response()
    # two are at the user container at a time, and which of those two it reads first is its own
    order = [int(got.path[1:]) for got in made.user.requests]
    assert all(abs(place - number) <= 1 for place, number in enumerate(order))


async def test_a_waiting_client_that_leaves_gives_its_turn_to_the_next(rig: MakeRig) -> None:
    made = await rig(container_concurrency=1)
    hold, clients = await busy(made, 3)
    clients[1].close()
    await made.settled(lambda: made.relay.counters().waiting == 1)
    hold.release(2)
    assert (await clients[0].response()).body == b"held"
    assert (await clients[2].response()).body == b"held"
    assert [got.path for got in made.user.requests] == ["/0", "/2"]


async def test_the_slot_is_held_until_a_streamed_body_has_ended(rig: MakeRig) -> None:
    made = await rig(container_concurrency=1)
    end = asyncio.Event()

    async def stream(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
        await end.wait()
        await peer.send(b"cd")

    made.user.on("/stream", stream)
    first, second = await made.client(), await made.client()
    await first.send(request("GET", "/stream"))
    assert (await first.head()).startswith(b"HTTP/1.1 200")
    await second.send(request("GET", "/"))
    await made.settled(lambda: made.relay.counters().waiting == 1)
    assert len(made.user.requests) == 1
    end.set()
    assert await first.exactly(4) == b"abcd"
    assert (await second.response()).status == 200


async def test_the_slot_of_a_timed_out_request_is_free_for_the_next(rig: MakeRig) -> None:
    made = await rig(container_concurrency=1, response_start_timeout=0.2)
    _, (first,) = await busy(made, 1)
    second = await made.client()
    await made.settled(lambda: made.relay.counters().in_flight == 1)
    assert (await first.response()).status == 504
    assert (await second.get("/after")).status == 200
    assert made.relay.counters().in_flight == 0


async def test_waiting_in_the_queue_counts_against_the_timeout(rig: MakeRig) -> None:
    made = await rig(container_concurrency=1, timeout=0.3)
    hold, clients = await busy(made, 2)
    assert [(await client.response()).status for client in clients] == [504, 504]
    assert made.relay.counters().waiting == 0
    hold.release(2)


async def test_concurrency_counts_waiting_requests_and_the_activators_share(rig: MakeRig) -> None:
    made = await rig(container_concurrency=1)
    hold, clients = await busy(made, 2)
    proxied = await made.client()
    await proxied.send(request("GET", "/", "K-Proxy-Request: activator"))
    await made.settled(lambda: made.relay.counters().in_flight == 3)
    report = made.relay.report()
    assert (report.count, report.count_proxied) == (3, 1)
    assert 0 < report.average <= 3
    hold.release(2)
    for client in (*clients, proxied):
        await client.response()
    counters = made.relay.counters()
    assert (counters.requests, counters.in_flight, counters.statuses) == (3, 0, (0, 3, 0, 0, 0))
    assert counters.integral > 0
    assert counters.quantile(0.5) > 0


async def test_a_status_of_no_known_class_passes_and_gives_its_slot_back(rig: MakeRig) -> None:
    made = await rig(container_concurrency=1)
    made.user.on("/odd", ok(b"denied", status="999 Request Denied"))
    client = await made.client()
    for _ in range(2):
        response = await client.get("/odd")
        assert (response.status, response.body) == (999, b"denied")
    assert made.relay.counters().statuses == (0, 0, 0, 0, 2)
    assert made.relay.counters().in_flight == 0
