"""The kernel rings when something begins to listen in a pod, and nobody has to hear it."""

from __future__ import annotations

import select
from collections.abc import Iterator

import pytest

from tests.kernel.test_mptcp import IPPROTO_MPTCP, why_no_mptcp
from tests.pods import USER_PORT, Pod, needs_kernel
from weir.proxy.kernel import AttachedPod, Kernel

pytestmark = needs_kernel


@pytest.fixture
def attached(kernel: Kernel, pod: Pod) -> Iterator[AttachedPod]:
    made = kernel.attach(pod.target())
    kernel.bell.heard()
    try:
        yield made
    finally:
        made.detach()


def rings(kernel: Kernel) -> bool:
    return bool(select.select([kernel.bell], [], [], 0)[0])


def test_a_listener_on_the_user_port_rings_once_with_its_pod(
    kernel: Kernel, pod: Pod, attached: AttachedPod
) -> None:
    assert not rings(kernel)
    pod.backend().listen()
    assert rings(kernel)
    assert kernel.bell.heard() == {attached.cookie}
    assert not rings(kernel)
    assert kernel.bell.heard() == set()


def test_a_listener_on_another_port_does_not_ring(
    kernel: Kernel, pod: Pod, attached: AttachedPod
) -> None:
    pod.backend().listen(port=USER_PORT + 1)
    assert not rings(kernel)


@pytest.mark.skipif(why_no_mptcp() is not None, reason=str(why_no_mptcp()))
def test_a_listener_that_no_map_can_hold_rings_as_well(
    kernel: Kernel, pod: Pod, attached: AttachedPod
) -> None:
    pod.backend().listen(protocol=IPPROTO_MPTCP)
    assert kernel.bell.heard() == {attached.cookie}


def test_two_pods_ring_with_their_own_names(
    kernel: Kernel, pod: Pod, attached: AttachedPod
) -> None:
    with Pod() as other:
        second = kernel.attach(other.target())
        try:
            for each in (pod, other, pod):
                each.backend().listen(reuse_port=True)
            assert kernel.bell.heard() == {attached.cookie, second.cookie}
        finally:
            second.detach()


def test_a_bell_that_nobody_heard_for_long_still_rings_for_who_does(
    kernel: Kernel, pod: Pod, attached: AttachedPod
) -> None:
    backend = pod.backend()
    for _ in range(4500):  # more than the ring holds: what doesn't fit is not told
        backend.listen().close()
    assert rings(kernel)
    assert kernel.bell.heard() == {attached.cookie}
    assert not rings(kernel)
    backend.listen()
    assert kernel.bell.heard() == {attached.cookie}
