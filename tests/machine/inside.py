"""What holds on this kernel: run inside the guests of tests/machine, and anywhere by name.

Not collected by itself. Of a kernel that is too old the opposite is claimed: it is refused, with
the version that is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from tests.agent.test_agent import DATA_PORT, agent_for, described, get, start_app
from tests.pods import Pod, until
from weir.bpf.libbpf import _info
from weir.proxy import selftest
from weir.proxy.attached import CGROUP_PROGRAMS
from weir.proxy.kernel import MINIMUM_KERNEL, Kernel, KernelUnavailable, Loader, kernel_version
from weir.proxy.tables import LAST

NEW_ENOUGH = kernel_version() >= MINIMUM_KERNEL
on_new_kernels = pytest.mark.skipif(not NEW_ENOUGH, reason="the kernel is too old")
on_old_kernels = pytest.mark.skipif(NEW_ENOUGH, reason="the kernel is new enough")
PROGRAMS = (*CGROUP_PROGRAMS, LAST, "steer_mptcp")
_VERIFIED_INSTRUCTIONS = 216  # struct bpf_prog_info; 0 before Linux 5.16
VERIFIERS_LIMIT = 1_000_000


@on_new_kernels
@pytest.mark.parametrize("loader", get_args(Loader))
def test_the_programs_pass_the_verifier_with_room_to_spare(
    loader: Loader, record_property: Callable[[str, object], None]
) -> None:
    kernel = Kernel.load(loader=loader)
    try:
        fds = {name: kernel.object.program_fd(name) for name in PROGRAMS}
        walked = {
            name: int.from_bytes(_info(fd, 220)[_VERIFIED_INSTRUCTIONS:], "little")
            for name, fd in fds.items()
        }
    finally:
        kernel.close()
    most = max(walked, key=walked.__getitem__)
    record_property(f"instructions verified ({loader})", f"{walked[most]} of {most}")
    assert 0 < walked[most] < VERIFIERS_LIMIT / 2, walked


@on_new_kernels
@pytest.mark.parametrize("loader", get_args(Loader))
def test_the_self_test_passes(loader: Loader) -> None:
    kernel = Kernel.load(loader=loader)
    try:
        selftest.run(kernel)
    finally:
        kernel.close()


def doctor() -> tuple[int, dict[str, dict[str, str | bool | None]]]:
    said = subprocess.run(
        [sys.executable, "-m", "weir", "doctor", "--json"], stdout=subprocess.PIPE, text=True
    )
    return said.returncode, {finding["name"]: finding for finding in json.loads(said.stdout)}


@on_new_kernels
def test_doctor_finds_nothing_missing() -> None:
    status, findings = doctor()
    assert [finding for finding in findings.values() if finding["ok"] is False] == []
    assert status == 0


@on_old_kernels
@pytest.mark.parametrize("loader", get_args(Loader))
def test_an_old_kernel_is_refused_with_the_version_that_is_needed(loader: Loader) -> None:
    with pytest.raises(KernelUnavailable, match=r"too old: the direct path needs 5\.17"):
        Kernel.load(loader=loader)


@on_old_kernels
def test_doctor_says_that_the_kernel_is_too_old() -> None:
    status, findings = doctor()
    assert status == 1
    assert findings["kernel"]["fix"] == "use Linux 5.17 or newer"


@on_old_kernels
def test_an_agent_relays_everything_there_and_says_why(tmp_path: Path) -> None:
    with Pod() as pod, agent_for(tmp_path, described(pod)) as agent:
        start_app(pod)
        agent.until_reason("too old")
        until(lambda: get(pod.address, DATA_PORT)[0] == 200, "a relayed answer")
