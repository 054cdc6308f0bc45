"""Supervisors and workers are killed at random moments, fifty times, under load."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path

import pytest

from tests.agent.borrowed import Agent, Clients, HeldPod, closing
from tests.hold.rig import HOLD
from tests.pods import needs_kernel, until

pytestmark = [
    needs_kernel,
    pytest.mark.skipif(not HOLD.exists(), reason="needs hold/weir-hold (make hold)"),
]
ROUNDS = int(os.environ.get("WEIR_HOLD_ROUNDS", "50"))
CLIENTS = 4


def seeded() -> random.Random:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.timeout(600)
def test_a_killed_supervisor_costs_no_request_at_all(tmp_path: Path) -> None:
    """Its workers end what they have, and say so to those that would ask for more."""
    chance = seeded()
    with HeldPod() as pod, contextlib.ExitStack() as undo:
        agents = [Agent(tmp_path / "0", pod)]
        undo.enter_context(closing(agents[0]))
        agents[0].until_held()
        undo.enter_context(closing(clients := Clients(pod, CLIENTS)))
        for number in range(1, ROUNDS + 1):
            if chance.random() < 0.8:  # the next one waits already; else the sidecar serves first
                agents.append(Agent(tmp_path / str(number), pod))
                undo.enter_context(closing(agents[-1]))
                agents[-1].until_reason("rung")
                clients.more(chance.randrange(1, 100))
                agents[-2].process.kill()
            else:
                clients.more(chance.randrange(1, 100))
                agents[-1].process.kill()
                until(lambda: pod.by_sidecar, "the sidecar", 30.0)
                agents.append(Agent(tmp_path / str(number), pod))
                undo.enter_context(closing(agents[-1]))
            agents[-2].close()
            agents[-1].until_held()
            clients.more(1)
        clients.stop()
        print(f"{clients.answers} answers")
        assert not clients.failures


@pytest.mark.timeout(600)
def test_a_killed_worker_costs_only_what_was_in_it(tmp_path: Path) -> None:
    chance = seeded()
    with HeldPod() as pod, closing(agent := Agent(tmp_path, pod, workers=2)):
        agent.until_held()
        with closing(clients := Clients(pod, CLIENTS)):
            for killed in range(ROUNDS):
                clients.more(chance.randrange(1, 100))
                until(lambda: len(agent.workers) == 2, "both workers", 30.0)
                before = len(clients.failures)
                for worker in agent.workers:  # the one that has the pod is among them
                    os.kill(worker, signal.SIGKILL)
                until(
                    lambda n=killed: agent.pod()["worker_restarts"] > n,  # type: ignore[misc]
                    "the pod has moved",
                )
                clients.more(1)
                assert len(clients.failures) - before <= CLIENTS
        print(f"{clients.answers} answers, {len(clients.failures)} lost")
        assert not [failure for failure in clients.failures if failure.startswith("refused")]
