"""`weir doctor` on the node: what is missing is found by trying, and named with its fix."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.local.conftest import ROOT
from tests.local.test_run import NOBODY, needs_root, needs_setpriv
from tests.pods import Pod, needs_kernel
from weir.bpf import bcc
from weir.bpf.bcc import BccMissing
from weir.bpf.libbpf import LibbpfMissing, library
from weir.local import node
from weir.local.finding import Finding
from weir.proxy.kernel import Kernel

SOCKHASH = 18  # enum bpf_map_type
ALL = sum(1 << bit for bit, _ in node.CAPABILITIES.values())


def having(tmp_path: Path, capabilities: int) -> Finding:
    status = tmp_path / "status"
    status.write_text(f"Name:\tx\nCapInh:\t0\nCapEff:\t{capabilities:016x}\n")
    return node.capabilities(status)


def test_the_capabilities_are_those_of_the_manual() -> None:
    manual = (ROOT / "docs/agent.md").read_text().split("| Capability |")[1].split("\n\n")[0]
    named = {name for row in manual.splitlines()[2:] for name in re.findall("[A-Z_]+", row[:24])}
    assert set(node.CAPABILITIES) == named


def test_with_exactly_those_nothing_is_missing(tmp_path: Path) -> None:
    assert having(tmp_path, ALL).ok


@pytest.mark.parametrize("name", node.CAPABILITIES)
def test_each_missing_capability_is_named_and_how_to_get_it(tmp_path: Path, name: str) -> None:
    bit, consequence = node.CAPABILITIES[name]
    finding = having(tmp_path, ALL & ~(1 << bit))
    assert finding.ok is (False if name in ("SYS_ADMIN", "NET_ADMIN") else None)
    assert finding.detail == f"no CAP_{name}: {consequence}"
    assert f"add {name} " in finding.fix


def mounts(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "mounts"
    path.write_text("".join(f"{line} rw 0 0\n" for line in ("proc /proc proc", *lines)))
    return path


def test_a_machine_without_cgroup_v2_or_a_bpffs_is_told_how_to_mount_them(tmp_path: Path) -> None:
    none = mounts(tmp_path)
    assert (node.cgroup2(none).ok, node.bpffs(none).ok) == (False, None)
    assert "mount -t cgroup2" in node.cgroup2(none).fix
    assert "mount -t bpf bpf /sys/fs/bpf" in node.bpffs(none).fix


def test_file_systems_in_unusual_places_are_named_and_nothing_is_left_in_them(
    tmp_path: Path,
) -> None:
    place = tmp_path / "a place"
    place.mkdir()
    escaped = str(place).replace(" ", "\\040")
    cgroup = node.cgroup2(mounts(tmp_path, f"none {escaped} cgroup2"))
    bpffs = node.bpffs(mounts(tmp_path, f"none {escaped} bpf"))
    assert (cgroup.ok, bpffs.ok) == (True, True)
    assert f"mounted at {place} (not /sys/fs/cgroup" in cgroup.detail
    assert f"--pins {place}/weir" in bpffs.detail
    assert list(place.iterdir()) == []


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@needs_root
def test_read_only_file_systems_are_found_by_writing(tmp_path: Path) -> None:
    place = tmp_path / "ro"
    with read_only(place):
        cgroup = node.cgroup2(mounts(tmp_path, f"none {place} cgroup2"))
        bpffs = node.bpffs(mounts(tmp_path, f"none {place} bpf"))
    assert (cgroup.ok, bpffs.ok) == (False, None)
    assert f"mount -o remount,rw {place}" in cgroup.fix
    assert f"mount -o remount,rw {place}" in bpffs.fix


@needs_kernel
def test_every_feature_is_in_a_kernel_that_can_do_it_all() -> None:
    assert node.kernel_features().ok


@pytest.mark.parametrize(
    ("answer", "ok", "fix"), [(0, False, "CONFIG_CGROUP_BPF"), (-errno.EPERM, None, "root")]
)
def test_a_feature_that_is_not_there_or_can_not_be_tried_is_named(
    monkeypatch: pytest.MonkeyPatch, answer: int, ok: bool | None, fix: str
) -> None:
    class Answering:
        """A kernel with everything but sockhash maps."""

        def libbpf_probe_bpf_prog_type(self, kind: int, _: None) -> int:
            return 1

        def libbpf_probe_bpf_map_type(self, kind: int, _: None) -> int:
            return answer if kind == SOCKHASH else 1

    monkeypatch.setattr(node, "library", Answering)
    finding = node.kernel_features()
    assert finding.ok is ok
    assert "sockhash maps" in finding.detail
    assert "hash maps," not in finding.detail
    assert fix in finding.fix


def test_missing_libraries_name_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library() -> ctypes.CDLL:
        raise LibbpfMissing("libbpf.so.1: cannot open shared object file")

    def no_compiler() -> None:
        raise BccMissing("bcc is not installed")

    monkeypatch.setattr(node, "library", no_library)
    monkeypatch.setattr(bcc, "compile_here", no_compiler)
    assert (node.libbpf().ok, node.libbpf().fix) == (False, "apt-get install libbpf1")
    assert node.bcc_loader().ok is None
    assert "python3-bpfcc" in node.bcc_loader().fix
    assert node.kernel_features().ok is None
    assert node.conflicts().ok is None


class _Options(ctypes.Structure):  # struct bpf_prog_load_opts, its first fields
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_uint32),
    )


@contextmanager
def another_program(pod: Pod, name: bytes) -> Iterator[None]:
    """Somebody else's sk_lookup program, which lets everything pass, in the pod's namespace."""
    lib = library()
    code = bytes.fromhex("b700000001000000 9500000000000000")
    options = _Options(sz=ctypes.sizeof(_Options), expected_attach_type=36)
    program = lib.bpf_prog_load(30, name, b"GPL", code, 2, ctypes.byref(options))
    assert program >= 0
    namespace = os.open(pod.netns, os.O_RDONLY)
    link = lib.bpf_link_create(program, namespace, 36, None)
    os.close(namespace)
    os.close(program)
    assert link >= 0
    try:
        yield
    finally:
        os.close(link)


@needs_kernel
def test_somebody_elses_sk_lookup_program_is_found_and_ours_is_no_conflict() -> None:
    with Pod() as pod:
        process = pod.run(["sleep", "infinity"])
        kernel = Kernel.load()
        try:
            kernel.attach(pod.target()).open_direct()
            assert str(process.pid) not in node.conflicts().detail
            with another_program(pod, b"mesh"):
                finding = node.conflicts()
            assert finding.ok is None
            assert re.search(rf"mesh \(id \d+\) in the namespace of pid {process.pid}\b",
                             finding.detail)  # fmt: skip
            assert "bpftool link list" in finding.fix
            assert "mesh" not in node.conflicts().detail
        finally:
            kernel.close()


@needs_setpriv
def test_without_rights_every_check_says_something_and_none_fails() -> None:
    result = subprocess.run(
        [*NOBODY, sys.executable, "-P", "-m", "weir", "doctor", "--json"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stderr
    findings = {f["name"]: f for f in json.loads(result.stdout)}
    assert findings["capabilities"]["ok"] is False
    assert "NET_ADMIN" in findings["capabilities"]["fix"]
    assert findings["kernel features"]["ok"] is not True
    assert findings["kernel features"]["fix"]
    assert findings["libbpf"]["ok"]
