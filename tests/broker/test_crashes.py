"""Adaptor, broker and sink die in the middle of everything: no message may be lost.

The gate for both session kinds, beside the crash test in test_sessions. A message counts as safe
from the moment that the broker has acknowledged it to its publisher.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from pathlib import Path

import aiomqtt
import pytest

from tests.broker.harness import (
    QUICK,
    AdaptorProcess,
    Answer,
    Mosquitto,
    Request,
    Sink,
    adaptor,
    every_broker,
    every_window,
    held_by,
    one_route,
    properties,
    routes,
    until,
)
from weir.adaptor.service import client_id

both = pytest.mark.parametrize("version", ["5", "3.1.1"])


def distinct(sink: Sink) -> set[bytes]:
    return set(sink.bodies)


@every_window
async def test_a_sink_killed_in_the_middle_of_its_answers_gets_everything(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    many = [("plant/x", b"%d" % n) for n in range(300)]
    killed = 0

    async def script(_: Request) -> Answer:
        nonlocal killed
        if len(sink.requests) % 97 == 0 and killed < 3:
            killed += 1
            await sink.stop()
            asyncio.get_running_loop().call_later(0.1, revive)
        await asyncio.sleep(0.001)
        return Answer()

    revivals: list[asyncio.Task[None]] = []

    def revive() -> None:
        revivals.append(asyncio.create_task(sink.start()))

    sink.script = script
    async with adaptor(broker.url, one_route(sink), tmp_path, protocol=version) as running:
        await broker.publish(many)
        await until(lambda: len(distinct(sink)) == 300, "every event at least once")
        await until(lambda: running.sink(sink.url)["window"]["used"] == 0, "all acknowledged")
    assert killed == 3


@both
async def test_a_broker_killed_in_the_middle_of_a_window_loses_nothing_that_it_had_saved(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    """mosquitto saves on SIGUSR1 and at its end; SIGKILL takes it back to that state, in which
    messages are queued and in flight that the sink has seen meanwhile."""
    gate = asyncio.Event()
    sink.script = held_by(gate)
    many = [("plant/x", b"%d" % n) for n in range(100)]
    client = client_id("weir", sink.url)
    async with adaptor(
        broker.url, one_route(sink), tmp_path, protocol=version, receive_maximum=16
    ) as running:
        await broker.publish(many)
        await until(lambda: len(sink.requests) >= 16, "the window is full")
        await broker.save()
        gate.set()
        await until(lambda: len(broker.pubacks(client)) >= 30, "some are acknowledged")
        await broker.kill()
        await until(lambda: not running.sink(sink.url)["connected"], "the loss is seen")
        await broker.start()
        await running.connected()
        await until(lambda: len(distinct(sink)) == 100, "every event at least once")
        await until(lambda: running.sink(sink.url)["window"]["used"] == 0, "all acknowledged")
        await broker.publish([("plant/x", b"after")])
        await until(lambda: b"after" in sink.bodies, "and it goes on")


@every_broker
@both
async def test_two_adaptors_with_one_client_id_fight_and_lose_nothing(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    many = [("plant/x", b"%d" % n) for n in range(200)]

    async def script(_: Request) -> Answer:
        await asyncio.sleep(0.001)
        return Answer()

    sink.script = script
    (tmp_path / "other").mkdir()
    async with (
        adaptor(broker.url, one_route(sink), tmp_path, protocol=version) as one,
        adaptor(
            *(broker.url, one_route(sink), tmp_path / "other"), protocol=version, connected=False
        ) as other,
    ):
        both_ = (one, other)
        await until(lambda: sum(each.sink(sink.url)["reconnects"] for each in both_) >= 2, "fight")
        await broker.publish(many)
        await until(lambda: len(distinct(sink)) == 200, "every event at least once")


@both
async def test_adaptor_and_sink_killed_at_random_under_load_lose_nothing_and_keep_ids(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    chance = random.Random(7)
    options = ("--mqtt-version", version, "--receive-maximum", "32")
    text = one_route(sink)
    total = 600
    client = client_id("weir", sink.url)

    async def publish() -> None:
        async with aiomqtt.Client(
            "127.0.0.1", broker.port, protocol=aiomqtt.ProtocolVersion.V5
        ) as publisher:
            for number in range(total):
                given = properties(id=f"reading-{number}")
                await publisher.publish("plant/x", b"%d" % number, 1, properties=given)

    async with AdaptorProcess(broker.url, text, tmp_path, *options) as process:
        await until(lambda: broker.subscribed(client), "subscribed")
        publishing = asyncio.create_task(publish())
        for _ in range(4):
            goal = len(sink.taken) + chance.randrange(20, 80)
            with contextlib.suppress(AssertionError):
                await until(lambda: len(sink.taken) >= goal, "some more")  # noqa: B023
            if chance.random() < 0.5:
                await process.kill()
                await process.start()
            else:
                await sink.stop()
                await asyncio.sleep(chance.random() * 0.2)
                await sink.start()
        await publishing
        await until(lambda: len(distinct(sink)) == total, "every event at least once")
        assert await process.stop() == 0
    if version == "5":  # 3.1.1 brings no user properties, so the ids are minted anew
        ids: dict[bytes, set[str]] = {}
        for request in sink.requests:
            ids.setdefault(request.body, set()).add(request.id)
        assert all(found == {f"reading-{int(body)}"} for body, found in ids.items())


# --- replicas -------------------------------------------------------------------------------------


def shared(sink: Sink) -> str:
    return routes(f"name: all, filter: '$share/weir/plant/#', sink: '{sink.url}', {QUICK}")


@every_broker
@both
async def test_two_replicas_share_the_messages_and_none_is_delivered_twice(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    many = [("plant/x", b"%d" % n) for n in range(200)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    async with (
        adaptor(broker.url, shared(sink), tmp_path / "a", protocol=version, client_id="a") as a,
        adaptor(broker.url, shared(sink), tmp_path / "b", protocol=version, client_id="b") as b,
    ):
        await broker.publish(many)
        await until(lambda: len(distinct(sink)) == 200, "all arrive")
        shares = [each.route("all")["delivered"] for each in (a, b)]
    assert sum(shares) == 200 == len(sink.taken)
    assert min(shares) > 0
    assert max(Counter(sink.bodies).values()) == 1


@every_window
async def test_a_replica_that_is_killed_gets_its_share_when_it_is_back_and_nothing_is_lost(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    many = [("plant/x", b"%d" % n) for n in range(200)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()

    async def script(_: Request) -> Answer:
        await asyncio.sleep(0.002)
        return Answer()

    sink.script = script
    options = ("--mqtt-version", version, "--receive-maximum", "8", "--client-id")
    async with (
        AdaptorProcess(broker.url, shared(sink), tmp_path / "a", *options, "a") as a,
        AdaptorProcess(broker.url, shared(sink), tmp_path / "b", *options, "b") as b,
    ):
        for name in ("a", "b"):
            await until(lambda: broker.subscribed(client_id(name, sink.url)), "up")  # noqa: B023
        await broker.publish(many)
        await until(lambda: len(sink.taken) >= 20, "they are at it")
        await a.kill()
        await broker.publish([("plant/x", b"meanwhile %d" % n) for n in range(50)])
        await a.start()
        await until(lambda: len(distinct(sink)) == 250, "every event at least once")
        assert await a.stop() == 0
        assert await b.stop() == 0
