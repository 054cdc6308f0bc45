"""What begins to listen is looked at at once: the kernel rings, the worker of that pod is told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.agent.played import Workers, tenancy, until
from tests.pods import Pod, needs_kernel
from weir.proxy.agent import Agent
from weir.proxy.contract import RevisionSettings
from weir.proxy.kernel import Kernel
from weir.proxy.pod import PodSpec
from weir.proxy.workers import Workers as RealWorkers

pytestmark = needs_kernel


async def test_the_worker_of_a_pod_that_is_not_ready_is_told_to_look(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []

    def tell(_: RealWorkers, pod: Any, message: dict[str, Any]) -> None:
        told.append((pod.spec.name, message["op"]))

    monkeypatch.setattr(RealWorkers, "tell", tell)
    kernel = Kernel.load()
    stop = asyncio.Event()
    with Pod() as first, Pod() as second:
        specs = [
            PodSpec(
                str(number),
                RevisionSettings(user_port=8080),
                netns=pod.netns,
                cgroup=pod.cgroup,
                addresses=pod.addresses,
            )
            for number, pod in enumerate((first, second))
        ]
        agent = Agent(specs, kernel, workers=2)
        try:
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                group.create_task(agent.run(stop))
                await workers.count(2)
                backend = second.backend()
                listener = backend.listen("::")
                while ("1", "look") not in told:
                    await asyncio.sleep(0.005)
                workers.all_say(op="ready", pod=tenancy(1), ready=True)
                while ("1", "offer") not in told:
                    await asyncio.sleep(0.005)
                told.clear()
                listener.close()
                backend.listen("::")  # ready already: nobody has to be asked
                first.backend().listen("::")
                while ("0", "look") not in told:
                    await asyncio.sleep(0.005)
                assert ("1", "look") not in told
                stop.set()
                for number in range(2):
                    await until(agent, number, "draining", True)
                    for word in ("closed", "released"):
                        workers.all_say(op=word, pod=tenancy(number))
        finally:
            kernel.close()
