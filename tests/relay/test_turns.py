"""One slice of work of a pod in each turn of the event loop, and nothing lost or out of order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tests.relay.h2pair import Pair
from tests.relay.h2rig import DATA, frame, request
from tests.relay.rig import Rig, post
from tests.relay.rig import request as head
from weir.proxy.wire.turns import SLICE, Turns

MakeRig = Callable[..., Awaitable[Rig]]
MakePair = Callable[..., Awaitable[Pair]]


class Work:
    """So many slices of it, each `cost` of a turn; `done` is the order of all."""

    def __init__(self, name: str, slices: int, done: list[str], cost: int = SLICE) -> None:
        self.name, self.slices, self.done, self.cost = name, slices, done, cost

    def go_on(self, turns: Turns) -> bool:
        self.done.append(self.name)
        self.slices -= 1
        turns.left -= self.cost
        return self.slices > 0


async def test_who_has_more_to_do_goes_behind_those_that_wait() -> None:
    turns, done = Turns(), list[str]()
    for name, slices in (("a", 3), ("b", 1), ("c", 2)):
        turns.wait(Work(name, slices, done))
    while turns.line:
        await asyncio.sleep(0)
    assert "".join(done) == "abcaca"


async def test_each_turn_of_the_loop_does_one_slice() -> None:
    turns, done = Turns(), list[str]()
    turns.wait(Work("a", 20, done))
    turns.wait(Work("b", 20, done))
    while turns.line:
        before = len(done)
        await asyncio.sleep(0)
        assert len(done) <= before + 1
    assert len(done) == 40


async def test_a_turn_has_room_for_all_whose_work_is_little() -> None:
    turns, done = Turns(), list[str]()
    for name in "abcdef":
        turns.wait(Work(name, 1, done, SLICE // 4))
    await asyncio.sleep(0)
    assert "".join(done) == "abcd"
    await asyncio.sleep(0)
    assert "".join(done) == "abcdef"
    assert not turns.line


async def test_a_slice_is_for_all_that_come_in_a_moment() -> None:
    turns = Turns()
    assert turns.look() == SLICE
    turns.left -= 1000
    assert turns.look() in (SLICE - 1000, SLICE)  # the loop's clock has milliseconds


async def test_a_body_in_chunks_of_a_byte_arrives_as_it_was_sent(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    body = bytes(range(32, 127)) * 400
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    await client.send(head("POST", "/", "Transfer-Encoding: chunked") + chunks)
    assert (await client.response()).status == 200
    assert made.user.requests[0].body == body
    assert (await client.get()).status == 200


async def test_requests_one_behind_the_other_are_answered_in_their_order(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    count = 1000
    sending = asyncio.create_task(
        client.send(b"".join(post(f"/{number}", b"x" * 50) for number in range(count)))
    )
    for _ in range(count):
        assert (await client.response()).status == 200
    await sending
    assert [each.path for each in made.user.requests] == [f"/{n}" for n in range(count)]


async def test_what_comes_behind_the_preface_is_not_lost_when_it_is_a_lot(pair: MakePair) -> None:
    made = await pair()
    client = await made.bare()
    client.begin()
    body = bytes(range(256)) * 20
    client.send(
        client.headers(1, request("/", "POST")),
        *[frame(DATA, 0, 1, bytes([byte])) for byte in body],
        frame(DATA, 1, 1),
    )
    got = await client.message(1)
    assert (got.status, got.body) == (200, body)
