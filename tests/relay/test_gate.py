"""A pod that has all the connections it may: who waits, who goes, and what is answered anyway."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.relay.certificates import make_pair
from tests.relay.podrig import HOOK, MakePod, Pod
from tests.relay.rig import Client, Hold, get, request
from weir.proxy.podserver import OTHER_CONNECTIONS, Role
from weir.proxy.policy.budget import Budget, Share
from weir.proxy.tls import TlsPort

MOST = 6


def six() -> Share:
    return Budget(8).share()


async def busy(made: Pod, count: int) -> Hold:
    """So many requests that are not answered yet, on connections of their own."""
    made.user.on("/held", hold := Hold())
    for _ in range(count):
        await (await made.client()).send(get("/held"))
    await made.user.received(count)
    return hold


async def closed(made: Pod) -> None:
    async with asyncio.timeout(20):
        while not made.server.gate(Role.DATA).closed:
            await asyncio.sleep(0.005)


async def test_connections_over_the_budget_wait_and_are_served_when_there_is_room(
    pod: MakePod,
) -> None:
    made = await pod(share=six())
    hold = await busy(made, MOST)
    await closed(made)
    assert made.server.closings == 1
    waiting = [await made.client() for _ in range(20)]
    for client in waiting:
        await client.send(get("/"))
    for role, path in ((Role.AUTOSCALER, "/metrics"), (Role.METRICS, "/metrics")):
        assert (await (await made.client(role)).get(path)).status == 200
    assert made.relay.connections == MOST
    hold.release(MOST)
    for client in waiting:
        assert (await client.response()).status == 200
        client.close()


async def test_a_budget_that_is_another_pods_makes_nobody_wait(pod: MakePod) -> None:
    budget = Budget(40)
    hungry, modest = await pod(share=budget.share()), await pod(share=budget.share())
    await busy(hungry, 20)
    await closed(hungry)
    clients = [await modest.client() for _ in range(10)]
    for client in clients:
        assert (await client.get()).status == 200


async def test_connections_that_are_not_used_make_room_the_longest_unused_first(
    pod: MakePod,
) -> None:
    made = await pod(share=six())
    clients = [await made.client() for _ in range(MOST - 1)]
    for client in clients:
        assert (await client.get()).status == 200
    used = asyncio.create_task(keep_asking(clients[0]))
    late = await made.client()
    assert (await late.get()).status == 200
    assert await clients[1].closed()
    for client in (*clients[2:], late):
        assert (await client.get()).status == 200
    used.cancel()
    with pytest.raises(asyncio.CancelledError):
        await used


async def keep_asking(client: Client) -> None:
    while True:
        assert (await client.get()).status == 200


async def test_who_connects_and_says_nothing_or_half_of_it_makes_room_after_a_second(
    pod: MakePod,
) -> None:
    made = await pod(share=six())
    silent = [await made.client() for _ in range(MOST // 2)]
    slow = [await made.client() for _ in range(MOST // 2)]
    for client in slow:
        await client.send(b"GET / HTTP/1.1\r\nHos")
    await closed(made)
    for _ in range(2 * MOST):
        client = await made.client()
        assert (await client.get()).status == 200
        client.close()
    assert await silent[0].closed()
    assert made.relay.connections <= MOST


async def test_who_has_just_connected_is_not_closed_however_full_it_is(pod: MakePod) -> None:
    made = await pod(share=six())
    await busy(made, MOST - 1)
    client = await made.client()
    await closed(made)
    await asyncio.sleep(0.2)  # several looks of the gate
    assert (await client.get()).status == 200


async def test_a_response_that_nobody_reads_is_not_taken_for_an_idle_connection(
    pod: MakePod,
) -> None:
    made = await pod(share=six())
    client = await made.client()
    size = 20 << 20
    await client.send(request("GET", f"/bytes/{size}"))
    made.user.on(
        f"/bytes/{size}", b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size
    )
    await busy(made, MOST - 2)
    late = await made.client()
    assert (await late.get()).status == 200
    assert len((await client.response()).body) == size


async def test_listeners_that_wait_are_closed_with_the_others(pod: MakePod) -> None:
    made = await pod(share=six())
    await busy(made, MOST)
    await closed(made)
    made.server.stop_listening()
    assert await made.refused()


async def test_a_port_of_the_kubelets_is_not_blocked_by_who_sits_on_it(pod: MakePod) -> None:
    made = await pod(share=six())
    idle = [await made.client(Role.ADMIN) for _ in range(3 * OTHER_CONNECTIONS)]
    assert (await (await made.client(Role.ADMIN)).get("/no-such-page")).status == 404
    await idle[0].closed()


async def test_drain_hooks_that_wait_hold_up_no_other_port(pod: MakePod) -> None:
    made = await pod(share=six(), quiet=300)
    for _ in range(2 * OTHER_CONNECTIONS):
        await (await made.client(Role.ADMIN)).send(HOOK)
    assert (await (await made.client(Role.AUTOSCALER)).get("/metrics")).status == 200
    assert (await (await made.client()).get()).status == 200


async def test_clients_that_never_shake_hands_make_room_after_a_second(
    pod: MakePod, tmp_path: Any
) -> None:
    made = await pod(share=six(), secure=TlsPort(folder=make_pair(tmp_path).folder))
    silent = [await made.client(Role.TLS) for _ in range(2 * MOST)]
    client = await made.client()
    assert (await client.get()).status == 200
    assert await silent[0].closed()
