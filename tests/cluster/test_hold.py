"""Pods of a real Knative that carry weir-hold, with and without an agent on their node."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from tests.cluster.cluster import kubectl
from tests.cluster.nodeagent import Direct, agent_for, all_ended, holds, more, pod_cgroup
from tests.cluster.places import HOLD_IMAGE
from tests.cluster.service import NAMESPACE, Load, Service, until
from tests.cluster.test_service import CLASS, WITHOUT_ACTIVATOR
from weir.proxy import contract

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400), pytest.mark.usefixtures("hold")]

Make = Callable[..., Service]
ONE = {**WITHOUT_ACTIVATOR, f"{CLASS}/min-scale": "1"}
TWO = {**WITHOUT_ACTIVATOR, f"{CLASS}/min-scale": "2"}


async def test_without_an_agent_the_sidecar_takes_over_and_serves(
    service: Make, client: aiohttp.ClientSession
) -> None:
    alone = service(ONE)
    (pod,) = alone.pods()
    images = {one["name"]: one["image"] for one in pod["spec"]["containers"]}
    assert images["queue-proxy"] == HOLD_IMAGE
    assert (await alone.get(client))["version"] == "1"
    assert not holds(pod), "hold became the sidecar"


async def test_an_agent_takes_the_pod_over_from_its_sidecar_and_serves_both_ways(
    service: Make, client: aiohttp.ClientSession
) -> None:
    both = service(ONE)
    (pod,) = both.pods()
    name = pod["metadata"]["name"]
    async with Load(both, clients=4) as load:
        await until(lambda: load.answers["1"] > 20, "the sidecar answers")
        with agent_for(pod) as agent:
            await agent.until_open()
            assert holds(pod), "the sidecar is hold again, and lends"
            await until(lambda: agent.status()[name]["relayed"]["requests"] > 50, "it relays")
            async with Direct(pod) as direct:
                await until(lambda: direct.answers > 50, "the container answers directly")
            assert direct.failures == []
            await all_ended(agent, pod, direct.answers)
            answered = load.answers["1"]
            assert agent.stop() == 0
            await until(lambda: load.answers["1"] > answered + 20, "the sidecar answers again")
    assert load.failures == []
    assert both.restarts() == {"user-container": 0, "queue-proxy": 0}


async def test_a_container_that_starts_while_an_agent_is_there_becomes_ready_through_it(
    service: Make, client: aiohttp.ClientSession
) -> None:
    again = service(ONE)
    (pod,) = again.pods()
    name = pod["metadata"]["name"]
    with agent_for(pod) as agent:
        await agent.until_held()
        (pid,) = holds(pod)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: again.restarts()["queue-proxy"] == 1, "the kubelet restarts it")
        await agent.until_open()
        await until(again.ready_pods, "it is Ready")
        assert holds(pod)
        before = agent.status()[name]["relayed"]["requests"]
        assert (await _eventually(again, client))["pod"] == name
        await until(
            lambda: agent.status()[name]["relayed"]["requests"] > before, "it came through it"
        )
    assert again.restarts() == {"user-container": 0, "queue-proxy": 1}


async def test_the_autoscaler_believes_what_the_agent_says_of_direct_requests(
    service: Make,
) -> None:
    scaled = service({**ONE, f"{CLASS}/target": "2", f"{CLASS}/window": "6s"})
    (pod,) = scaled.pods()
    with agent_for(pod) as agent:
        await agent.until_open()
        async with Direct(pod, clients=6, path="/?seconds=0.5") as direct:
            await until(lambda: len(scaled.ready_pods()) >= 3, "three pods share six requests")
        assert direct.failures == []
        await until(lambda: len(scaled.pods()) == 1, "no request, one pod")


async def test_an_agent_that_is_killed_and_started_again_costs_no_request(
    service: Make,
) -> None:
    kept = service(ONE)
    (pod,) = kept.pods()
    with agent_for(pod) as agent:
        await agent.until_open()
        async with Load(kept, clients=4) as load, Direct(pod) as direct:
            for _ in range(5):
                await more(load, direct)
                agent.kill()
                await more(load, direct)  # by the sidecar, and in the kernel alone
                agent.start()
                await agent.until_open()
        assert load.failures == []
        assert direct.failures == []
        await all_ended(agent, pod, direct.answers)  # counted while no agent was there, too


async def test_a_pod_that_is_deleted_under_load_finishes_what_it_has_begun(
    service: Make, client: aiohttp.ClientSession
) -> None:
    deleted = service(TWO)
    await until(lambda: len(deleted.ready_pods()) == 2, "two pods are Ready")
    first, second = deleted.pods()
    name = first["metadata"]["name"]
    with agent_for(first, second) as agent:
        await agent.until_open()
        async with Load(deleted, clients=4, path="/?seconds=0.05") as load:
            await until(lambda: load.answers["1"] > 20, "both pods answer")
            async with Direct(first, clients=2, path="/?seconds=8", once=True) as direct:
                await until(
                    lambda: agent.status()[name]["direct"]["in_flight"] == 2, "they are begun"
                )
                delete = ("delete", "pod", "-n", NAMESPACE, name, "--wait=false")
                await asyncio.to_thread(kubectl, *delete)
                await until(lambda: not agent.status()[name]["direct"]["open"], "it drains")
                assert await _refuses(first), "nothing new comes directly"
            assert (direct.answers, direct.failures) == (2, [])
            await until(lambda: not pod_cgroup(first).exists(), "the pod is gone")
            answered = load.answers["1"]
            await until(lambda: load.answers["1"] > answered + 50, "requests go on")
        assert load.failures == []
        assert agent.status()[second["metadata"]["name"]]["direct"]["open"]


async def _eventually(service: Service, client: aiohttp.ClientSession) -> dict[str, Any]:
    """Ready pods are known to the node's rules a moment later."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(AssertionError, aiohttp.ClientError):
                return await service.get(client)
            await asyncio.sleep(0.1)


async def _refuses(pod: dict[str, Any]) -> bool:
    try:
        _, writer = await asyncio.open_connection(pod["status"]["podIP"], contract.DIRECT_PORT)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False
