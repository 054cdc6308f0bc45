"""The agent's self-test: it passes here, and what does not work is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.bpffs import mounted
from tests.kernel.test_lifecycle import bpf_descriptors
from tests.pods import needs_kernel
from weir.bpf.loaded import Loaded
from weir.proxy import selftest
from weir.proxy.attached import AttachedPod
from weir.proxy.cgroups import cgroup2_mount
from weir.proxy.kernel import Kernel, KernelUnavailable

pytestmark = needs_kernel


@contextmanager
def nothing_left(kernel: Kernel) -> Iterator[None]:
    before = bpf_descriptors()
    yield
    assert bpf_descriptors() == before
    for table in (kernel.pods, kernel.addresses, kernel.meters, kernel.listeners):
        assert list(table.keys()) == []
    mount = cgroup2_mount()
    assert mount is not None
    assert not (selftest._own_cgroup(mount) / f"weir-selftest-{os.getpid()}").exists()


def test_a_kernel_that_can_do_it_passes_and_nothing_is_left(kernel: Kernel) -> None:
    with nothing_left(kernel):
        selftest.run(kernel)
        selftest.run(kernel)


def test_it_is_left_out_where_no_cgroup_can_be_made(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(Path, "mkdir", refuse)
    selftest.run(kernel)
    assert "without CAP_DAC_OVERRIDE" in caplog.text


def test_it_leaves_no_pins(tmp_path: Path) -> None:
    with mounted(tmp_path) as root:
        kernel = Kernel.load(root=root)
        selftest.run(kernel)
        assert list(root.glob("*/pods/*")) == []
        kernel.close()
        assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("socket_event", "a listener did not enter the map"),
        ("peer_is_local4", "not 127.0.0.1"),
        ("follow_out", "1 were counted as started, 0 as finished"),
        ("steer", "refused"),
    ],
)
def test_a_program_that_does_nothing_is_found_out(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    attach = AttachedPod.attach

    def without(pod: AttachedPod, *arguments: object) -> None:
        attach(pod, *arguments)  # type: ignore[arg-type]
        pod.links.pop(program).close()

    monkeypatch.setattr(AttachedPod, "attach", without)
    monkeypatch.setattr(selftest, "PATIENCE", 2.0)
    with nothing_left(kernel), pytest.raises(KernelUnavailable, match=reason) as raised:
        selftest.run(kernel)
    assert str(raised.value).startswith("the self-test failed: ")
    assert "\n" not in str(raised.value)


def test_a_port_that_can_not_be_closed_is_found_out(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AttachedPod, "close_direct", lambda _: None)
    with nothing_left(kernel), pytest.raises(KernelUnavailable, match="closed direct port"):
        selftest.run(kernel)


def test_a_program_that_can_not_be_attached_is_named(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_loaded: Loaded, program: str, _at: Path) -> None:
        raise OSError(1, f"attaching {program}: no")

    monkeypatch.setattr(Loaded, "attach_netns", refuse)
    with nothing_left(kernel), pytest.raises(KernelUnavailable, match="attaching steer"):
        selftest.run(kernel)
