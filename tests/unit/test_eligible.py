"""Which pods offer a direct port, and what is said of those that don't."""

from dataclasses import replace

import pytest

from weir.proxy.policy.eligible import REASONS, DirectFacts, refusal

FINE = DirectFacts(
    container_concurrency=0,
    user_port=8080,
    direct_port=8014,
    ready=True,
    draining=False,
    listener=True,
)


def test_a_ready_pod_with_a_listener_is_offered() -> None:
    assert refusal(FINE) == ("", "")


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        (replace(FINE, container_concurrency=2), "containerConcurrency is 2"),
        (replace(FINE, user_port=8014), "8014"),
        (replace(FINE, ready=False), "not ready"),
        (replace(FINE, draining=True), "draining"),
        (replace(FINE, listener=False), "no listener on port 8080"),
        (replace(FINE, kernel="Linux 5.10 has no bpf_loop"), "bpf_loop"),
        (replace(FINE, mesh="Istio: envoy, pid 7"), "in a service mesh (Istio: envoy, pid 7)"),
    ],
)
def test_every_doubt_ends_in_the_relay_with_its_reason(facts: DirectFacts, word: str) -> None:
    word_of_few, reason = refusal(facts)
    assert word in reason
    assert word_of_few in REASONS


def test_the_reason_that_lasts_is_named_before_the_one_that_passes() -> None:
    found = refusal(replace(FINE, container_concurrency=1, ready=False))
    assert found.word == "container_concurrency"
