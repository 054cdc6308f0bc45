"""A Knative Service whose queue-proxy is `weir sidecar`, in a real Knative (contract 2 to 6)."""

import asyncio
import struct
import urllib.request
from collections.abc import Callable

import aiohttp
import pytest

from tests.cluster.cluster import kubectl
from tests.cluster.service import NAMESPACE, Load, Service, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

Make = Callable[..., Service]
CLASS = "autoscaling.knative.dev"
WITHOUT_ACTIVATOR = {f"{CLASS}/target-burst-capacity": "0"}
"""The activator leaves the path as soon as a pod is ready: then only sidecars know the load."""


async def test_it_becomes_ready_and_answers_through_the_activator(
    service: Make, client: aiohttp.ClientSession, sidecar_image: str
) -> None:
    hello = service()
    said = await hello.get(client)
    headers = said["headers"]
    assert headers["k-proxy-request"] == "activator"
    assert headers["host"] == f"{hello.name}.{NAMESPACE}.example.com"
    assert headers["forwarded"].startswith("for=") and "proto=http" in headers["forwarded"]
    assert not {"k-original-host", "knative-serving-revision"} & headers.keys()
    (pod,) = hello.pods()
    images = {one["name"]: one["image"] for one in pod["spec"]["containers"]}
    assert images["queue-proxy"] == sidecar_image


async def test_it_answers_without_the_activator(
    service: Make, client: aiohttp.ClientSession
) -> None:
    hello = service({**WITHOUT_ACTIVATOR, f"{CLASS}/min-scale": "1"})

    async def directly() -> bool:
        return "k-proxy-request" not in (await hello.get(client))["headers"]

    async with asyncio.timeout(60):
        while not await directly():
            await asyncio.sleep(0.3)


async def test_the_sidecars_numbers_scale_it_to_several_pods_to_zero_and_back(
    service: Make, client: aiohttp.ClientSession
) -> None:
    scaled = service({**WITHOUT_ACTIVATOR, f"{CLASS}/target": "2", f"{CLASS}/window": "6s"})
    async with Load(scaled, clients=6, path="/?seconds=0.5") as load:
        await until(lambda: len(scaled.ready_pods()) >= 3, "three pods share six requests")
    assert load.failures == []
    await until(lambda: not scaled.pods(), "no request, no pod")
    assert (await scaled.get(client))["version"] == "1"
    assert len(scaled.pods()) >= 1


async def test_a_rollout_fails_no_request(service: Make) -> None:
    rolled = service({**WITHOUT_ACTIVATOR, f"{CLASS}/min-scale": "2"})
    old = set(rolled.ready_pods())
    async with Load(rolled, clients=4, path="/?seconds=0.05") as load:
        await until(lambda: load.answers["1"] > 20, "the first version answers")
        await asyncio.to_thread(rolled.apply, "2")
        await until(lambda: load.answers["2"] > 20, "the second version answers")
        await until(
            lambda: not old & {pod["metadata"]["name"] for pod in rolled.pods()},
            "the first version's pods are told to end",
        )
        after = load.answers["2"]
        await until(lambda: load.answers["2"] > after + 50, "requests go on")
    assert load.failures == []


async def test_a_deleted_pod_finishes_what_it_has_begun(
    service: Make, client: aiohttp.ClientSession
) -> None:
    deleted = service({**WITHOUT_ACTIVATOR, f"{CLASS}/min-scale": "1"})
    (before,) = deleted.ready_pods()
    request = asyncio.create_task(deleted.get(client, "/?seconds=8"))
    (address,) = (pod["status"]["podIP"] for pod in deleted.pods())
    await until(lambda: _concurrency(address) > 0, "its sidecar reports the request")
    await asyncio.to_thread(kubectl, "delete", "pod", "-n", NAMESPACE, before, "--wait=false")
    assert (await request)["pod"] == before


async def test_liveness_restarts_the_user_container_and_only_that(
    service: Make, client: aiohttp.ClientSession
) -> None:
    probe = {"httpGet": {"path": "/alive"}, "periodSeconds": 1, "failureThreshold": 2}
    sick = service({f"{CLASS}/min-scale": "1"}, livenessProbe=probe)
    assert sick.restarts() == {"user-container": 0, "queue-proxy": 0}
    await sick.get(client, "/die")
    await until(lambda: sick.restarts()["user-container"] == 1, "the kubelet restarts it")
    async with asyncio.timeout(30):
        while not await _answers(sick, client):  # started is not listening yet
            await asyncio.sleep(0.1)
    assert sick.restarts() == {"user-container": 1, "queue-proxy": 0}


async def _answers(service: Service, client: aiohttp.ClientSession) -> bool:
    try:
        return bool(await service.get(client))
    except AssertionError:
        return False


def _concurrency(pod: str) -> float:
    """Field 2 of what a pod's sidecar tells the autoscaler (contract 5.1); zero is left out."""
    with urllib.request.urlopen(f"http://{pod}:9090/metrics", timeout=5) as response:
        body: bytes = response.read()
    rest = body[2 + body[1] :]  # behind the pod's name
    return float(struct.unpack_from("<d", rest, 1)[0]) if rest[:1] == b"\x11" else 0.0
