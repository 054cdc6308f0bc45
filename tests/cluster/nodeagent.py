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

from tests.cluster import cluster
from tests.cluster.places import CGROUP, LOGS, REPOSITORY, RUN
from tests.cluster.service import until
from weir.proxy.cgroups import cgroup2_mount
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
        def held() -> bool:
            status = self.status()
            return all(name in status and status[name]["lease"] == "held" for name in self._names)

        await until(held, f"the agent borrows every pod ({LOGS / 'agent.log'})")

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
        assert self._enter is not None
        for pid in _children(self._enter.pid):
            os.kill(pid, signal.SIGTERM)
        status, self._enter = self._enter.wait(60), None
        return status


@contextlib.contextmanager
def agent_for(*pods: dict[str, Any]) -> Iterator[NodeAgent]:
    """Started; killed at the end, if it still runs, and what it pinned is removed."""
    agent = NodeAgent(*pods)
    agent.start()
    try:
        yield agent
    finally:
        agent.kill()
        subprocess.run([*cluster.enter(), "rm", "-rf", str(_pins())], check=True)


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
