"""Hold as a restricted pod runs it: process 1, no rights, default seccomp, a root to read only."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hold.rig import BY_SIDECAR, HOLD, ROOT, WEIR, Agent, HoldPod
from tests.pods import needs_pods, until
from tests.sidecar.pod import user_container
from tests.sidecar.test_process import CONFINE, REASON

pytestmark = [
    needs_pods,
    pytest.mark.skipif(not HOLD.exists(), reason="needs hold/weir-hold (make hold)"),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter is for x86-64"),
]
SECCOMP = Path(__file__).with_name("seccomp.py")


class Confined(HoldPod):
    """`process` is the one that made the namespaces; `inner` is process 1 of the container."""

    @property
    def inner(self) -> int:
        assert self.process is not None
        outer = self.process.pid
        children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        return int(children[0]) if children else 0

    def close(self) -> None:
        """Process 1 by hand: since it changed its user, the end of `unshare` is not its own."""
        if self.process is not None and self.process.poll() is None and (inner := self.inner):
            os.kill(inner, signal.SIGKILL)
        super().close()

    def inner_name(self) -> str:
        return Path(f"/proc/{self.inner}/comm").read_text().strip() if self.inner else ""

    def inner_status(self, name: str) -> str:
        lines = Path(f"/proc/{self.inner}/status").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:"))


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Confined]:
    root = tmp_path / "root"
    root.mkdir()
    needed = {Path(sys.base_prefix), Path(sys.prefix), Path(sys.prefix).resolve(), ROOT}
    paths = "\n".join(sorted(str(p) for p in needed if not p.is_relative_to("/usr")))
    space = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    command = [*space, str(CONFINE), str(root), paths, sys.executable, str(SECCOMP)]
    made = Confined()
    try:
        with user_container(made.place):
            made.start([*command, str(HOLD), *WEIR], PYTHONPATH=str(ROOT))
            until(lambda: made.running and made.place.accepts(8012), "hold listens")
            yield made
    finally:
        made.close()


@pytest.fixture
def agent(pod: Confined) -> Iterator[Agent]:
    until(lambda: pod.inner_name() == "weir-hold", "hold")
    made = Agent(pod, "one", pod.inner)
    yield made
    made.close()


def test_it_lends_fences_and_becomes_the_sidecar_and_hold_again(
    pod: Confined, agent: Agent
) -> None:
    agent.says("held")
    assert b"one" in pod.ask()
    assert pod.inner_status("NSpid").split()[-1] == "1"
    assert pod.inner_status("Uid").split() == ["65532"] * 4
    assert pod.inner_status("Seccomp") == "2"
    assert int(pod.inner_status("CapEff"), 16) == 0
    agent.process.kill()
    assert pod.ask().endswith(BY_SIDECAR)
    again = Agent(pod, "two", pod.inner)
    try:
        again.says("held")
        assert b"two" in pod.ask()
        assert pod.inner_name() == "weir-hold"
    finally:
        again.close()


def test_process_1_hears_sigterm_and_ends_when_the_agent_has_drained(
    pod: Confined, agent: Agent
) -> None:
    agent.says("held")
    subprocess.run(["kill", f"-{signal.SIGTERM.value}", str(pod.inner)], check=True)
    agent.says("drain")
    assert b"one" in pod.ask()
    agent.order("done")
    assert pod.exited() == 0
