"""Yama and AppArmor in front of the agent, as docs/agent.md says it of them.

Not collected by itself: it is for a guest of tests/machine, whose kernel has both and is thrown
away (`python -m tests.machine 6.12 -- tests/machine/security.py`). Yama's last scope is for ever.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.agent.borrowed import Agent, HeldPod, closing
from tests.local.test_confined import found
from tests.pods import until

SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
SECURITY = Path("/sys/kernel/security")
PARSER = shutil.which("apparmor_parser")
APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
pytestmark = pytest.mark.skipif(
    not Path("/run/out").is_dir(), reason="is for a guest of tests/machine"
)
needs_apparmor = pytest.mark.skipif(
    not APPARMOR.exists() or PARSER is None, reason="needs AppArmor and apparmor_parser"
)
RULES = "file, capability, network, mount, umount, signal, unix,"
PROFILES = f"""
profile weir-pod flags=(attach_disconnected) {{
  {RULES} ptrace (trace, read, tracedby, readby) peer=weir-pod,
}}
profile weir-pod-open flags=(attach_disconnected) {{
  {RULES} ptrace (tracedby, readby) peer=weir-agent,
}}
profile weir-agent flags=(attach_disconnected) {{
  {RULES} ptrace (trace, read),
}}
profile weir-no-sysctl flags=(attach_disconnected) {{
  {RULES} ptrace, deny @{{PROC}}/sys/[^k]** w,
}}
"""


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not (SECURITY / "apparmor").exists():
        subprocess.run(["mount", "-t", "securityfs", "none", SECURITY], check=True)
    text = "@{PROC}=/proc/\n" + PROFILES
    file = tmp_path_factory.mktemp("apparmor") / "profiles"
    file.write_text(text)
    assert PARSER is not None
    subprocess.run([PARSER, "--replace", "--skip-cache", file], check=True)


def confined(profile: str) -> list[str]:
    """Prefix of a command that it is to confine."""
    return ["sh", "-c", f'echo "exec {profile}" > /proc/self/attr/exec; exec "$@"', "sh"]


def serves(folder: Path, pod: tuple[str, ...], agent: tuple[str, ...]) -> str:
    """Empty when such an agent borrows from such a pod, else what its status says."""
    with HeldPod(*pod) as held, closing(one := Agent(folder, held, prefix=agent)):
        until(lambda: one.workers, "the worker", 120.0)
        held.start_hold()
        until(lambda: _settled(one.pod()["lease"]), "the lease is decided", 120.0)
        lease = str(one.pod()["lease"])
        if lease == "held":
            assert held.get() == (200, b"hello")
            return ""
        return lease


def _settled(lease: str) -> bool:
    return lease == "held" or "can't" in lease or "hold's door" in lease


ANOTHER = ("setpriv", "--reuid=65532", "--regid=65532", "--clear-groups")


@needs_apparmor
def test_an_agent_that_is_not_confined_borrows_from_a_confined_pod(
    tmp_path: Path, profiles: None
) -> None:
    assert serves(tmp_path, (*confined("weir-pod"), *ANOTHER), ()) == ""


@needs_apparmor
def test_a_confined_agent_needs_the_pods_leave_as_well(tmp_path: Path, profiles: None) -> None:
    agent = tuple(confined("weir-agent"))
    assert serves(tmp_path / "no", (*confined("weir-pod"), *ANOTHER), agent)
    assert serves(tmp_path / "yes", (*confined("weir-pod-open"), *ANOTHER), agent) == ""


@needs_apparmor
def test_doctor_names_the_profile_and_what_it_keeps_it_from(profiles: None) -> None:
    assert found("apparmor")[0] == found("entering")[0] == "True"
    bound = confined("weir-no-sysctl")
    assert "weir-no-sysctl" in found("apparmor", *bound)[1]
    outcome, detail, fix = found("entering", *bound)
    assert (outcome, "tcp_migrate_req" in detail) == ("False", True)
    assert "AppArmor" in fix


@pytest.mark.skipif(not SCOPE.exists(), reason="needs Yama")
def test_of_yamas_scopes_only_the_last_is_in_the_way(tmp_path: Path) -> None:
    for value in "012":
        SCOPE.write_text(value)
        assert found("yama")[0] == found("borrowing")[0] == "True", value
    assert serves(tmp_path / "2", ANOTHER, ()) == ""
    SCOPE.write_text("3")
    assert found("yama")[0] == found("borrowing")[0] == "None"
    assert "ptrace_scope" in serves(tmp_path / "3", ANOTHER, ())
