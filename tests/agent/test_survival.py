"""The agent is killed: direct requests don't notice, and the next agent goes on counting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.agent import borrowed
from tests.agent.borrowed import Clients, HeldPod
from tests.agent.test_agent import Agent, described
from tests.hold.rig import HOLD
from tests.kernel.test_lifecycle import ALL_PROGRAMS, attached_to, refused
from tests.kernel.test_pins import Caller, pods_of, serve
from tests.pods import DIRECT_PORT, Pod, needs_kernel, until
from weir.proxy.kernel import Kernel

pytestmark = needs_kernel

KILLS = 12


@pytest.fixture
def pod() -> Iterator[Pod]:
    with Pod() as made:
        yield made


def kill(agent: Agent) -> None:
    agent.process.kill()
    agent.process.wait()
    if agent.process.stderr is not None:
        agent.process.stderr.close()


def test_agents_are_killed_at_random_moments_under_load_and_no_direct_request_is_lost(
    root: Path, tmp_path: Path, pod: Pod
) -> None:
    random = Random(3)
    serve(pod)
    agent = Agent(tmp_path, described(pod), pins=root)
    agent.until_offered()
    callers = [Caller(pod) for _ in range(2)]
    for caller in callers:
        caller.start()
    for _ in range(KILLS):
        kill(agent)
        agent = Agent(tmp_path, described(pod), pins=root)
        time.sleep(random.uniform(0, 0.5))
    agent.until_offered()
    for caller in callers:
        caller.stop()
    answered = sum(caller.answered for caller in callers)
    until(lambda: agent.pod()["direct"]["open_connections"] == 0)
    direct = agent.pod()["direct"]
    assert (direct["started"], direct["finished"], direct["aborted"]) == (answered, answered, 0)
    assert direct["connections"] == sum(caller.connections for caller in callers)
    agent.stop()
    assert attached_to(pod) == set()
    assert list(root.iterdir()) == []


def test_an_adopted_pod_that_is_not_ready_is_closed_after_a_while(
    root: Path, tmp_path: Path, pod: Pod
) -> None:
    kernel = Kernel.load(root=root)
    attached = kernel.attach(pod.target())
    attached.open_direct()
    attached.release()
    pod.backend().listen()

    def opened() -> bool:
        settings = kernel.pods.get(attached.cookie)
        return settings is not None and bool(settings["enabled"])

    # the app listens and never answers: a probe by HTTP does not find it ready
    agent = Agent(tmp_path, described(pod, readinessPath="/"), pins=root)
    assert opened()
    until(lambda: not opened(), "the direct port is closed", seconds=30)
    agent.stop()
    assert attached_to(pod) == set()
    kernel.close()


def test_a_pod_that_ended_while_there_was_no_agent_is_swept_by_the_next(
    root: Path, tmp_path: Path
) -> None:
    with Pod() as dead, Pod() as living:
        agent = Agent(tmp_path, described(dead), described(living), pins=root)
        until(lambda: len(pods_of(root)) == 2)
        kill(agent)
        assert attached_to(living) == ALL_PROGRAMS
        dead.__exit__(None, None, None)
        agent = Agent(tmp_path, described(living), pins=root)
        until(lambda: len(pods_of(root)) == 1)
        agent.stop()
        assert list(root.iterdir()) == []


@pytest.mark.skipif(not HOLD.exists(), reason="needs hold/weir-hold (make hold)")
def test_direct_requests_do_not_notice_that_a_pod_goes_from_agent_to_agent(
    root: Path, tmp_path: Path
) -> None:
    with HeldPod() as pod:
        agents = [borrowed.Agent(tmp_path / "0", pod, pins=root).until_held()]
        agents[0].until_open()
        clients = Clients(pod, port=DIRECT_PORT)
        try:
            for number in range(1, 5):
                clients.more()
                agents.append(borrowed.Agent(tmp_path / str(number), pod, pins=root))
                if number % 2:
                    agents[-2].stop()  # gives the pod back
                else:
                    agents[-2].close()  # is killed
                agents[-1].until_held().until_open()
            clients.more()
        finally:
            clients.stop()
        assert clients.failures == []
        until(lambda: agents[-1].pod()["direct"]["open_connections"] == 0)
        direct = agents[-1].pod()["direct"]
        assert (direct["finished"], direct["aborted"]) == (clients.answers, 0)
        for agent in agents:
            agent.close()
    kernel = Kernel.load(root=root)
    kernel.close()
    assert list(root.iterdir()) == []


def test_a_living_pod_that_the_next_agent_is_not_told_of_is_closed_and_the_log_names_it(
    root: Path, tmp_path: Path
) -> None:
    with Pod() as told, Pod() as forgotten:
        serve(told)
        serve(forgotten)
        agent = Agent(tmp_path, described(told), described(forgotten), pins=root)
        agent.until_offered(0)
        agent.until_offered(1)
        kill(agent)
        assert not refused(forgotten), "nobody is there, and everything goes on"
        agent = Agent(tmp_path, described(told), pins=root)
        agent.until_offered()
        until(lambda: refused(forgotten), "its port is closed", seconds=100)
        assert not refused(told)
        _, said = agent.stop()
        assert f"no agent claims the pod with {forgotten.address}" in said
        assert attached_to(forgotten) == ALL_PROGRAMS, "what is open is still counted"
    Kernel.load(root=root).close()
    assert list(root.iterdir()) == []
