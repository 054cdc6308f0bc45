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
from tests.kernel.bpffs import mounted
from tests.pods import DIRECT_PORT, needs_kernel, until

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
def test_with_pins_neither_killed_nor_updated_agents_cost_a_direct_or_relayed_request(
    tmp_path: Path,
) -> None:
    chance = seeded()
    (tmp_path / "bpf").mkdir()
    with (
        mounted(tmp_path / "bpf") as pins,
        HeldPod() as pod,
        contextlib.ExitStack() as undo,
    ):
        agents = [Agent(tmp_path / "0", pod, pins=pins)]
        undo.enter_context(closing(agents[0]))
        agents[0].until_held().until_open()
        undo.enter_context(closing(relayed := Clients(pod, 2)))
        undo.enter_context(closing(direct := Clients(pod, 2, DIRECT_PORT)))
        for number in range(1, ROUNDS // 2 + 1):
            agents.append(Agent(tmp_path / str(number), pod, pins=pins))
            undo.enter_context(closing(agents[-1]))
            agents[-1].until_reason("rung")
            direct.more(chance.randrange(1, 200))
            if chance.random() < 0.5:
                agents[-2].process.kill()
                agents[-2].close()
            else:
                assert agents[-2].stop() == 0
            agents[-1].until_held().until_open()
            direct.more(1)
            relayed.more(1)
        direct.stop()
        relayed.stop()
        print(f"{direct.answers} direct and {relayed.answers} relayed answers")
        assert not direct.failures
        assert not relayed.failures
        started = agents[-1].pod()["direct"]["started"]
        assert started >= direct.answers  # the count went on through all of them


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
