"""A direct request that its caller has forgotten is ended by the agent, long after its deadline."""

from __future__ import annotations

import pytest

from tests.kernel.direct import GET
from tests.kernel.test_lifecycle import open_exchange
from tests.pods import USER_PORT, Pod, needs_kernel, until
from weir.proxy import served
from weir.proxy.contract import RevisionSettings
from weir.proxy.kernel import Kernel
from weir.proxy.pod import PodSpec
from weir.proxy.served import ServedPod

pytestmark = needs_kernel


def spec(pod: Pod, timeout: float) -> PodSpec:
    settings = RevisionSettings(
        pod=pod.name, namespace="x", revision="x", user_port=USER_PORT, timeout=timeout
    )
    return PodSpec(pod.name, settings, pod.netns, pod.cgroup, pod.addresses)


@pytest.mark.parametrize("timeout", [0.05, 300.0, 0.0])
def test_only_requests_far_past_the_revisions_timeout_are_reset(
    timeout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "OVERDUE_SECONDS", 0.05)
    kernel = Kernel.load()
    with Pod() as made:
        pod = ServedPod(spec(made, timeout), kernel, "")
        assert pod.attached is not None
        pod.attached.open_direct()
        exchange = open_exchange(made)
        exchange.ask(GET)
        now = 1000.0
        pod.backstop(now)

        def looked() -> bool:
            nonlocal now
            now += served.LOOK_SECONDS
            pod.backstop(now)
            return pod.overdue > 0

        if timeout == 0.05:
            until(looked, "the request is reset")
            assert pod.direct_in_flight() == 0
            assert pod.snapshot()["direct"]["overdue"] == 1
            with pytest.raises(ConnectionResetError):
                exchange.client.recv(1)
        else:  # no timeout, or one that has not passed
            assert not looked()
            assert pod.direct_in_flight() == 1
        exchange.close()
        pod.close()
    kernel.close()
