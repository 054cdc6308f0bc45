"""Pods that are pinned, live, and are in no agent's hands: their direct ports don't stay open."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.kernel.bpffs import mounted
from tests.kernel.direct import GET, OK, Exchange
from tests.kernel.test_lifecycle import refused
from tests.pods import DIRECT_PORT, Pod, RemoteSocket, needs_kernel
from weir.proxy.kernel import Kernel

pytestmark = needs_kernel
LOOKS = 3


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path) as made:
        yield made


@pytest.fixture
def pod() -> Iterator[Pod]:
    with Pod() as made:
        yield made


def connected(pod: Pod, listener: RemoteSocket) -> Exchange:
    return Exchange(
        socket.create_connection((pod.address, DIRECT_PORT), timeout=10), listener.accept()
    )


def abandoned(root: Path, pod: Pod) -> RemoteSocket:
    """As an agent leaves a pod that is killed: open, and nobody's."""
    kernel = Kernel.load(root=root)
    kernel.attach(pod.target()).open_direct()
    listener = pod.backend().listen()
    kernel.close()
    return listener


def test_a_pod_that_no_agent_claims_is_closed_at_the_second_look_and_the_log_names_it(
    root: Path, pod: Pod, caplog: pytest.LogCaptureFixture
) -> None:
    listener = abandoned(root, pod)
    other = Kernel.load(root=root)
    other.close_abandoned()
    connected(pod, listener).client.close()
    assert not caplog.records
    other.close_abandoned()
    assert refused(pod)
    (said,) = caplog.messages
    assert pod.address in said
    assert str(ip_address(pod.address6)) in said
    for _ in range(LOOKS):
        other.close_abandoned()
    assert len(caplog.messages) == 1, "it is said once"
    other.attach(pod.target()).detach()
    other.close()


def test_connections_of_a_pod_that_is_closed_go_on_and_are_counted(root: Path, pod: Pod) -> None:
    exchange = connected(pod, abandoned(root, pod))
    exchange.ask(GET)
    other = Kernel.load(root=root)
    for _ in range(LOOKS):
        other.close_abandoned()
    assert refused(pod)
    exchange.answer(OK)
    exchange.ask(GET)
    attached = other.attach(pod.target())
    counted = attached.counters()
    assert (counted.started, counted.finished, counted.in_flight) == (2, 1, 1)
    exchange.answer(OK)
    exchange.client.close()
    assert not attached.opened, "whoever claims it opens it again when it is ready"
    attached.detach()
    other.close()


def test_a_pod_that_another_agent_has_stays_open_and_is_closed_when_that_agent_is_gone(
    root: Path, pod: Pod
) -> None:
    one, two = Kernel.load(root=root), Kernel.load(root=root)
    one.attach(pod.target()).open_direct()
    listener = pod.backend().listen()
    for _ in range(LOOKS):
        one.close_abandoned()
        two.close_abandoned()
    connected(pod, listener).client.close()
    one.close()
    two.close_abandoned()
    two.close_abandoned()
    assert refused(pod)
    two.attach(pod.target()).detach()
    two.close()


def test_a_pod_on_its_way_from_one_agent_to_the_next_is_not_closed(root: Path, pod: Pod) -> None:
    one, two = Kernel.load(root=root), Kernel.load(root=root)
    attached = one.attach(pod.target())
    attached.open_direct()
    listener = pod.backend().listen()
    for agent, next_one in ((one, two), (two, one), (one, two)):
        attached.release()
        one.close_abandoned()
        two.close_abandoned()
        attached = next_one.attach(pod.target())
        assert attached.opened, f"{agent} had given it back for a moment"
        one.close_abandoned()
        two.close_abandoned()
    connected(pod, listener).client.close()
    attached.detach()
    one.close()
    two.close()
    assert list(root.iterdir()) == []


def test_agents_with_different_pins_do_not_see_each_others_pods(tmp_path: Path, pod: Pod) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with mounted(tmp_path / "here") as here, mounted(tmp_path / "there") as there:
        listener = abandoned(here, pod)
        other = Kernel.load(root=there)
        for _ in range(LOOKS):
            other.close_abandoned()
        connected(pod, listener).client.close()
        other.close()
        last = Kernel.load(root=here)
        last.attach(pod.target()).detach()
        last.close()
