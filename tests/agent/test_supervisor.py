"""The supervisor against workers that are played by the test, and don't behave."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import fields
from typing import Any, cast

import pytest

from weir.proxy import agent as agent_module
from weir.proxy import workers as workers_module
from weir.proxy.agent import Agent
from weir.proxy.contract import RevisionSettings
from weir.proxy.control import Channel
from weir.proxy.counters import PodCounters
from weir.proxy.kernel import AttachedPod
from weir.proxy.pod import PodSpec
from weir.proxy.served import ServedPod
from weir.proxy.workers import WorkerProcess

NUMBERS = [field.name for field in fields(PodCounters) if field.name != "latency"]


class Workers:
    """Our ends of the channels of the workers that the supervisor started, oldest first."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []

    async def count(self, wanted: int) -> None:
        async with asyncio.timeout(20):
            while len(self.ends) < wanted:
                await asyncio.sleep(0.005)

    def say(self, number: int, text: str) -> None:
        self.ends[number].send(text.encode())


@pytest.fixture
async def workers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Workers]:
    made = Workers()

    async def start(self: WorkerProcess) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.ends.append(theirs)
        self._channel = Channel(ours, self._message, self._gone)

    monkeypatch.setattr(WorkerProcess, "start", start)
    monkeypatch.setattr(workers_module, "RESTART_SECONDS", 0.1)
    yield made
    for end in made.ends:
        end.close()


@contextlib.asynccontextmanager
async def running(workers: Workers, pods: int = 1) -> AsyncIterator[tuple[Agent, asyncio.Event]]:
    """An agent with one worker for each of `pods` pods, named "0", "1", ..."""
    specs = [
        PodSpec(str(number), RevisionSettings(user_port=1), listen="127.0.0.1", data_port=0)
        for number in range(pods)
    ]
    agent, stop = Agent(specs, None, "no kernel here", workers=pods), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(agent.run(stop))
        await workers.count(pods)
        yield agent, stop
        stop.set()
        for number in range(pods):
            await until(agent, number, "draining", True)
            for word in ("closed", "released"):
                with contextlib.suppress(OSError):
                    workers.say(number - pods, json.dumps({"op": word, "pod": tenancy(number)}))


def tenancy(number: int) -> str:
    return f"{number}/{number + 1}"


async def until(agent: Agent, number: int, name: str, value: Any) -> None:
    async with asyncio.timeout(20):
        while agent.snapshot()["pods"][number][name] != value:
            await asyncio.sleep(0.005)


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
            json.dumps(agent.snapshot(), allow_nan=False)
            workers.ends[number].close()
            await workers.count(number + 2)
        assert agent.snapshot()["pods"][0]["relayed"] == {"requests": 0, "integral": 3.0}


async def test_a_worker_speaks_for_its_own_pods_only(workers: Workers) -> None:
    async with running(workers, pods=2) as (agent, _):
        for number in range(2):
            for pod in range(2):
                message = {"op": "ready", "pod": tenancy(pod), "ready": pod == number}
                workers.say(number, json.dumps(message))
        await until(agent, 1, "ready", True)
        await until(agent, 0, "ready", True)


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
