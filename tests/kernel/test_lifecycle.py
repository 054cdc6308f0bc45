"""Attaching, detaching, several pods: nothing is mixed up and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.direct import GET, OK, Exchange
from tests.pods import DIRECT_PORT, Pod, needs_kernel, until
from weir.bpf import OBJECT
from weir.bpf.btf import elf_section
from weir.bpf.loaded import BpfObject
from weir.proxy.kernel import Kernel, KernelUnavailable

pytestmark = needs_kernel


def open_exchange(pod: Pod) -> Exchange:
    listener = pod.backend().listen()
    client = socket.create_connection((pod.address, DIRECT_PORT), timeout=10)
    return Exchange(client, listener.accept())


def refused(pod: Pod) -> bool:
    with suppress(ConnectionRefusedError):
        socket.create_connection((pod.address, DIRECT_PORT), timeout=10).close()
        return False
    return True


def attached_to(pod: Pod) -> set[str]:
    """Names of the programs on the pod's cgroup and network namespace."""
    shown = bpftool("cgroup", "show", str(pod.cgroup), "effective")
    names = {str(each["name"]) for each in shown}
    inode = pod.netns.stat().st_ino
    programs = {each["id"]: str(each.get("name", "")) for each in bpftool("prog", "show")}
    for link in bpftool("link", "show"):
        if link.get("netns_ino") == inode:
            names.add(programs[link["prog_id"]])
    return names


def bpftool(*arguments: str) -> list[dict[str, object]]:
    shown = subprocess.run(
        ["bpftool", "-j", *arguments], capture_output=True, text=True, check=True
    ).stdout
    parsed = json.loads(shown.strip() or "[]")
    assert isinstance(parsed, list)
    return parsed


def bpf_descriptors() -> list[str]:
    """BPF programs, maps and links that this process holds."""
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            names.append(str(entry.readlink()))
    return sorted(name for name in names if "bpf" in name)


ALL_PROGRAMS = {
    "follow_in",
    "follow_out",
    "peer_is_local4",
    "peer_is_local6",
    "socket_event",
    "steer",
}


ALL_MAPS = {"pods", "addresses", "listeners", "meters", "connections"}


def number_of(fd: int, kind: str) -> int:
    """The kernel's number of the BPF object behind a descriptor."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(kind))


def existing(kind: str) -> set[object]:
    return {each["id"] for each in bpftool(kind, "show")}


def test_detaching_leaves_nothing_on_the_pod(kernel: Kernel, pod: Pod) -> None:
    before = bpf_descriptors()
    attached = kernel.attach(pod.target())
    attached.open_direct()
    assert attached_to(pod) == ALL_PROGRAMS
    open_exchange(pod).ask(GET)
    attached.detach()
    attached.detach()
    assert attached_to(pod) == set()
    assert bpf_descriptors() == before
    assert refused(pod)
    for name in ("pods", "addresses", "meters", "listeners"):
        assert list(getattr(kernel, name).keys()) == [], name


def test_closing_the_kernel_detaches_every_pod_and_unloads() -> None:
    before = bpf_descriptors()
    loaded = Kernel.load()
    programs = {number_of(loaded.object.program_fd(name), "prog_id") for name in ALL_PROGRAMS}
    maps = {number_of(loaded.object.map_fd(name), "map_id") for name in ALL_MAPS}
    with Pod() as one, Pod() as two:
        for pod in (one, two):
            loaded.attach(pod.target()).open_direct()
        assert programs <= existing("prog")
        assert maps <= existing("map")
        loaded.close()
        loaded.close()
        assert attached_to(one) == attached_to(two) == set()
        assert bpf_descriptors() == before
        # the kernel frees them when the last reader is through
        until(lambda: not programs & existing("prog"), "programs unloaded")
        until(lambda: not maps & existing("map"), "maps freed")


def test_the_last_counters_outlive_the_attachment(kernel: Kernel, pod: Pod) -> None:
    attached = kernel.attach(pod.target())
    attached.open_direct()
    exchange = open_exchange(pod)
    exchange.ask(GET)
    exchange.answer(OK)
    attached.detach()
    assert attached.counters().finished == 1


def test_two_pods_under_one_kernel_are_counted_apart(kernel: Kernel) -> None:
    with Pod() as one, Pod() as two:
        first, second = kernel.attach(one.target()), kernel.attach(two.target())
        first.open_direct()
        second.open_direct()
        exchange = open_exchange(one)
        other = open_exchange(two)
        exchange.ask(GET)
        other.ask(GET * 2)
        other.answer(OK * 2)
        assert (first.counters().in_flight, first.counters().finished) == (1, 0)
        assert (second.counters().in_flight, second.counters().finished) == (0, 2)
        first.close_direct()
        assert refused(one)
        assert not refused(two)
        first.detach()
        other.ask(GET)
        other.answer(OK)
        assert second.counters().finished == 3
        second.detach()


def test_a_connection_from_before_a_new_attachment_is_not_counted_by_it(
    kernel: Kernel, pod: Pod
) -> None:
    attached = kernel.attach(pod.target())
    attached.open_direct()
    exchange = open_exchange(pod)
    exchange.ask(GET)
    attached.detach()
    again = kernel.attach(pod.target())
    exchange.answer(OK)
    exchange.ask(GET)
    exchange.answer(OK)
    exchange.close()
    until(lambda: again.counters() is not None)
    counters = again.counters()
    assert (counters.in_flight, counters.started, counters.finished) == (0, 0, 0)
    assert (counters.connections, counters.open_connections) == (0, 0)
    again.detach()


def test_attaching_a_pod_twice_is_refused(kernel: Kernel, pod: Pod) -> None:
    attached = kernel.attach(pod.target())
    with pytest.raises(KernelUnavailable, match="detach that first"):
        kernel.attach(pod.target())
    attached.detach()


def test_two_living_pods_cannot_share_an_address(kernel: Kernel) -> None:
    with Pod() as one, Pod() as two:
        first = kernel.attach(one.target())
        with pytest.raises(KernelUnavailable, match=one.name):
            kernel.attach(replace(two.target(), addresses=one.addresses))
        first.open_direct()
        open_exchange(one)
        first.detach()


def test_the_address_of_a_dead_pod_goes_to_its_successor(kernel: Kernel) -> None:
    with Pod() as one:
        first = kernel.attach(one.target())
    with Pod() as two:
        successor = kernel.attach(replace(two.target(), addresses=(one.address, two.address)))
        successor.open_direct()
        first.detach()
        open_exchange(two).ask(GET)
        assert successor.counters().in_flight == 1
        successor.detach()
    assert list(kernel.addresses.keys()) == []


def test_a_pod_that_is_gone_is_named(kernel: Kernel, pod: Pod) -> None:
    target = replace(pod.target(), netns=Path("/run/netns/weirt-not-there"))
    with pytest.raises(KernelUnavailable, match="weirt-not-there"):
        kernel.attach(target)


def test_a_failed_attachment_leaves_nothing(kernel: Kernel, pod: Pod) -> None:
    before = bpf_descriptors()
    target = replace(pod.target(), cgroup=pod.cgroup / "not-there")
    with pytest.raises(KernelUnavailable, match="not-there") as raised:
        kernel.attach(target)
    assert "\n" not in str(raised.value)
    assert bpf_descriptors() == before
    assert list(kernel.meters.keys()) == []


def test_a_pod_may_die_while_attached(kernel: Kernel) -> None:
    with Pod() as pod:
        attached = kernel.attach(pod.target())
        attached.open_direct()
        open_exchange(pod).ask(GET)
    attached.detach()
    assert list(kernel.meters.keys()) == []


def test_an_object_that_is_not_built_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(KernelUnavailable, match="make bpf"):
        Kernel.load(tmp_path / "weir.bpf.o")


def test_a_damaged_object_is_named(tmp_path: Path) -> None:
    damaged = tmp_path / "weir.bpf.o"
    damaged.write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(KernelUnavailable, match=r"weir\.bpf\.o.*make bpf"):
        Kernel.load(damaged)


def test_what_the_verifier_refuses_is_one_line_with_its_reason(tmp_path: Path) -> None:
    program = elf_section(OBJECT, "sk_lookup")
    context_to_r6 = bytes.fromhex("bf16000000000000")
    zero_to_r6 = bytes.fromhex("b706000000000000")
    spoiled = tmp_path / "weir.bpf.o"
    content = OBJECT.read_bytes()
    assert program.startswith(context_to_r6)
    assert content.count(program) == 1
    spoiled.write_bytes(content.replace(program, zero_to_r6 + program[8:]))
    with pytest.raises(KernelUnavailable, match="the verifier said: R6 invalid mem") as raised:
        Kernel.load(spoiled)
    assert "\n" not in str(raised.value)


def test_without_the_capabilities_the_message_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Path.read_text

    def without(path: Path) -> str:
        text = real(path)
        return text if path.name != "status" else re.sub(r"CapEff:.*", "CapEff:\t0", text)

    monkeypatch.setattr(Path, "read_text", without)
    with pytest.raises(KernelUnavailable, match="run as root"):
        Kernel.load()


def test_an_old_kernel_is_named_with_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.uname_result(("Linux", "x", "5.10.0-8-amd64", "", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: old)
    with pytest.raises(KernelUnavailable, match=r"5\.10\.0-8-amd64 is too old.*5\.17"):
        Kernel.load()


def test_a_pinned_link_outlives_its_loader(pod: Pod) -> None:
    bpffs = Path("/sys/fs/bpf")
    if not bpffs.is_mount():
        pytest.skip("needs a bpffs at /sys/fs/bpf")
    pin = bpffs / pod.name
    loaded = BpfObject(OBJECT)
    link = loaded.attach_cgroup("follow_in", pod.cgroup)
    try:
        link.pin(pin)
        link.close()
        loaded.close()
        assert attached_to(pod) == {"follow_in"}
    finally:
        pin.unlink()
    until(lambda: attached_to(pod) == set())
