"""What idle pods cost a node: weir-hold in each, and the agent that has borrowed them all.

100 pods (WEIR_BENCH_PODS), each a network namespace and a cgroup with a hold; the agent with one
worker, as it is in the image (`make compiled`); all of them ready and their direct ports open.
Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import load, sidecars
from bench.start import ENTER
from tests.contract.place import Place
from tests.contract.world import DATA, ENVIRONMENT, USER
from tests.kernel.bpffs import mounted
from weir.proxy.cgroups import cgroup2_mount
from weir.proxy.wire.status import read_status

HOLD = Path(__file__).parents[1] / "hold" / "weir-hold"
PATIENCE = 120.0
ALONE = 10
"""Pods whose apps begin to listen one by one."""
ASK = (
    b"GET / HTTP/1.1\r\nHost: pod\r\nUser-Agent: Knative-Activator-Probe (weir)\r\n"
    b"K-Network-Probe: weir\r\nConnection: close\r\n\r\n"
)
_libc = ctypes.CDLL(None, use_errno=True)


def measure(seconds: float) -> dict[str, float]:
    """Averages over `seconds` of idling, at least ten. Raises load.Missing, RuntimeError."""
    count = int(os.environ.get("WEIR_BENCH_PODS", "100"))
    if os.geteuid() != 0 or not HOLD.exists():
        raise load.Missing("needs root and hold/weir-hold (make hold)")
    with _pods(count) as (cgroups, places), _folder() as folder:
        missing = folder / "none"
        with _agent(folder, [{"name": "none", "holdCgroup": str(missing)}]) as status:
            alone = _agent_memory(status())
        holds = [_hold(*pod, n) for n, pod in enumerate(zip(places, cgroups, strict=True))]
        pods = [{"name": c.name, "holdCgroup": str(c), "cgroup": str(c)} for c in cgroups]
        with _agent(folder, pods) as status:
            _wait(lambda: _all(status(), lambda pod: pod["lease"] == "held"), "all are borrowed")
            with contextlib.ExitStack() as undo:
                one_by_one = []
                for pod in zip(places[:ALONE], cgroups[:ALONE], strict=True):
                    listening = undo.enter_context(_apps([pod]))
                    _wait(lambda place=pod[0]: _offered(place), "one is open", 0.0)  # type: ignore[misc]
                    one_by_one.append(time.monotonic() - listening)
                rest = list(zip(places[ALONE:], cgroups[ALONE:], strict=True))
                listening = undo.enter_context(_apps(rest))
                _wait(lambda: _all(status(), lambda pod: pod["direct"]["open"]), "all are open")
                opened = time.monotonic() - listening
                found = _idle(status(), [hold.pid for hold in holds], max(seconds, 10.0))
                memory = _agent_memory(status())
        for hold in holds:
            hold.kill()
            hold.wait()
    share = (memory - alone) / count
    return found | {
        "agent alone, private MB": alone,
        f"agent with {count} pods, private MB": memory,
        "a pod: the agent's share, private KB": share * 1e3,
        "a pod: hold and share, private KB": share * 1e3 + found["hold, private KB"],
        f"a pod: open after its app listened, ms (median of {ALONE})": statistics.median(one_by_one)
        * 1e3,
        f"the other {count - ALONE}, which listened at once: all open after, ms": opened * 1e3,
    }


def _idle(status: dict[str, Any], holds: list[int], seconds: float) -> dict[str, float]:
    agent = [status["supervisor"], *status["workers"]]
    before = {pid: sidecars.cpu_seconds(pid) for pid in (*agent, *holds)}
    begun = time.monotonic()
    time.sleep(seconds)
    spent = {pid: sidecars.cpu_seconds(pid) - cpu for pid, cpu in before.items()}
    over = time.monotonic() - begun
    memory = [sidecars.memory(pid) for pid in holds]
    return {
        "hold, private KB": statistics.mean(private for private, _ in memory) * 1e3,
        "hold, resident KB": statistics.mean(resident for _, resident in memory) * 1e3,
        "hold, CPU us/s": statistics.mean(spent[pid] for pid in holds) / over * 1e6,
        "supervisor, % of a core": spent[agent[0]] / over * 100,
        "worker, % of a core": sum(spent[pid] for pid in agent[1:]) / over * 100,
    }


def _agent_memory(status: dict[str, Any]) -> float:
    return sum(sidecars.memory(pid)[0] for pid in (status["supervisor"], *status["workers"]))


def _all(status: dict[str, Any], holds: Callable[[dict[str, Any]], bool]) -> bool:
    return all(holds(pod) for pod in status["pods"])


def _offered(place: Place) -> bool:
    """Does the pod tell callers that it may be called directly?"""
    with place.socket() as sock:
        sock.settimeout(PATIENCE)
        sock.connect(("127.0.0.1", DATA))
        sock.sendall(ASK)
        return b"\r\nweir-direct: " in sock.recv(4096).lower()


def _wait(condition: Callable[[], bool], what: str, pause: float = 0.05) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"never happened: {what}")
        time.sleep(pause)


# ---- what is measured ---------------------------------------------------------------------------


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """With a bpffs in it, since agents pin what they attach."""
    with tempfile.TemporaryDirectory() as name:
        at = Path(name, "bpf")
        at.mkdir()
        with mounted(at):
            yield Path(name)


@contextlib.contextmanager
def _pods(count: int) -> Iterator[tuple[list[Path], list[Place]]]:
    mount = cgroup2_mount()
    if mount is None:
        raise load.Missing("needs a cgroup v2 mount")
    parent = mount / f"weirb-{os.getpid()}"
    cgroups = [parent / f"pod{number}" for number in range(count)]
    places: list[Place] = []
    try:
        for cgroup in cgroups:
            cgroup.mkdir(parents=True)
            places.append(Place())
        yield cgroups, places
    finally:
        for place in places:
            place.close()
        for folder in (*cgroups, parent):
            if folder.exists():
                _end(folder)


def _end(folder: Path) -> None:
    kill = folder / "cgroup.kill"
    if kill.exists():
        kill.write_text("1")
    _wait(lambda: not (folder / "cgroup.procs").read_text(), f"{folder} is empty")
    folder.rmdir()


def _hold(place: Place, cgroup: Path, number: int) -> subprocess.Popen[bytes]:
    environment = {
        **ENVIRONMENT,
        "SERVING_POD": cgroup.name,
        "SERVING_POD_IP": f"10.{number >> 8 & 255}.{number & 255}.2",
    }
    procs = str(cgroup / "cgroup.procs")
    # its sidecar is itself, again and again: however long the agent takes to come, it finds a hold
    return place.start(["/bin/sh", "-c", ENTER, procs, *[str(HOLD)] * 100], env=environment)


@contextlib.contextmanager
def _agent(folder: Path, pods: list[dict[str, str]]) -> Iterator[Callable[[], dict[str, Any]]]:
    socket_, file, pins = folder / "agent.sock", folder / "pods.json", folder / "bpf" / "weir"
    file.write_text(json.dumps({"pods": pods}))
    where = ("--pods", str(file), "--status", str(socket_), "--pins", str(pins))
    command = sidecars.agent_command(*where)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def status() -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return read_status(socket_)
        return {"workers": [], "pods": [], "supervisor": process.pid}

    try:
        _wait(lambda: bool(status()["workers"]), "the agent's worker serves")
        yield status
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _apps(pods: list[tuple[Place, Path]]) -> Iterator[float]:
    """One process that listens in every pod, as a member of its cgroup each time; since when."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            listening: list[socket.socket] = []
            for place, cgroup in pods:
                (cgroup / "cgroup.procs").write_text("0")
                listening.append(place.listen(USER))
            os.write(theirs, struct.pack("<d", time.monotonic()))
            while True:
                time.sleep(3600)
        finally:
            os._exit(1)
    try:
        (since,) = struct.unpack("<d", os.read(ours, 8))
        yield since
    finally:
        os.close(ours)
        os.close(theirs)
        os.kill(child, 9)
        os.waitpid(child, 0)
