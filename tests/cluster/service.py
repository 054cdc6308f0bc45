"""One Knative Service of a test: made, asked, looked at, deleted."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from tests.cluster.cluster import kubectl
from tests.cluster.places import NODE_ADDRESS, PUBLIC_DOMAIN, USER_IMAGE

NAMESPACE = "weir-e2e"


@dataclass
class Service:
    """A Service of the tests' user container. Names are used once."""

    name: str
    annotations: dict[str, str] = field(default_factory=dict)
    container: dict[str, Any] = field(default_factory=dict)

    def apply(self, version: str = "1") -> None:
        """Create it, or roll out `version`."""
        container = {
            "image": USER_IMAGE,
            "env": [{"name": "VERSION", "value": version}],
            **self.container,
        }
        template = {
            "metadata": {"annotations": self.annotations},
            "spec": {"containers": [container]},
        }
        service = {
            "apiVersion": "serving.knative.dev/v1",
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": NAMESPACE},
            "spec": {"template": template},
        }
        kubectl("apply", "-f", "-", stdin=json.dumps(service))

    def wait_ready(self) -> None:
        kubectl(
            *("wait", "-n", NAMESPACE, f"ksvc/{self.name}", "--for=condition=Ready"),
            "--timeout=90s",
        )

    def delete(self) -> None:
        kubectl("delete", "-n", NAMESPACE, "ksvc", self.name, "--wait=false")

    def pods(self) -> list[dict[str, Any]]:
        """Its pods that are not being deleted."""
        selector = f"serving.knative.dev/service={self.name}"
        listed = json.loads(kubectl("get", "pods", "-n", NAMESPACE, "-l", selector, "-o", "json"))
        return [pod for pod in listed["items"] if "deletionTimestamp" not in pod["metadata"]]

    def ready_pods(self) -> list[str]:
        return [
            pod["metadata"]["name"]
            for pod in self.pods()
            if all(status.get("ready") for status in pod["status"].get("containerStatuses", [{}]))
        ]

    def restarts(self) -> dict[str, int]:
        """Of each container of its only pod."""
        (pod,) = self.pods()
        return {
            status["name"]: status["restartCount"] for status in pod["status"]["containerStatuses"]
        }

    async def get(self, session: aiohttp.ClientSession, path: str = "/") -> dict[str, Any]:
        """What the user container says. Raises when the answer is not a 200."""
        host = f"{self.name}.{NAMESPACE}.{PUBLIC_DOMAIN}"
        async with session.get(f"http://{NODE_ADDRESS}{path}", headers={"Host": host}) as response:
            if response.status != 200:
                raise AssertionError(f"{response.status}: {await response.text()}")
            said: dict[str, Any] = await response.json()
            return said


class Clients:
    """`clients` tasks, each asking again as soon as it was answered; `once`: one request each.

    They begin with the block and end with it: each is answered what it has asked.
    """

    def __init__(self, clients: int, once: bool = False) -> None:
        self.failures: list[str] = []
        self._clients, self._once, self._over = clients, once, False

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._tasks = [asyncio.create_task(self._go_on()) for _ in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)
        await self._session.close()

    async def ask(self, session: aiohttp.ClientSession) -> None:
        """One request, counted. Raises when the answer is not a good one."""
        raise NotImplementedError

    async def _go_on(self) -> None:
        while not self._over:
            try:
                await self.ask(self._session)
            except (AssertionError, aiohttp.ClientError) as failure:
                self.failures.append(repr(failure))
                await asyncio.sleep(0.01)  # so that a closed port does not fill the list
            if self._once:
                return


class Load(Clients):
    """Clients of a Service."""

    def __init__(self, service: Service, clients: int, path: str = "/") -> None:
        super().__init__(clients)
        self.answers: Counter[str] = Counter()  # by version
        self._service, self._path = service, path

    async def ask(self, session: aiohttp.ClientSession) -> None:
        said = await self._service.get(session, self._path)
        self.answers[said["version"]] += 1


async def until(true: Callable[[], object], what: str, seconds: float = 100) -> None:
    """Wait for a condition that the cluster brings about, looking at it outside the loop."""
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(true):
        assert time.monotonic() < deadline, f"it did not come about in {seconds:.0f} s that {what}"
        await asyncio.sleep(0.3)
