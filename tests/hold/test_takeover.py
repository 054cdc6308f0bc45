"""Hold, agents and the real sidecar under load: who accepts changes, no connection notices."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hold import table
from tests.hold.rig import BY_SIDECAR, HOLD, Agent, Clients, HoldPod
from tests.pods import needs_pods, until
from tests.sidecar.pod import GET, PROBE, USER, received, user_container
from weir.proxy.giveback import LET_GO_SECONDS

pytestmark = [
    needs_pods,
    pytest.mark.skipif(not HOLD.exists(), reason="needs hold/weir-hold (make hold)"),
]


@pytest.fixture
def pod() -> Iterator[HoldPod]:
    made = HoldPod()
    try:
        with user_container(made.place):
            made.hold()
            yield made
    finally:
        made.close()


@pytest.fixture
def agents() -> Iterator[list[Agent]]:
    made: list[Agent] = []
    yield made
    for agent in made:
        agent.close()


@pytest.fixture
def clients(pod: HoldPod) -> Iterator[Clients]:
    made = Clients(pod)
    yield made
    made.stop()


def stopped(agent: Agent) -> bool:
    status = Path(f"/proc/{agent.process.pid}/stat").read_text()
    return status.rpartition(")")[2].split()[0] == "T"


def borrowed(pod: HoldPod, agents: list[Agent], name: str) -> Agent:
    agents.append(pod.agent(name))
    agents[-1].says("held")
    return agents[-1]


def test_without_an_agent_the_sidecar_answers_what_was_asked_before_it_was_there(
    pod: HoldPod, clients: Clients
) -> None:
    clients.wait_for(BY_SIDECAR)
    clients.stop()
    assert not clients.failures


def test_a_killed_agent_is_followed_by_the_sidecar(
    pod: HoldPod, clients: Clients, agents: list[Agent]
) -> None:
    agent = borrowed(pod, agents, "one")
    clients.wait_for(b"one")
    clients.stop()  # what is in flight in a killed process is lost; what waits is not
    assert not clients.failures
    agent.process.send_signal(signal.SIGSTOP)
    until(lambda: stopped(agent), "the agent is stopped")
    with pod.connect() as waiting:  # in the backlog: nobody accepts
        agent.process.kill()
        waiting.sendall(PROBE)
        assert b"200" in received(waiting, b"\r\n\r\n").split(b"\r\n")[0]


def test_a_stopped_agent_wakes_up_to_dead_sockets(
    pod: HoldPod, clients: Clients, agents: list[Agent]
) -> None:
    agent = borrowed(pod, agents, "one")
    clients.wait_for(b"one")
    clients.stop()
    agent.process.send_signal(signal.SIGSTOP)
    until(lambda: stopped(agent), "the agent is stopped")
    later = Clients(pod)
    try:
        later.wait_for(BY_SIDECAR)
        agent.process.send_signal(signal.SIGCONT)
        agent.says("accept: Invalid argument")
        agent.says("listen: Invalid argument")
        agent.says("over")
        later.wait_for(BY_SIDECAR)
    finally:
        later.stop()
    assert not later.failures
    assert set(later.answers) == {BY_SIDECAR}
    assert "listens again" not in agent.lines


def test_an_agent_hands_over_to_another_one_without_a_failed_request(
    pod: HoldPod, clients: Clients, agents: list[Agent]
) -> None:
    old = borrowed(pod, agents, "old")
    clients.wait_for(b"old")
    agents.append(new := pod.agent("new"))
    new.says("rung")
    clients.wait_for(b"old")  # the ring of another changes nothing
    old.order("release")
    new.says("held")
    clients.wait_for(b"new")
    clients.stop()
    assert not clients.failures
    assert pod.name == "weir-hold"


def test_an_agent_takes_the_pod_back_from_the_sidecar_without_a_failed_request(
    pod: HoldPod, clients: Clients, agents: list[Agent]
) -> None:
    clients.wait_for(BY_SIDECAR)
    borrowed(pod, agents, "one")
    clients.wait_for(b"one")
    clients.stop()
    assert not clients.failures
    assert pod.name == "weir-hold"


def test_a_pod_that_is_told_to_stop_stays_until_its_agent_has_drained(
    pod: HoldPod, clients: Clients, agents: list[Agent]
) -> None:
    agent = borrowed(pod, agents, "one")
    pod.signal(signal.SIGTERM)
    agent.says("drain")
    clients.wait_for(b"one")
    assert pod.running
    clients.stop()
    agent.order("done")
    assert pod.exited() == 0
    assert not clients.failures


def test_a_second_sigterm_ends_it_at_once(pod: HoldPod, agents: list[Agent]) -> None:
    agent = borrowed(pod, agents, "one")
    pod.signal(signal.SIGTERM)
    agent.says("drain")
    pod.signal(signal.SIGTERM)
    assert pod.exited() == 1


def test_a_pod_without_an_agent_drains_in_the_sidecar_when_it_is_told_to_stop(
    pod: HoldPod,
) -> None:
    pod.signal(signal.SIGTERM)
    until(lambda: pod.running and pod.name != "weir-hold", "the sidecar")
    assert b" 503 " in pod.ask(PROBE).split(b"\r\n")[0]
    pod.signal(signal.SIGTERM)
    assert pod.exited() == 1


def test_hold_ends_after_the_revisions_timeout_though_its_agent_never_drains(
    agents: list[Agent],
) -> None:
    made = HoldPod()
    try:
        made.hold(REVISION_TIMEOUT_SECONDS="1")
        agent = borrowed(made, agents, "one")
        made.signal(signal.SIGTERM)
        agent.says("drain")
        assert made.exited() == 0
    finally:
        made.close()


def test_a_hold_beside_a_wedged_agent_of_its_predecessor_waits(
    pod: HoldPod, agents: list[Agent]
) -> None:
    agent = borrowed(pod, agents, "one")
    agent.process.send_signal(signal.SIGSTOP)
    pod.kill()
    pod.start([str(HOLD)])
    until(lambda: "somebody still does" in pod.said, "hold waits for the copy to be closed")
    assert pod.running
    agent.process.kill()
    # its port is taken only now: the ring could not have been answered before
    borrowed(pod, agents, "two")
    assert b"two" in pod.ask()


def test_nothing_is_lent_while_a_fence_would_lose_connections(pod: HoldPod) -> None:
    from tests.hold.agent_parts import ring_without_fences

    assert ring_without_fences(pod) == table.WORDS["WORD_UNSAFE"].encode()


@pytest.mark.parametrize("value", ["", "0", "65536", "80a", "-1"])
def test_a_bad_port_is_named(value: str) -> None:
    made = HoldPod()
    try:
        made.start([str(HOLD)], QUEUE_SERVING_PORT=value)
        assert made.exited() == 1
        assert "QUEUE_SERVING_PORT" in made.said
    finally:
        made.close()


def test_the_ports_of_a_queue_proxy_are_open_from_the_start(pod: HoldPod) -> None:
    for port in (8012, 8022, 9090, 9091):
        pod.connect(port).close()
    with pytest.raises(OSError):
        pod.connect(8112)  # there are no certificates


def test_an_idle_connection_does_not_keep_the_pod_with_the_sidecar(
    pod: HoldPod, agents: list[Agent]
) -> None:
    until(lambda: pod.running and pod.name != "weir-hold", "the sidecar")
    with pod.connect() as idle:
        idle.sendall(b"GET / HTTP/1.1\r\nHost: hello\r\n\r\n")
        received(idle, b"hello")
        borrowed(pod, agents, "one")
        assert idle.recv(1) == b""
    assert b"one" in pod.ask()


@pytest.fixture
def held(agents: list[Agent]) -> Iterator[HoldPod]:
    """With the sidecar, and a request in it that its user container does not answer."""
    made = HoldPod()
    try:
        with made.place.listen(USER) as user:
            user.settimeout(20.0)
            made.hold()
            with made.connect() as slow:
                slow.sendall(GET)
                backend, _ = user.accept()
                with backend:
                    received(backend, b"\r\n\r\n")
                    yield made
    finally:
        made.close()


def test_a_request_that_does_not_end_keeps_the_pod_with_the_sidecar(
    held: HoldPod, agents: list[Agent]
) -> None:
    agents.append(held.agent("one"))
    agents[-1].says("rung")
    waited = time.monotonic()
    while time.monotonic() < waited + LET_GO_SECONDS:  # also those that come while it lets go
        assert b" 200 " in held.ask(PROBE).split(b"\r\n")[0]
    assert "held" not in agents[-1].lines
    assert held.name != "weir-hold"


def test_a_sigterm_in_the_middle_of_letting_go_is_drained_by_the_sidecar(
    held: HoldPod, agents: list[Agent]
) -> None:
    agents.append(held.agent("one"))
    agents[-1].says("rung")
    held.signal(signal.SIGTERM)
    assert b" 503 " in held.ask(PROBE).split(b"\r\n")[0]  # it accepts again, and drains
    assert held.name != "weir-hold"
