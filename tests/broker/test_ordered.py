"""`ordered`: the events of a topic, or of a key, one by one, whatever happens to one of them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker.harness import (
    QUICK,
    AdaptorProcess,
    Answer,
    Mosquitto,
    Request,
    Sink,
    adaptor,
    held_by,
    one_route,
    until,
)
from weir.adaptor.quarantine import Quarantine
from weir.adaptor.service import client_id

TOPICS = [f"plant/{letter}" for letter in "abcd"]
MANY = [(topic, b"%d" % n) for n in range(50) for topic in TOPICS]
EAGER = "delivery: {retry: 20, backoffDelay: PT0.001S}"


class Bookkeeper:
    """A sink that sees whether two events of one topic are there at once, and in which order they
    come; it answers as told by `choose`, after a while that differs."""

    def __init__(self, seed: int = 1, key: str = "ce-mqtttopic") -> None:
        self.chance = random.Random(seed)
        self.key = key
        self.taken: defaultdict[str, list[int]] = defaultdict(list)
        self.here: set[str] = set()
        self.together = 0
        self.most = 0
        self.failing = 0.0

    async def __call__(self, request: Request) -> Answer:
        key = request.headers[self.key]
        with self._present(key):
            await asyncio.sleep(self.chance.random() * 0.005)
            if self.chance.random() < self.failing:
                return Answer(500)
            self.taken[key].append(int(request.body))
            return Answer()

    @contextlib.contextmanager
    def _present(self, key: str) -> Iterator[None]:
        self.together += key in self.here
        self.here.add(key)
        self.most = max(self.most, len(self.here))
        yield
        self.here.discard(key)


@pytest.mark.parametrize("spool", ["", ", spool: always"])
async def test_events_of_a_topic_are_taken_in_order_though_many_fail_and_topics_do_not_wait(
    broker: Mosquitto, sink: Sink, tmp_path: Path, spool: str
) -> None:
    books = Bookkeeper()
    books.failing = 0.3
    sink.script = books
    async with adaptor(broker.url, one_route(sink, f"{EAGER}, ordered: true{spool}"), tmp_path):
        await broker.publish(MANY)
        await until(lambda: len(sink.taken) == 200, "all are taken")
    assert books.together == 0
    assert books.most > 1
    assert all(books.taken[topic] == list(range(50)) for topic in TOPICS)


async def test_without_it_some_overtake_others(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    """Or the test before proves nothing."""
    books = Bookkeeper()
    books.failing = 0.3
    sink.script = books
    async with adaptor(broker.url, one_route(sink, EAGER), tmp_path):
        await broker.publish(MANY)
        await until(lambda: len(sink.taken) == 200, "all are taken")
    assert books.together > 0
    assert any(books.taken[topic] != list(range(50)) for topic in TOPICS)


async def test_the_key_may_be_anything_that_a_template_says(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    books = Bookkeeper(key="ce-device")
    books.failing = 0.2
    sink.script = books
    more = f"{EAGER}, ordered: '{{level[2]}}', extensions: {{device: '{{level[2]}}'}}"
    text = one_route(sink, more).replace("plant/#", "plant/+/+")
    async with adaptor(broker.url, text, tmp_path):
        await broker.publish(
            [(f"plant/{n % 5}/{device}", b"%d" % n) for n in range(40) for device in "xyz"]
        )
        await until(lambda: len(sink.taken) == 120, "all are taken")
    assert books.together == 0
    assert all(books.taken[device] == list(range(40)) for device in "xyz")


async def test_an_event_that_is_given_up_lets_the_next_one_pass(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: Answer(422 if request.body == b"3" else 204)
    async with adaptor(broker.url, one_route(sink, f"{QUICK}, ordered: true"), tmp_path) as running:
        await broker.publish([("plant/a", b"%d" % n) for n in range(10)])
        await until(lambda: running.route("all")["delivered"] == 9, "the others are taken")
    assert [int(body) for body in sink.bodies] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert [held.event.data for held in Quarantine(tmp_path / "quarantine.db").events()] == [b"3"]


async def test_with_onfailure_block_none_passes_an_event_that_is_refused(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: Answer(422 if request.body == b"3" else 204)
    text = one_route(sink, f"{QUICK}, ordered: true, onFailure: block")
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish([("plant/a", b"%d" % n) for n in range(10)])
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "blocked")
        assert sink.bodies == [b"0", b"1", b"2"]
        sink.script = lambda request: Answer()
        await until(lambda: len(sink.taken) == 10, "all are taken")
    assert [int(body) for body in sink.bodies] == list(range(10))


async def test_order_is_kept_through_a_rate_and_a_concurrency(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    books = Bookkeeper()
    books.failing = 0.2
    sink.script = books
    text = one_route(sink, f"{EAGER}, ordered: true, rate: 2000, concurrency: 3")
    async with adaptor(broker.url, text, tmp_path):
        await broker.publish(MANY)
        await until(lambda: len(sink.taken) == 200, "all are taken")
    assert books.together == 0
    assert all(books.taken[topic] == list(range(50)) for topic in TOPICS)


async def test_order_is_kept_when_the_broker_goes_and_sends_again(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    books = Bookkeeper()
    sink.script = books
    async with adaptor(
        broker.url, one_route(sink, f"{EAGER}, ordered: true"), tmp_path, receive_maximum=20
    ) as running:
        await broker.publish(MANY)
        for goal in (40, 80, 120):
            await until(lambda: len(sink.taken) >= goal, "some more")  # noqa: B023
            await broker.stop()
            await broker.start()
            await running.connected()
        await until(lambda: {n for seen in books.taken.values() for n in seen} == set(range(50)),
                    "all are taken")  # fmt: skip
        await until(lambda: running.sink(sink.url)["window"]["used"] == 0, "all acknowledged")
    assert books.together == 0
    for topic in TOPICS:
        assert first_times(books.taken[topic]) == list(range(50))


@pytest.mark.parametrize("spool", ["", ", spool: always"])
async def test_after_a_sigkill_order_begins_again_where_it_was(
    broker: Mosquitto, sink: Sink, tmp_path: Path, spool: str
) -> None:
    """What was under way comes a second time; nothing comes for the first time before its turn."""
    books = Bookkeeper()
    sink.script = books
    text = one_route(sink, f"{EAGER}, ordered: true{spool}")
    client = client_id("weir", sink.url)
    async with AdaptorProcess(broker.url, text, tmp_path, "--receive-maximum", "20") as process:
        await until(lambda: broker.subscribed(client), "subscribed")
        await broker.publish(MANY)
        for goal in (30, 90):
            await until(lambda: len(sink.taken) >= goal, "some more")  # noqa: B023
            await process.kill()
            await process.start()
        await until(lambda: all(len(set(books.taken[t])) == 50 for t in TOPICS), "all are taken")
        await process.stop()
    for topic in TOPICS:
        assert first_times(books.taken[topic]) == list(range(50))


def first_times(numbers: list[int]) -> list[int]:
    return list(dict.fromkeys(numbers))


async def test_qos_0_events_keep_their_order_and_their_bound(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    sink.script = held_by(gate)
    text = one_route(sink, f"{QUICK}, qos: 0, ordered: true")
    async with adaptor(broker.url, text, tmp_path) as running:
        for start in range(0, 1500, 100):  # mosquitto lets QoS 0 go when a socket is full
            await broker.publish([("plant/a", b"%d" % n) for n in range(start, start + 100)], qos=0)
            await until(lambda: running.route("all")["received"] == start + 100, "in")  # noqa: B023
        gate.set()
        await until(lambda: running.route("all")["unacknowledged"] == 0, "none waits")
        overflowed = running.route("all")["overflowed"]
    taken = [int(body) for body in sink.bodies]
    assert taken == sorted(taken)
    assert overflowed + len(taken) == 1500
    assert overflowed >= 400
