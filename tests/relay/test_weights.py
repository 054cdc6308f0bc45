"""What the connections of a pod weigh, who is cut, and that a pause loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from tests.relay import h2rig
from tests.relay.h2pair import Gate, Pair
from tests.relay.rig import Hold, Rig, get, ok, post, request
from weir.proxy.wire import aside

MakeRig = Callable[..., Awaitable[Rig]]
MakePair = Callable[..., Awaitable[Pair]]
BIG = 20 << 20


def weight(made: Rig | Pair) -> int:
    return sum(made.relay.weigh().values())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def cut_all(made: Rig | Pair) -> None:
    for client in made.relay.weigh():
        client.cut()


async def test_a_head_that_is_not_whole_weighs_what_came_of_it_and_nothing_once_it_is_cut(
    rig: MakeRig,
) -> None:
    made = await rig()
    client = await made.client()
    await client.send(b"GET / HTTP/1.1\r\nX-A: " + b"x" * 500_000)
    await until(lambda: weight(made) > 500_000)
    cut_all(made)
    assert weight(made) == 0
    assert await client.closed()
    await made.settled(lambda: made.relay.connections == 0)


async def test_a_large_head_weighs_as_long_as_its_request_is_under_way(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/held", hold := Hold())
    client = await made.client()
    await client.send(get("/held", "X-A: " + "x" * 50_000))
    await made.user.received(1)
    assert weight(made) > 150_000
    hold.release()
    assert (await client.response()).status == 200
    await until(lambda: weight(made) < 20_000)


async def test_an_answer_that_is_not_read_weighs_and_a_cut_ends_it_on_both_sides(
    rig: MakeRig,
) -> None:
    made = await rig()
    made.user.on("/big", ok(b"x" * BIG))
    client = await made.client(receive_buffer=4096)
    await client.send(get("/big"))
    await until(lambda: weight(made) > 64 << 10)
    cut_all(made)
    await made.settled(lambda: not made.relay.connections and not made.relay.counters().in_flight)
    assert made.relay.counters().aborted == 1


async def test_a_body_that_nobody_reads_weighs(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/unread", Hold(), unread=True)
    client = await made.client()
    sending = asyncio.create_task(client.send(post("/unread", b"x" * BIG)))
    await until(lambda: weight(made) > 64 << 10)
    cut_all(made)
    await made.settled(lambda: not made.relay.counters().in_flight)
    sending.cancel()
    await asyncio.wait([sending])


async def test_a_body_that_waits_for_its_turn_weighs(rig: MakeRig) -> None:
    made = await rig(container_concurrency=1)
    made.user.on("/held", hold := Hold())
    first, second = await made.client(), await made.client()
    await first.send(get("/held"))
    await made.user.received(1)
    await second.send(request("POST", "/", f"Content-Length: {BIG}") + b"x" * 100_000)
    await until(lambda: weight(made) > 64 << 10)
    hold.release()


async def test_a_pause_loses_nothing_and_nothing_is_read_while_it_lasts(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/big", ok(b"x" * BIG))
    clients = [await made.client() for _ in range(4)]
    for client in clients[:2]:
        await client.send(get("/big"))
        await client.send(b"")
    for _ in range(5):
        made.relay.hold(True)
        made.relay.hold(True)
        await asyncio.sleep(0.01)
        made.relay.hold(False)
        await asyncio.sleep(0.01)
    made.relay.hold(True)
    waiting = [asyncio.create_task(client.get()) for client in clients[2:]]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in waiting)
    made.relay.hold(False)
    for task in waiting:
        assert (await task).status == 200
    for client in clients[:2]:
        assert len((await client.response()).body) == BIG
        assert (await client.get()).status == 200


async def test_streams_weigh_on_their_connection(pair: MakePair) -> None:
    made = await pair()
    made.user.on("/held", gate := Gate())
    client = await made.client()
    padding = ("x-a", "x" * 10_000)
    for stream in (1, 3, 5):
        client.ask(stream, h2rig.request("/held", "GET", padding))
    await until(lambda: gate.waiting == 3)
    (found,) = made.relay.weigh()
    assert made.relay.weigh()[found] > 3 * 30_000
    made.relay.hold(True)
    gate.open()
    await asyncio.sleep(0.05)
    made.relay.hold(False)
    for stream in (1, 3, 5):
        assert (await client.message(stream)).status == 200
    cut_all(made)
    assert weight(made) == 0
    await until(lambda: made.relay.connections == 0)


async def test_data_that_no_window_lets_through_weighs(pair: MakePair) -> None:
    made = await pair()

    async def big(speaker: h2rig.Speaker, stream: int, message: h2rig.Message) -> None:
        head = speaker.headers(stream, [(":status", "200")])
        pieces = [speaker.data(stream, b"x" * 16_000) for _ in range(4)]
        speaker.send(head, *pieces, speaker.data(stream, b"", True))

    made.user.on("/big", big)
    client = await made.client((4, 1000))  # SETTINGS_INITIAL_WINDOW_SIZE
    client.ask(1, h2rig.request("/big"))
    await until(lambda: weight(made) > 50_000)


@pytest.fixture
def looks() -> Iterator[list[int]]:
    """Grows by one with each megabyte that is put aside."""
    seen: list[int] = []
    aside.look_every(1 << 20, lambda: seen.append(1))
    yield seen
    aside.look_every(1 << 60, lambda: None)


async def test_what_waits_is_noticed_and_what_passes_is_not(rig: MakeRig, looks: list[int]) -> None:
    made = await rig()
    client = await made.client()
    for _ in range(100):
        assert (await client.ask(post("/", b"x" * 30_000))).status == 200
    assert not looks
    await client.send(b"GET / HTTP/1.1\r\nX-A: " + b"x" * 1_000_000)
    other = await made.client()
    await other.send(b"GET / HTTP/1.1\r\nX-A: " + b"x" * 1_000_000)
    await until(lambda: bool(looks))


async def test_a_relay_knows_its_own_connections(rig: MakeRig) -> None:
    made, other = await rig(), await rig()
    made.user.on("/held", hold := Hold())
    client = await made.client()
    await client.send(get("/held"))
    await made.user.received(1)
    connections = [*made.relay.clients, *made.relay._user._open]
    assert len(connections) == 2
    for connection in connections:
        assert made.relay.owns(connection)
        assert not other.relay.owns(connection)
    hold.release()
