"""`weir doctor` on what confines it: read from the kernel's files, and tried."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.contract.world import ENVIRONMENT
from tests.local.conftest import ROOT
from tests.local.test_run import needs_root, needs_setpriv
from weir.local import confined

needs_unshare = pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
MASKED = 'mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"'


def file(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def found(check: str, *prefix: str) -> Sequence[str]:
    """ok, detail and fix of a check that runs behind a prefix."""
    code = (
        "from weir.local import confined\n"
        f"f = confined.{check}()\n"
        "print(f.ok, f.detail, f.fix, sep='\\n')"
    )
    done = subprocess.run(
        [*prefix, sys.executable, "-P", "-c", code],
        cwd="/",
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ---- what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "ok"), [("0", True), ("1", True), ("2", True), ("3", None)])
def test_only_yamas_last_scope_is_in_the_way(tmp_path: Path, scope: str, ok: bool | None) -> None:
    finding = confined.yama(file(tmp_path, "ptrace_scope", scope + "\n"))
    assert finding.ok is ok
    assert f"ptrace_scope is {scope}" in finding.detail
    assert bool(finding.fix) is (ok is None)


def test_a_kernel_without_security_modules_has_nothing_in_the_way(tmp_path: Path) -> None:
    none = tmp_path / "none"
    findings = [
        confined.yama(none),
        confined.apparmor(none, none),
        confined.selinux(none, none),
        confined.lockdown(none),
    ]
    assert [(finding.ok, finding.fix) for finding in findings] == [(True, "")] * 4


@pytest.mark.parametrize("where", ["current", "apparmor/current"])
@pytest.mark.parametrize(
    ("label", "ok"),
    [
        ("unconfined", True),
        ("weir-agent (complain)", True),
        ("podman (unconfined)", True),
        ("cri-containerd.apparmor.d (enforce)", None),
        ("weir-agent (kill)", None),
        ("", None),  # hidden, so not known to be harmless
    ],
)
def test_a_process_that_apparmor_confines_is_told_by_what(
    tmp_path: Path, where: str, label: str, ok: bool | None
) -> None:
    file(tmp_path, f"attr/{where}", f"{label}\n")
    finding = confined.apparmor(file(tmp_path, "enabled", "Y\n"), tmp_path / "attr")
    assert finding.ok is ok
    assert label.partition(" ")[0] in finding.detail
    assert ("appArmorProfile" in finding.fix) is (ok is None)
    assert confined.apparmor(file(tmp_path, "enabled", "N\n"), tmp_path / "attr").ok


@pytest.mark.parametrize(
    ("context", "enforce", "ok"),
    [
        ("system_u:system_r:spc_t:s0\0", "1", True),
        ("unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023\0", "1", True),
        ("system_u:system_r:container_t:s0:c1,c2\0", "1", None),
        ("system_u:system_r:container_t:s0:c1,c2\0", "", None),  # no selinuxfs in a container
        ("system_u:system_r:container_t:s0:c1,c2\0", "0", True),
        (":lxd-x_<var-lib>:unconfined\n", "", True),  # AppArmor's
        ("kernel\0", "", True),  # no policy is loaded
    ],
)
def test_a_process_that_selinux_confines_is_told_as_what(
    tmp_path: Path, context: str, enforce: str, ok: bool | None
) -> None:
    file(tmp_path, "attr/current", context)
    finding = confined.selinux(file(tmp_path, "enforce", enforce), tmp_path / "attr")
    assert finding.ok is ok
    assert ("container_t" in finding.detail) is ("container_t" in context)
    assert ("spc_t" in finding.fix) is (ok is None)


def test_lockdown_is_named_and_no_obstacle(tmp_path: Path) -> None:
    for line, said in (
        ("[none] integrity confidentiality\n", "off"),
        ("none [integrity] confidentiality\n", "integrity: no obstacle"),
        ("none integrity [confidentiality]\n", "confidentiality: no obstacle"),
    ):
        finding = confined.lockdown(file(tmp_path, "lockdown", line))
        assert finding.ok
        assert said in finding.detail


def test_the_programs_read_no_kernel_memory_which_lockdown_could_forbid() -> None:
    sources = [*(ROOT / "bpf").glob("*.h"), *(ROOT / "bpf").glob("*.c")]
    assert sources
    for source in sources:
        assert "probe_read" not in source.read_text(), source.name
        assert "probe_write" not in source.read_text(), source.name


def test_a_filter_of_system_calls_is_named(tmp_path: Path) -> None:
    for mode, said in (("0", "no filter"), ("2", "a filter")):
        status = file(tmp_path, "status", f"Name:\tx\nSeccomp:\t{mode}\nSeccomp_filters:\t{mode}\n")
        assert said in confined.seccomp(status).detail


def test_another_user_namespace_and_processes_out_of_sight_are_told(tmp_path: Path) -> None:
    ours, others = tmp_path / "ours", tmp_path / "others"
    ours.symlink_to("user:[4026531837]")
    others.symlink_to("user:[4026532841]")
    seen = file(tmp_path, "seen/pod/cgroup.procs", "12\n13\n").parent.parent
    unseen = file(tmp_path, "unseen/pod/cgroup.procs", "0\n0\n13\n").parent.parent
    assert confined.namespaces(ours, seen).ok
    assert confined.namespaces(others, seen).ok is False
    assert "hostUsers" in confined.namespaces(others, seen).fix
    finding = confined.namespaces(ours, unseen)
    assert finding.ok is None
    assert finding.detail.startswith("2 processes")
    assert "hostPID" in finding.fix


# ---- what is tried ---------------------------------------------------------------------------


@needs_root
def test_root_may_enter_and_borrow() -> None:
    assert confined.entering().ok
    assert confined.borrowing().ok


@needs_root
@needs_unshare
def test_a_pid_namespace_of_its_own_is_found() -> None:
    ok, detail, fix = found("namespaces", "unshare", "--pid", "--fork", "--mount-proc")
    assert ok == "None"
    assert "out of sight" in detail
    assert "hostPID" in fix


@needs_root
@needs_unshare
def test_a_containers_read_only_sysctls_are_no_obstacle() -> None:
    assert found("entering", "unshare", "--mount", "sh", "-c", MASKED, "sh")[0] == "True"


@needs_setpriv
@pytest.mark.parametrize(
    ("check", "without", "ok", "said"),
    [
        ("entering", "sys_admin", "False", "cannot enter: Operation not permitted"),
        ("borrowing", "sys_ptrace", "None", "can't be had"),
        ("borrowing", "setuid", "None", "no process of another user"),
    ],
)
def test_what_a_missing_capability_keeps_it_from_is_found_by_trying(
    check: str, without: str, ok: str, said: str
) -> None:
    outcome, detail, fix = found(check, "setpriv", f"--bounding-set=-{without}", "--inh-caps=-all")
    assert outcome == ok
    assert said in detail
    assert "capabilities" in fix


@needs_root
def test_every_hold_of_the_node_is_tried_and_one_that_is_none_is_told(tmp_path: Path) -> None:
    impostor = shutil.copy("/bin/sleep", tmp_path / "weir-hold")
    with subprocess.Popen([impostor, "600"], env=ENVIRONMENT) as process:
        try:
            proc = tmp_path / "proc"
            proc.mkdir()
            (proc / str(process.pid)).symlink_to(f"/proc/{process.pid}")
            finding = confined.borrowing(proc)
        finally:
            process.kill()
    assert finding.ok is None
    assert f"its descriptor can't be had (pid {process.pid}: Bad file descriptor)" in finding.detail
