"""Pods that run in a sandbox or in a mesh are recognised, and left with the reason shown."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.agent.borrowed import Agent, HeldPod, closing
from tests.agent.odd import Containers, filled, refuses
from tests.contract.world import ENVIRONMENT
from tests.hold.rig import HOLD
from tests.pods import DIRECT_PORT, USER_PORT, Pod, needs_kernel, until
from weir.proxy import borrow, contract, holds, listeners, neighbours, netns, served
from weir.proxy.borrow import Borrower
from weir.proxy.kernel import Kernel
from weir.proxy.lease import NoHold
from weir.proxy.pod import PodSpec
from weir.proxy.served import ServedPod
from weir.proxy.workers import Workers

pytestmark = [
    needs_kernel,
    pytest.mark.skipif(not HOLD.exists(), reason="needs hold/weir-hold (make hold)"),
]


@pytest.fixture
def pod() -> Iterator[Pod]:
    with Pod() as made:
        yield made


def run_as(pod: Pod, name: str) -> int:
    """A process in the pod that is called so by whoever started it; its pid."""
    process = pod.run([name, "600"], executable="/bin/sleep")
    comm = Path(f"/proc/{process.pid}/comm")
    until(lambda: comm.read_text().strip() == "sleep", "it runs")
    return process.pid


def program(folder: Path, name: str) -> Path:
    """A program of that name, which does nothing."""
    return Path(shutil.copy("/bin/sleep", folder / name))


def borrowed(pod: Pod) -> PodSpec:
    settings = contract.RevisionSettings(user_port=0, pod=pod.name)
    return PodSpec(name=pod.name, settings=settings, cgroup=pod.cgroup, hold_cgroup=pod.cgroup)


# ---- sandboxes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("runsc-sandbox", "gVisor"),
        ("runsc-gofer", "gVisor"),
        ("containerd-shim-kata-v2", "Kata"),
        ("qemu-system-x86_64", "Kata"),
        ("qemu-system-aarch64", "Kata"),
        ("cloud-hypervisor", "Kata"),
        ("firecracker", "Kata"),
        ("virtiofsd", "Kata"),
    ],
)
def test_a_pod_in_a_sandbox_is_left_to_its_sidecar_whose_hold_can_not_be_seen(
    pod: Pod, tmp_path: Path, name: str, kind: str
) -> None:
    by_program = pod.run([program(tmp_path, name), "600"], cgroup=pod.nested_cgroup("sandbox"))
    with pytest.raises(holds.LeftToSidecar) as raised:
        until(lambda: holds.find(borrowed(pod)))
    assert "left to the sidecar: the pod runs in" in str(raised.value)
    assert kind in str(raised.value)
    assert f"{name}, pid {by_program.pid}" in str(raised.value)
    by_program.kill()
    by_program.wait()
    with pytest.raises(NoHold, match="no weir-hold found") as ended:
        holds.find(borrowed(pod))
    assert not isinstance(ended.value, holds.LeftToSidecar)


def test_gvisor_is_known_by_the_name_that_it_gives_itself(pod: Pod) -> None:
    pid = run_as(pod, "runsc-sandbox")
    with pytest.raises(holds.LeftToSidecar, match=f"gVisor: runsc-sandbox, pid {pid}$"):
        holds.find(borrowed(pod))


def test_the_agent_shows_the_sandbox_and_serves_its_other_pods(tmp_path: Path) -> None:
    class Sandboxed(HeldPod):
        def start_hold(self) -> None:
            run_as(self.pod, "runsc-sandbox")

    with Sandboxed() as odd, HeldPod() as even, closing(agent := Agent(tmp_path, odd, even)):
        agent.until_held(1).until_open(1)
        agent.until_reason("the pod runs in gVisor")
        assert "gVisor" in agent.pod(0)["direct"]["reason"]


class InGvisor(HeldPod):
    """Its hold runs in a real gVisor, without network: only what the node sees of it matters."""

    def start_hold(self) -> None:
        self.folder = Path(self._undo.enter_context(tempfile.TemporaryDirectory()))
        variables = {**ENVIRONMENT, "SERVING_POD_IP": self.address}
        config = {
            "ociVersion": "1.0.0",
            "root": {"path": "/", "readonly": True},
            "process": {
                "user": {"uid": 65532, "gid": 65532},
                "args": [str(HOLD), "/bin/sleep", "600"],
                "env": [f"{name}={value}" for name, value in variables.items()],
                "cwd": "/",
            },
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network"}]},
        }
        (self.folder / "config.json").write_text(json.dumps(config))
        runsc = ["runsc", "--root", str(self.folder), "--ignore-cgroups", "--network=none"]
        self.pod.run(
            [*runsc, "run", "--bundle", str(self.folder), self.pod.name],
            stdout=self._output,
            stderr=self._output,
        )


@pytest.mark.skipif(shutil.which("runsc") is None, reason="needs gVisor (Debian package runsc)")
def test_a_real_gvisor_is_recognised(tmp_path: Path) -> None:
    with (
        filled(Containers(), kind=InGvisor) as held,
        closing(agent := Agent(tmp_path, held)),
    ):
        agent.until_reason("the pod runs in gVisor")
        started = "runsc-sandbox"
        until(lambda: started in processes(held.pod), f"the sandbox: {held.said}")
        with pytest.raises(holds.LeftToSidecar, match="gVisor"):
            holds.find(borrowed(held.pod))
        assert "gVisor" in agent.pod()["lease"]


def processes(pod: Pod) -> set[str]:
    """What those of the pod were called by whoever started them."""
    found = set()
    for pid in listeners.pids_of(pod.cgroup):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            found.add(Path(line.split(b"\0")[0].decode()).name)
    return found


def test_a_hold_that_is_there_is_borrowed_whatever_runs_beside_it(tmp_path: Path) -> None:
    with filled(Containers()) as held, closing(agent := Agent(tmp_path, held)):
        run_as(held.pod, "qemu-system-x86_64")
        agent.until_held().until_open()


def test_a_hold_in_the_nodes_network_is_left_to_its_sidecar(tmp_path: Path) -> None:
    with subprocess.Popen([program(tmp_path, "weir-hold"), "600"], env=ENVIRONMENT) as process:
        try:
            spec = PodSpec(
                name="x", settings=contract.RevisionSettings(user_port=0), hold=process.pid
            )
            until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "weir-hold\n")
            with pytest.raises(holds.LeftToSidecar, match="hostNetwork"):
                holds.find(spec)
        finally:
            process.kill()


@pytest.mark.parametrize(("reason", "again"), [(NoHold, True), (holds.LeftToSidecar, False)])
async def test_a_pod_that_is_left_to_its_sidecar_is_looked_at_seldom(
    monkeypatch: pytest.MonkeyPatch, reason: type[NoHold], again: bool
) -> None:
    looks: list[PodSpec] = []

    def find(spec: PodSpec) -> None:
        looks.append(spec)
        raise reason("so it is")

    monkeypatch.setattr(holds, "find", find)
    monkeypatch.setattr(borrow, "LOOK_SECONDS", 0.0)
    spec = PodSpec(name="x", settings=contract.RevisionSettings(user_port=0), hold=1)
    pod = ServedPod(spec, None, "no kernel here")
    workers = cast("Workers", SimpleNamespace(pids=[1]))
    borrower = Borrower(pod, workers, lambda _: None, asyncio.Lock())
    running = asyncio.create_task(borrower.run())
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert (len(looks) > 1) is again
    assert "so it is" in pod.lease
    async with asyncio.timeout(5):  # the agent does not wait for the next look
        await borrower.stop(0.0)
        await running


# ---- meshes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("/usr/local/bin/pilot-agent", "Istio"),
        ("/usr/local/bin/envoy", "Envoy"),
        ("/usr/lib/linkerd/linkerd2-proxy", "Linkerd"),
        ("consul-dataplane", "Consul"),
        ("kuma-dp", "Kuma"),
    ],
)
def test_a_mesh_is_known_by_its_sidecar(pod: Pod, name: str, mesh: str) -> None:
    assert neighbours.mesh(pod.cgroup, pod.netns, USER_PORT) == ""
    pid = run_as(pod, name)
    found = f"{mesh}: {Path(name).name}, pid {pid}"
    assert neighbours.mesh(pod.cgroup, pod.netns, USER_PORT) == found


@pytest.mark.parametrize("port", [15001, 15006, 15008, 4140, 4143])
def test_a_mesh_of_the_node_is_known_by_its_listener_in_the_pod(pod: Pod, port: int) -> None:
    with netns.listen(pod.netns, "127.0.0.1", port):  # ours, which is no process of the pod
        assert f"port {port}" in neighbours.mesh(pod.cgroup, pod.netns, USER_PORT)
        assert neighbours.mesh(pod.cgroup, pod.netns, port) == "", "that is the function's own"


def test_a_pod_in_a_mesh_is_relayed_only_and_the_status_says_why(tmp_path: Path) -> None:
    with filled(Containers()) as held:
        pid = run_as(held.pod, "envoy")
        with closing(agent := Agent(tmp_path, held)):
            agent.until_held()
            until(lambda: agent.pod()["ready"], "ready")
            assert agent.pod()["direct"]["reason"] == (
                f"it is in a service mesh (Envoy: envoy, pid {pid})"
            )
            assert held.get() == (200, b"hello")
            assert refuses(held.address, DIRECT_PORT)


def test_a_pod_that_a_mesh_takes_in_is_closed_and_opened_again_when_it_leaves(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "MESH_LOOK_SECONDS", 0.0)
    settings = contract.RevisionSettings(user_port=USER_PORT, pod=pod.name)
    spec = PodSpec(
        name=pod.name,
        settings=settings,
        netns=pod.netns,
        cgroup=pod.cgroup,
        addresses=pod.addresses,
    )
    kernel = Kernel.load()
    try:
        one = ServedPod(spec, kernel, "")
        backend = pod.backend()
        backend.listen()
        one.ready = True
        assert one.decide()
        assert one.offer is not None
        with netns.listen(pod.netns, "::", 15008):
            assert one.decide()
            assert one.refused == "it is in a service mesh (Istio's ambient mode: port 15008)"
            assert refuses(pod.address, DIRECT_PORT)
        assert one.decide()
        assert one.offer is not None
        one.close()
    finally:
        kernel.close()


def test_a_mesh_is_looked_for_when_the_pod_becomes_ready_and_seldom_else(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def look(cgroup: Path, namespace: Path, user_port: int) -> str:
        looks.append(user_port)
        return ""

    monkeypatch.setattr(neighbours, "mesh", look)
    settings = contract.RevisionSettings(user_port=USER_PORT, pod=pod.name)
    kernel = Kernel.load()
    try:
        one = ServedPod(
            PodSpec(name=pod.name, settings=settings, netns=pod.netns, cgroup=pod.cgroup),
            kernel,
            "",
        )
        for ready, so_far in ((False, 1), (False, 1), (True, 2), (True, 2), (False, 2), (True, 3)):
            one.ready = ready
            one.decide()
            assert len(looks) == so_far
        one.close()
    finally:
        kernel.close()
