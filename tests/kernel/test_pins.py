"""Steering and counting outlive their loader, and the next one takes over what it left."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from tests.kernel.bpffs import Loader, mounted
from tests.kernel.direct import GET, OK, Exchange
from tests.kernel.test_lifecycle import (
    ALL_PROGRAMS,
    attached_to,
    bpf_descriptors,
    bpftool,
    existing,
    number_of,
    refused,
)
from tests.kernel.test_mptcp import IPPROTO_MPTCP, tc_programs, why_no_mptcp
from tests.kernel.test_storm import SERVER
from tests.pods import DIRECT_PORT, Pod, needs_kernel, until, why_no_bcc
from weir.bpf import OBJECT
from weir.bpf.btf import Btf
from weir.bpf.libbpf import library
from weir.proxy import pins
from weir.proxy.kernel import Kernel

pytestmark = needs_kernel


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path) as made:
        yield made


def links_of(root: Path) -> set[str]:
    return {path.name for path in root.glob("*/pods/*/*")}


def pods_of(root: Path) -> list[Path]:
    return list(root.glob("*/pods/*"))


def serve(pod: Pod) -> None:
    pod.run([sys.executable, "-c", SERVER])
    until(pod.listening)


class Caller(threading.Thread):
    """Asks over one kept connection, and over a new one for every tenth request, until told to
    stop. Whatever fails is in `failure`."""

    def __init__(self, pod: Pod) -> None:
        super().__init__()
        self.address = pod.address
        self.stopped = threading.Event()
        self.answered = self.connections = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            with self._connect() as kept:
                for number in itertools.count():
                    if self.stopped.is_set():
                        return
                    self._ask(kept)
                    if number % 10 == 0:
                        with self._connect() as new:
                            self._ask(new)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.failure = error

    def stop(self) -> None:
        self.stopped.set()
        self.join()
        assert self.failure is None, repr(self.failure)

    def _connect(self) -> socket.socket:
        self.connections += 1
        return socket.create_connection((self.address, DIRECT_PORT), 10)

    def _ask(self, client: socket.socket) -> None:
        client.sendall(GET)
        got = b""
        while len(got) < len(OK):
            part = client.recv(len(OK) - len(got))
            assert part, "closed before the answer"
            got += part
        self.answered += 1


def test_a_killed_loader_leaves_steering_and_counting_behind(root: Path, pod: Pod) -> None:
    loader = Loader(root, "stay", pod.target())
    loader.said("attached")
    loader.kill()
    assert attached_to(pod) == ALL_PROGRAMS
    listener = pod.backend().listen()
    exchange = Exchange(socket.create_connection((pod.address, DIRECT_PORT), 10), listener.accept())
    exchange.ask(GET)
    kernel = Kernel.load(root=root)
    adopted = kernel.attach(pod.target())
    assert adopted.opened
    assert (adopted.counters().in_flight, adopted.counters().started) == (1, 1)
    exchange.answer(OK)
    until(lambda: adopted.counters().finished == 1)
    assert adopted.steering() == "sk_lookup"
    adopted.detach()
    assert refused(pod)
    kernel.close()
    assert list(root.iterdir()) == []


def test_no_request_fails_and_none_is_missed_while_loaders_are_killed(root: Path, pod: Pod) -> None:
    random = Random(5)
    serve(pod)
    loader = Loader(root, "stay", pod.target())
    loader.said("attached")
    callers = [Caller(pod) for _ in range(2)]
    for caller in callers:
        caller.start()
    for _ in range(10):
        loader.kill()
        loader = Loader(root, "stay", pod.target())
        if random.random() < 0.5:
            loader.said("attached")
        else:
            time.sleep(random.uniform(0, 0.3))  # killed wherever it is by then
    loader.kill()
    for caller in callers:
        caller.stop()
    kernel = Kernel.load(root=root)
    adopted = kernel.attach(pod.target())
    until(lambda: adopted.counters().open_connections == 0)
    counters = adopted.counters()
    answered = sum(caller.answered for caller in callers)
    assert answered > 100
    assert (counters.started, counters.finished, counters.aborted) == (answered, answered, 0)
    assert counters.connections == sum(caller.connections for caller in callers)
    adopted.detach()
    kernel.close()


def test_whatever_a_loader_was_killed_at_the_next_one_has_a_whole_pod(root: Path, pod: Pod) -> None:
    random = Random(7)
    for _ in range(20):
        loader = Loader(root, "churn", pod.target())
        time.sleep(random.uniform(0, 0.25))
        loader.kill()
        kernel = Kernel.load(root=root)
        attached = kernel.attach(pod.target())
        assert attached_to(pod) == ALL_PROGRAMS
        assert len(pods_of(root)) == 1
        attached.detach()
        until(lambda: attached_to(pod) == set(), "detached: an unlinked pin lets go a moment later")
        for table in (kernel.pods, kernel.addresses, kernel.meters, kernel.listeners):
            assert list(table.keys()) == []
        kernel.close()
        assert list(root.iterdir()) == []


def test_the_programs_of_the_next_loader_replace_the_ones_before(root: Path, pod: Pod) -> None:
    first = Kernel.load(root=root)
    first.attach(pod.target()).open_direct()
    before = {number_of(first.object.program_fd(name), "prog_id") for name in ALL_PROGRAMS}
    first.close()
    assert before <= existing("prog")
    second = Kernel.load(root=root)
    second.attach(pod.target())
    until(
        lambda: not before & existing("prog"),
        "the programs of the first are gone",
    )
    assert attached_to(pod) == ALL_PROGRAMS
    second.close()
    assert attached_to(pod) == ALL_PROGRAMS
    third = Kernel.load(root=root)
    third.attach(pod.target()).detach()
    third.close()


def test_an_adopted_pod_costs_no_descriptor(root: Path, pod: Pod) -> None:
    kernel = Kernel.load(root=root)
    before = bpf_descriptors()
    attached = kernel.attach(pod.target())
    assert bpf_descriptors() == before
    attached.release()
    kernel.attach(pod.target())
    assert bpf_descriptors() == before
    kernel.close()
    assert links_of(root) == ALL_PROGRAMS
    with_nobody = Kernel.load(root=root)
    with_nobody.attach(pod.target()).detach()
    with_nobody.close()


def test_a_closed_port_is_adopted_closed(root: Path, pod: Pod) -> None:
    first = Kernel.load(root=root)
    first.attach(pod.target()).close_direct()
    pod.backend().listen()
    first.close()
    second = Kernel.load(root=root)
    adopted = second.attach(pod.target())
    assert not adopted.opened
    assert refused(pod)
    adopted.open_direct()
    assert not refused(pod)
    adopted.detach()
    second.close()


def test_pods_that_ended_without_an_agent_are_swept(root: Path) -> None:
    with Pod() as dead, Pod() as living:
        loader = Loader(root, "stay", dead.target(), living.target())
        loader.said("attached")
        loader.kill()
        assert len(pods_of(root)) == 2
        dead.__exit__(None, None, None)
        kernel = Kernel.load(root=root)
        until(lambda: kernel.sweep() or len(pods_of(root)) == 1)
        assert len(list(kernel.pods.keys())) == 1
        assert len(list(kernel.meters.keys())) == kernel.tables.lanes
        assert len(list(kernel.addresses.keys())) == len(living.addresses)
        assert attached_to(living) == ALL_PROGRAMS
        kernel.attach(living.target()).detach()
        kernel.close()


def test_a_pod_released_after_its_end_leaves_nothing(root: Path) -> None:
    kernel = Kernel.load(root=root)
    with Pod() as pod:
        attached = kernel.attach(pod.target())
    until(
        lambda: attached.tables.layout is not None and attached.tables.layout.dead(attached.cookie)
    )
    attached.release()
    assert pods_of(root) == []
    assert list(kernel.meters.keys()) == []
    kernel.close()


def test_two_agents_side_by_side_do_not_remove_what_the_other_uses(root: Path) -> None:
    with Pod() as one, Pod() as two:
        old, new = Kernel.load(root=root), Kernel.load(root=root)
        first, second = old.attach(one.target()), new.attach(two.target())
        first.open_direct()
        second.open_direct()
        first.release()
        moved = new.attach(one.target())
        assert moved.opened
        old.close()
        assert attached_to(one) == attached_to(two) == ALL_PROGRAMS
        moved.detach()
        second.detach()
        new.close()
        assert list(root.iterdir()) == []


def test_another_layout_leaves_a_pod_its_old_programs(
    root: Path, pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = pod.backend().listen()
    old = Kernel.load(root=root)
    attached = old.attach(pod.target())
    attached.adopt_listeners()
    attached.open_direct()
    before = {link["prog_id"] for link in bpftool("link", "show")}
    old.close()
    fingerprint = Btf.fingerprint
    monkeypatch.setattr(Btf, "fingerprint", lambda btf: fingerprint(btf)[::-1])
    new = Kernel.load(root=root)
    kept = new.attach(pod.target())
    assert kept.earlier
    assert kept.opened
    assert {link["prog_id"] for link in bpftool("link", "show")} == before
    exchange = Exchange(socket.create_connection((pod.address, DIRECT_PORT), 10), listener.accept())
    exchange.ask(GET)
    exchange.answer(OK)
    until(lambda: kept.counters().finished == 1)
    kept.close_direct()
    assert refused(pod)
    with Pod() as another:
        fresh = new.attach(another.target())
        assert not fresh.earlier
        assert len(list(root.iterdir())) == 2
        fresh.detach()
    kept.detach()
    until(lambda: attached_to(pod) == set(), "detached: an unlinked pin lets go a moment later")
    new.close()
    assert list(root.iterdir()) == []


def test_each_loader_adopts_its_own_and_leaves_the_others_pods_their_programs(
    root: Path, pod: Pod
) -> None:
    reason = why_no_bcc()  # compiles: not while tests are collected
    if reason is not None:
        pytest.skip(reason)
    first = Kernel.load(root=root, loader="bcc")
    first.attach(pod.target()).open_direct()
    first.close()
    other = Kernel.load(root=root)
    assert other.attach(pod.target()).earlier
    other.close()
    again = Kernel.load(root=root, loader="bcc")
    adopted = again.attach(pod.target())
    assert adopted.opened
    assert not adopted.earlier
    adopted.detach()
    again.close()
    assert list(root.iterdir()) == []


@pytest.mark.skipif(why_no_mptcp() is not None, reason=str(why_no_mptcp()))
@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_the_tc_variant_of_a_killed_agent_is_adopted_and_there_is_one(
    root: Path, pod: Pod, monkeypatch: pytest.MonkeyPatch, tcx: bool
) -> None:
    first = Kernel.load(root=root)
    attached = first.attach(pod.target())
    attached.open_direct()
    if not tcx:  # as on a kernel before 6.6; all other links are there already
        monkeypatch.setattr(library(), "bpf_link_create", lambda *_: -errno.EINVAL)
    app = pod.backend()
    listener = app.listen(protocol=IPPROTO_MPTCP)
    assert attached.steering() == "tc"
    first.close()
    assert tc_programs(pod) == 1
    second = Kernel.load(root=root)
    adopted = second.attach(pod.target())
    adopted.adopt_listeners()
    assert adopted.steering() == "tc"
    assert tc_programs(pod) == 1
    exchange = Exchange(socket.create_connection((pod.address, DIRECT_PORT), 10), listener.accept())
    exchange.ask(GET)
    exchange.answer(OK)
    until(lambda: adopted.counters().finished == 1)
    adopted.detach()
    assert tc_programs(pod) == 0
    second.close()


def test_maps_that_are_not_all_there_are_made_anew(root: Path, pod: Pod) -> None:
    Kernel.load(root=root).attach(pod.target())
    with suppress(FileNotFoundError):
        next(root.glob("*/maps/meters")).unlink()
    for link in root.glob("*/pods/*/*"):
        link.unlink()
    kernel = Kernel.load(root=root)
    attached = kernel.attach(pod.target())
    assert attached.counters().started == 0
    attached.detach()
    kernel.close()


def test_a_stopped_agent_is_not_waited_for_without_end(
    root: Path, pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins, "PATIENCE", 0.05)
    kernel = Kernel.load(root=root)
    with pins.opened(root):  # as one that was stopped in there
        kernel.attach(pod.target()).detach()
    kernel.close()


def test_without_a_bpffs_the_log_says_how_to_get_one(
    tmp_path: Path, pod: Pod, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Kernel.load(root=tmp_path / "weir")
    assert f"mount -t bpf bpf {tmp_path}" in caplog.text
    kernel.attach(pod.target())
    kernel.close()
    until(lambda: attached_to(pod) == set(), "detached: an unlinked pin lets go a moment later")
    assert os.listdir(tmp_path) == []


def test_the_layout_is_told_by_every_definition() -> None:
    btf = Btf.of_object(OBJECT)
    assert len(btf.fingerprint()) == 8
    assert btf.fingerprint() == Btf.of_object(OBJECT).fingerprint()
