"""The cluster the tests run in: `make e2e-smoke` starts it, loads the images and says so."""

import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiohttp
import pytest

from tests.cluster import cluster
from tests.cluster.places import HOLD_IMAGE, REPOSITORY, SIDECAR_IMAGE
from tests.cluster.service import NAMESPACE, Service

OVERLAY = REPOSITORY / "manifests" / "overlays" / "sidecar"
_numbers = itertools.count(os.getpid() * 100)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cluster: needs the test cluster (make e2e-smoke)")


@pytest.fixture(scope="session")
def sidecar_image() -> str:
    """What the queue-proxy of every pod has to be; WEIR_CLUSTER_SIDECAR names another one."""
    return os.environ.get("WEIR_CLUSTER_SIDECAR", SIDECAR_IMAGE)


@pytest.fixture(scope="session", autouse=True)
def knative(sidecar_image: str) -> Iterator[None]:
    if os.environ.get("WEIR_CLUSTER") != "1":
        pytest.skip("no test cluster: make e2e-smoke (needs root and Go; the first build: 6 min)")
    if not cluster.is_up():
        pytest.fail("WEIR_CLUSTER=1, but the cluster is not up: make e2e-up")
    if sidecar_image == SIDECAR_IMAGE:
        cluster.kubectl("apply", "-k", str(OVERLAY))
    else:
        cluster.configure("config-deployment", {"queue-sidecar-image": sidecar_image})
    cluster.configure("config-autoscaler", {"scale-to-zero-grace-period": "6s"})
    namespace = cluster.kubectl("create", "namespace", NAMESPACE, "--dry-run=client", "-o", "yaml")
    cluster.kubectl("apply", "-f", "-", stdin=namespace)
    yield


@pytest.fixture(scope="module")
def hold(knative: None, sidecar_image: str) -> Iterator[None]:
    """Pods made meanwhile carry weir-hold."""
    if sidecar_image != SIDECAR_IMAGE:
        pytest.skip("another sidecar is asked for, and this is about weir-hold")
    cluster.configure("config-deployment", {"queue-sidecar-image": HOLD_IMAGE})
    yield
    cluster.configure("config-deployment", {"queue-sidecar-image": sidecar_image})


@pytest.fixture
def service() -> Iterator[Callable[..., Service]]:
    """Makes Services: `service(annotations, **fields of the user container)`, Ready at return."""
    made: list[Service] = []

    def make(annotations: dict[str, str] | None = None, **container: Any) -> Service:
        new = Service(f"user-{next(_numbers)}", annotations or {}, container)
        made.append(new)
        new.apply()
        new.wait_ready()
        return new

    yield make
    for each in made:
        each.delete()


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session
