"""`weir agent` on the node of the test cluster, with a description of pods that Knative made.

It runs where a DaemonSet with hostPID and hostNetwork would: in the node's PID, mount and network
namespaces, so that it sees processes as the kubelet does. Whatever happens, `down` ends it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster import cluster
from tests.cluster.places import CGROUP, LOGS, REPOSITORY, RUN
from tests.cluster.service import Clients, Load, until
from weir.proxy import contract
from weir.proxy.cgroups import cgroup2_mount
from weir.proxy.listeners import pids_of
from weir.proxy.wire.status import read_status

_PINS = RUN / "bpf"


def pod_cgroup(pod: dict[str, Any]) -> Path:
    """Where the kubelet puts the containers of this pod, in the hierarchy of version 2."""
    root = cgroup2_mount()
    assert root is not None
    quality = pod["status"]["qosClass"].lower()  # guaranteed pods have no folder of their class
    folder = root / CGROUP if quality == "guaranteed" else root / CGROUP / quality
    return folder / f"pod{pod['metadata']['uid']}"


class NodeAgent:
    """One agent for some pods, described once, as agent.md says. `close` it."""

    def __init__(self, *pods: dict[str, Any]) -> None:
        self._files = Path(tempfile.mkdtemp(prefix="agent-", dir=RUN))
        (self._files / "pods.json").write_text(json.dumps({"pods": [_described(p) for p in pods]}))
        self._names = [pod["metadata"]["name"] for pod in pods]
        self._enter: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        files = self._files
        with (LOGS / "agent.log").open("ab") as log:
            self._enter = subprocess.Popen(
                [
                    *cluster.enter(),
                    *(sys.executable, "-P", "-m", "weir", "agent", "--workers", "1"),
                    *("--pods", str(files / "pods.json"), "--status", str(files / "status")),
                    *("--pins", str(_pins())),
                ],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def status(self) -> dict[str, dict[str, Any]]:
        """Of each pod by its name. Nothing while no agent answers."""
        with contextlib.suppress(OSError, ValueError):
            return {pod["name"]: pod for pod in read_status(self._files / "status")["pods"]}
        return {}

    async def until_held(self) -> None:
        await self._until_lease("held")

    async def until_rung(self) -> None:
        """Until it waits for whoever has the pods."""
        await self._until_lease("rung")

    async def _until_lease(self, word: str) -> None:
        def so() -> bool:
            status = self.status()
            return all(name in status and word in status[name]["lease"] for name in self._names)

        await until(so, f"the lease of every pod says {word} ({LOGS / 'agent.log'})")

    async def until_open(self) -> None:
        def opened() -> bool:
            status = self.status()
            return all(name in status and status[name]["direct"]["open"] for name in self._names)

        await until(opened, f"every direct port opens ({LOGS / 'agent.log'})")

    def kill(self) -> None:
        """SIGKILL of the supervisor; its workers find out."""
        if self._enter is None:
            return
        for pid in _children(self._enter.pid):
            os.kill(pid, signal.SIGKILL)
        self._enter.wait(30)
        self._enter = None

    def stop(self) -> int:
        """What it exits with, after it drained."""
        self.end()
        return self.ended()

    def end(self) -> None:
        """SIGTERM; what is in flight goes on."""
        assert self._enter is not None
        for pid in _children(self._enter.pid):
            os.kill(pid, signal.SIGTERM)

    def ended(self) -> int:
        assert self._enter is not None
        status, self._enter = self._enter.wait(60), None
        return status

    def stand_still(self) -> None:
        """The supervisor, and then its workers."""
        self._signal_all(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._enter is not None
        os.kill(self._enter.pid, signal.SIGCONT)  # it stops with its child
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        assert self._enter is not None
        for supervisor in _children(self._enter.pid):
            for pid in (supervisor, *_children(supervisor)):
                os.kill(pid, number)


@contextlib.contextmanager
def agent_for(*pods: dict[str, Any]) -> Iterator[NodeAgent]:
    """Started; killed at the end, if it still runs, and what it pinned is removed."""
    try:
        with next_agent_for(*pods) as agent:
            yield agent
    finally:
        subprocess.run([*cluster.enter(), "rm", "-rf", str(_pins())], check=True)


@contextlib.contextmanager
def next_agent_for(*pods: dict[str, Any]) -> Iterator[NodeAgent]:
    """Beside another one, with the same pins, which stay for the other."""
    agent = NodeAgent(*pods)
    agent.start()
    try:
        yield agent
    finally:
        agent.kill()


class Direct(Clients):
    """Clients of a pod's direct port, each on one connection.

    Pods are asked from the machine, which for the node is another one.
    """

    def __init__(
        self, pod: dict[str, Any], clients: int = 2, path: str = "/", once: bool = False
    ) -> None:
        super().__init__(clients, once)
        self.answers = 0
        self._url = f"http://{pod['status']['podIP']}:{contract.DIRECT_PORT}{path}"

    async def ask(self, session: aiohttp.ClientSession) -> None:
        async with session.get(self._url) as response:
            await response.read()
            assert response.status == 200, response.status
        self.answers += 1


async def more(load: Load, direct: Direct) -> None:
    """Until both have had answers that were not there before."""
    at = load.answers["1"], direct.answers
    await until(
        lambda: load.answers["1"] > at[0] + 30 and direct.answers > at[1] + 30, "both ways answer"
    )


async def all_ended(agent: NodeAgent, pod: dict[str, Any], answers: int) -> None:
    """Until no direct request is left: as many have finished as were answered, none was cut off."""
    name = pod["metadata"]["name"]
    await until(lambda: not agent.status()[name]["direct"]["in_flight"], "all have ended")
    counted = agent.status()[name]["direct"]
    assert (counted["finished"], counted["aborted"]) == (answers, 0)


def holds(pod: dict[str, Any]) -> list[int]:
    """Processes of the pod that are weir-hold, by their numbers on this machine."""
    return [pid for pid in pids_of(pod_cgroup(pod)) if _command(pid) == "weir-hold"]


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):  # it has ended
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _described(pod: dict[str, Any]) -> dict[str, Any]:
    cgroup = str(pod_cgroup(pod))
    name = pod["metadata"]["name"]
    return {"name": name, "holdCgroup": cgroup, "cgroup": cgroup}


def _pins() -> Path:
    """A bpffs that only the node sees, and that goes with it."""
    if not _PINS.exists():
        _PINS.mkdir()
        mount = ("mount", "-n", "-t", "bpf", "bpf", str(_PINS))
        subprocess.run([*cluster.enter(), *mount], check=True)
    return _PINS / "weir"


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    return []
