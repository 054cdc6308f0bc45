"""Agents end at random moments, fifty times, under load, and the next has rung already."""

from __future__ import annotations

import os
import random
import signal

import pytest

from tests.hold.rig import HOLD, Agent, Clients, HoldPod
from tests.pods import needs_pods
from tests.sidecar.pod import user_container

pytestmark = [
    needs_pods,
    pytest.mark.skipif(not HOLD.exists(), reason="needs hold/weir-hold (make hold)"),
]
ROUNDS = int(os.environ.get("WEIR_HOLD_ROUNDS", "50"))
CLIENTS = 4


def release(agent: Agent) -> int:
    agent.order("release")
    return 0


def die_at_rest(agent: Agent) -> int:
    """With copies and the lease, but nothing accepted: what then fails is the fence's fault."""
    agent.order("freeze")
    agent.says("frozen")
    agent.process.send_signal(signal.SIGKILL)
    return 0


def die(agent: Agent) -> int:
    """What it had accepted is lost with it: at most one request a client."""
    agent.process.send_signal(signal.SIGKILL)
    return CLIENTS


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ways", [(release, die_at_rest), (release, die)], ids=["rest", "any time"])
def test_only_what_a_killed_agent_had_accepted_is_lost(ways: tuple[object, ...]) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    pod = HoldPod()
    clients = None
    agents: list[Agent] = []
    lost = 0
    try:
        with user_container(pod.place):
            pod.hold()
            agents.append(pod.agent("0"))
            agents[-1].says("held")
            clients = Clients(pod, CLIENTS)
            for number in range(1, ROUNDS + 1):
                agents.append(pod.agent(str(number)))
                agents[-1].says("rung")
                clients.wait_for(str(number - 1).encode(), chance.randrange(1, 30))
                lost += chance.choice(ways)(agents[-2])  # type: ignore[operator]
                agents[-1].says("held")
                clients.wait_for(str(number).encode(), 1)
            clients.stop()
        print(f"{sum(clients.answers.values())} answers, failures {clients.failures}")
        assert len(clients.failures) <= lost
        assert not [failure for failure in clients.failures if "Refused" in failure]
    finally:
        if clients is not None:
            clients.stop()
        for agent in agents:
            agent.close()
        pod.close()
