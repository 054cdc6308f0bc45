"""The supervisor against workers that are played by the test, and don't behave."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

import pytest

from tests.agent.played import Workers, tenancy, until
from weir.proxy import agent as agent_module
from weir.proxy import workers as workers_module
from weir.proxy.agent import Agent
from weir.proxy.contract import RevisionSettings
from weir.proxy.control import MAX_SAID
from weir.proxy.counters import PodCounters
from weir.proxy.kernel import AttachedPod
from weir.proxy.pod import PodSpec
from weir.proxy.served import ServedPod

NUMBERS = [field.name for field in fields(PodCounters) if field.name != "latency"]


@contextlib.asynccontextmanager
async def running(
    workers: Workers, pods: int = 1, namespace: Path | None = None
) -> AsyncIterator[tuple[Agent, asyncio.Event]]:
    """An agent with one worker for each of `pods` pods, named "0", "1", ..."""
    plain = PodSpec("", RevisionSettings(user_port=1), listen="127.0.0.1", data_port=0)
    specs = [replace(plain, name=str(number), netns=namespace) for number in range(pods)]
    agent, stop = Agent(specs, None, "no kernel here", workers=pods), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(agent.run(stop))
        await workers.count(pods)
        yield agent, stop
        stop.set()
        for number in range(pods):
            await until(agent, number, "draining", True)
            for word in ("closed", "released"):
                workers.all_say(op=word, pod=tenancy(number))


@pytest.mark.parametrize(
    "requests", ["NaN", "-Infinity", "1e300", "9" * 4000, '"many"', "null", "[1]", "-1"]
)
async def test_counters_that_can_not_be_summed_cost_neither_the_status_nor_the_next_worker(
    workers: Workers, requests: str
) -> None:
    async with running(workers) as (agent, _):
        for number in range(2):
            counters = f'{{"requests": {requests}, "integral": 1.5}}'
            workers.say(number, f'{{"op": "report", "pod": "0/1", "counters": {counters}}}')
            workers.say(number, '{"op": "ready", "pod": "0/1", "ready": true}')
            await until(agent, 0, "ready", True)
            json.dumps([*agent.snapshot()["pods"]], allow_nan=False)
            workers.ends[number].close()
            await workers.count(number + 2)
        assert next(agent.snapshot()["pods"])["relayed"] == {"requests": 0, "integral": 3.0}


async def test_a_worker_speaks_for_its_own_pods_only(workers: Workers) -> None:
    async with running(workers, pods=2) as (agent, _):
        for number in range(2):
            for pod in range(2):
                message = {"op": "ready", "pod": tenancy(pod), "ready": pod == number}
                workers.say(number, json.dumps(message))
        await until(agent, 1, "ready", True)
        await until(agent, 0, "ready", True)


async def test_a_worker_that_floods_is_replaced_and_the_other_goes_on(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(workers, pods=2) as (agent, _):
        report = '{"op": "report", "pod": "0/1", "counters": {"requests": 1}}'
        with contextlib.suppress(OSError):  # it is cut off while it talks
            while len(workers.ends) == 2:
                workers.say(0, report)
                await asyncio.sleep(0)
        await workers.count(3)
        assert "relay worker 0 talks too much" in caplog.messages
        await until(agent, 0, "worker_restarts", 1)
        for number in range(2):
            workers.all_say(op="ready", pod=tenancy(number), ready=True)
            await until(agent, number, "ready", True)


@pytest.mark.parametrize(
    "message",
    [
        "[]",
        "7",
        "null",
        '{"op": "report", "pod": {"a": 1}, "counters": []}',
        '{"op": "report", "pod": "0/1", "counters": {"latency": [NaN], "p50": {}}}',
        '{"op": "report", "pod": "0/1", "counters": {"latency": 1, "requests": true}}',
        '{"op": "ready", "pod": "no such/9", "ready": true}',
        '{"op": "ready", "pod": "0/1", "ready": "yes"}',
        '{"op": "released", "pod": "0/1"}',
        '{"op": "drained", "pod": "0/1"}',
        '{"op": "need", "pod": "0/1", "count": 1e400}',
        '{"op": "need", "pod": "0/1", "count": %s}' % ("9" * 4000),
        '{"op": ["adopt"], "pod": "0/1"}',
        "{" + '"a": {' * 3000,
        '"' + "x" * MAX_SAID + '"',
    ],
)
async def test_nonsense_of_a_worker_costs_at_most_that_worker(
    workers: Workers, message: str
) -> None:
    async with running(workers, pods=2) as (agent, _):
        workers.say(0, message)
        workers.say(1, f'{{"op": "ready", "pod": "{tenancy(1)}", "ready": true}}')
        await until(agent, 1, "ready", True)
        assert next(agent.snapshot()["pods"])["ready"] is False
        while not next(agent.snapshot()["pods"])["ready"]:
            workers.all_say(op="ready", pod="0/1", ready=True)
            await asyncio.sleep(0.005)
        assert [*agent.snapshot()["pods"]][1]["worker_restarts"] == 0
        json.dumps([*agent.snapshot()["pods"]], allow_nan=False)


async def test_a_worker_that_asks_for_sockets_without_end_is_replaced(
    workers: Workers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "SOCKETS_AT_ONCE", 500.0)
    monkeypatch.setattr(workers_module, "SOCKETS_PER_SECOND", 0.001)
    before = len(os.listdir("/proc/self/fd"))
    async with running(workers, namespace=Path("/proc/self/ns/net")):
        with contextlib.suppress(OSError):
            for _ in range(30):
                workers.say(0, '{"op": "need", "pod": "0/1", "count": 1e9}')
                workers.say(0, '{"op": "need", "pod": "0/1", "count": 64}')
                await asyncio.sleep(0)
        await workers.count(2)
        assert caplog.messages.count("relay worker 0 asks for too many sockets") == 1
    assert len(os.listdir("/proc/self/fd")) < before + 50


async def test_a_pod_whose_leases_never_end_is_not_borrowed_for_ever() -> None:
    pool = workers_module.Workers(0, lambda _: None)
    pods = [ServedPod(PodSpec(name, RevisionSettings(user_port=1)), None, "") for name in "ab"]
    for _ in range(workers_module.MAX_TENANCIES):
        assert not pool.crowded(pods[0])
        last = pool.adopt(pods[0])
    assert pool.crowded(pods[0])
    assert not pool.crowded(pods[1])
    await pool.vacate(last)
    assert not pool.crowded(pods[0])


async def test_a_worker_that_dies_before_it_is_told_to_release_does_not_hold_the_drain(
    workers: Workers,
) -> None:
    async with asyncio.timeout(agent_module.DRAIN_SECONDS / 2), running(workers) as (agent, stop):
        workers.say(0, '{"op": "ready", "pod": "0/1", "ready": true}')
        await until(agent, 0, "ready", True)
        workers.ends[0].close()
        await until(agent, 0, "worker_restarts", 1)
        stop.set()
        await until(agent, 0, "draining", True)


async def test_the_status_survives_a_pod_whose_namespace_went_away() -> None:
    class Orphan:
        """An attached pod that can no longer be looked into."""

        def steering(self) -> str:
            raise FileNotFoundError("/run/netns/gone")

        def counters(self) -> PodCounters:
            return PodCounters(**dict.fromkeys(NUMBERS, 0), latency=())

        def detach(self) -> None: ...

    pod = ServedPod(PodSpec("gone", RevisionSettings(user_port=1)), None, "")
    pod.attached = cast(AttachedPod, Orphan())
    assert pod.snapshot()["direct"]["steering"] == "none"
    pod.decide()
    assert "/run/netns/gone" in pod.snapshot()["direct"]["reason"]
