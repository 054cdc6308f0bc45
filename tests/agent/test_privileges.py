"""What the supervisor must be allowed to do, and that it is no more (docs/agent.md)."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import pytest

from tests.agent.borrowed import Agent, HeldPod, closing
from tests.hold.rig import HOLD
from tests.hold.test_confined import SECCOMP
from tests.pods import needs_kernel, until

pytestmark = [
    needs_kernel,
    pytest.mark.skipif(not HOLD.exists(), reason="needs hold/weir-hold (make hold)"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)"),
]
NEEDED = {
    "sys_admin": "cannot enter",
    "net_admin": "no CAP_NET_ADMIN",
    "sys_ptrace": "CAP_SYS_PTRACE",
    "dac_read_search": "CAP_DAC_READ_SEARCH",
    "setuid": "no relay worker",
    "setgid": "no relay worker",
    "kill": "",  # only wedged workers need it
}
"""By what the pod's status says without it."""
CONFINED = (
    *("setpriv", "--reuid=65532", "--regid=65532", "--clear-groups"),
    *("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"),
)


def allowed(*capabilities: str) -> list[str]:
    added = ",".join(f"+{name}" for name in capabilities)
    return ["setpriv", f"--bounding-set=-all,{added}", "--inh-caps=-all"]


def test_seven_capabilities_are_enough(tmp_path: Path) -> None:
    with HeldPod(*CONFINED) as pod, closing(agent := Agent(tmp_path, pod, prefix=allowed(*NEEDED))):
        until(lambda: agent.workers, "the worker")
        pod.start_hold()
        agent.until_held().until_open()
        assert pod.get() == (200, b"hello")


MASKED = """
mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"
"""
"""As /proc/sys is in every container that is not privileged."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter is for x86-64")
def test_so_they_are_in_a_container_with_read_only_sysctls_and_the_default_seccomp_profile(
    tmp_path: Path,
) -> None:
    masked = ["unshare", "--mount", "sh", "-c", MASKED, "sh", *allowed(*NEEDED)]
    masked += [sys.executable, str(SECCOMP), "--capable"]
    with HeldPod(*CONFINED) as pod, closing(agent := Agent(tmp_path, pod, prefix=masked)):
        until(lambda: agent.workers, "the worker")
        pod.start_hold()
        agent.until_held().until_open()
        assert pod.get() == (200, b"hello")
        migrates = Path("/proc/sys/net/ipv4/tcp_migrate_req")
        assert pod.pod.call(migrates.read_text) == "1\n"
        status = Path(f"/proc/{agent.process.pid}/status").read_text()
        assert "Seccomp:\t2" in status


@pytest.mark.parametrize("missing", [name for name, reason in NEEDED.items() if reason])
def test_without_one_of_them_there_is_less_and_the_status_says_why(
    tmp_path: Path, missing: str
) -> None:
    rest = allowed(*(name for name in NEEDED if name != missing))
    with HeldPod(*CONFINED) as pod, closing(agent := Agent(tmp_path, pod, prefix=rest)):
        if not missing.startswith("set"):
            until(lambda: agent.workers, "the worker")
        pod.start_hold()
        if missing == "net_admin":  # for the direct path only
            agent.until_held()
            assert NEEDED[missing] in agent.pod()["direct"]["reason"]
        else:
            agent.until_reason(NEEDED[missing])
