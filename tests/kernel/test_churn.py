"""Pods come and go: what they leave in the kernel, in the bpffs and in the agent is nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.bpffs import mounted
from tests.kernel.test_lifecycle import (
    ALL_PROGRAMS,
    bpf_descriptors,
    bpftool,
    number_of,
    open_exchange,
)
from tests.pods import Pod, needs_kernel, until
from weir.proxy.kernel import Kernel

pytestmark = needs_kernel

PODS, WARM = 200, 40
GROWTH = 1 << 20  # bytes in all that the process may have grown by; a leak of a pod is a thousand


@pytest.fixture(params=["pinned", "not pinned"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | None]:
    if request.param == "not pinned":
        yield None
        return
    with mounted(tmp_path) as made:
        yield made


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_two_hundred_pods_leave_nothing_behind(root: Path | None) -> None:
    kernel = Kernel.load(root=root)
    programs = {number_of(kernel.object.program_fd(name), "prog_id") for name in ALL_PROGRAMS}
    files = bpf_descriptors()
    before = 0
    for number in range(PODS):
        if number == WARM:
            before, warm = resident(), descriptors()
        with Pod() as pod:
            attached = kernel.attach(pod.target())
            attached.open_direct()
            if number % 20 == 0:
                open_exchange(pod).ask(b"GET / HTTP/1.1\r\n\r\n")
            if number % 2:
                attached.detach()
        if not number % 2:  # the pod ended before anybody detached it
            attached.release()

    def none_left() -> bool:
        kernel.sweep()
        return not programs & {link["prog_id"] for link in bpftool("link", "show")}

    until(none_left, "no link is left")
    assert resident() - before < GROWTH
    assert descriptors() == warm
    assert bpf_descriptors() == files
    for table in (kernel.pods, kernel.addresses, kernel.meters, kernel.listeners):
        assert list(table.keys()) == []
    if root is not None:
        assert list(root.glob("*/pods/*")) == []
    kernel.close()
    if root is not None:
        assert list(root.iterdir()) == []
