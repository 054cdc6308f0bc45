"""Never two parties accept: every order of steps of hold, the sidecar and agents is walked."""

from __future__ import annotations

import os

import pytest

from tests.hold import table
from tests.hold.model import Agent, AgentTable, HoldTable, Model, World, walk
from weir.proxy.policy.lease import BEAT_SECONDS, TABLE, Action, Event, Lease, Phase


def violation(hold: HoldTable, agent: AgentTable, agents: int = 2) -> list[str]:
    """The shortest way to two owners, empty when there is none."""
    model = Model(hold, agent)
    for world, path in walk(World((Agent(),) * agents), model.steps):
        if len(world.owners()) > 1:
            return [*path(), f"=> {' and '.join(world.owners())}"]
    return []


@pytest.mark.timeout(600)
def test_a_connection_never_has_two_parties_to_go_to_whatever_is_killed_stopped_or_late() -> None:
    model = Model(table.TABLE, TABLE)
    worlds = 0
    agents = int(os.environ.get("WEIR_MODEL_AGENTS", "2"))  # 3: five million worlds, minutes
    for world, path in walk(World((Agent(),) * agents), model.steps):
        worlds += 1
        assert len(world.owners()) < 2, path()
        for agent in world.agents:  # what a late waker could do is in the walk, too
            assert not (agent.accepting and agent.copy == "live" and world.hold == "SIDECAR")
    print(f"{worlds} worlds")
    assert model.rows_taken == set(table.TABLE), "a row of lease.h that nothing leads to"
    assert model.events_taken == set(TABLE), "a row of policy/lease.py that nothing leads to"


def test_a_pod_is_served_or_gone_without_any_agents_help() -> None:
    """From wherever it is, hold alone gets there; after a kill, once no copy listens any more."""
    model = Model(table.TABLE, TABLE)
    for world, path in walk(World((Agent(),) * 2), model.steps):
        if world.hold == "KILLED" and any(a.listener == "live" for a in world.agents):
            continue
        alone = walk(world, model.holds)
        assert any(w.hold in ("SIDECAR", "GONE") for w, _ in alone), path()


FENCED = sorted(key for key, (_, actions) in table.TABLE.items() if "FENCE" in actions)


@pytest.mark.parametrize("row", FENCED, ids=" ".join)
def test_without_its_fence_each_of_these_rows_would_make_two(row: tuple[str, str]) -> None:
    after, actions = table.TABLE[row]
    weaker = {**table.TABLE, row: (after, tuple(a for a in actions if a != "FENCE"))}
    assert violation(weaker, TABLE)


@pytest.mark.parametrize("phase", [Phase.HELD, Phase.ENDING])
def test_an_agent_that_says_released_before_it_closes_would_make_two(phase: Phase) -> None:
    after, actions = TABLE[phase, Event.GIVE_UP]
    hasty = (Action.SAY_RELEASED, *(a for a in actions if a is not Action.SAY_RELEASED))
    assert violation(table.TABLE, {**TABLE, (phase, Event.GIVE_UP): (after, hasty)})


def test_the_words_on_the_lease_are_the_same_on_both_sides() -> None:
    words = table.WORDS
    assert words["WORD_BEAT"] == Action.BEAT.value
    assert words["WORD_RELEASED"] == Action.SAY_RELEASED.value
    assert words["WORD_DONE"] == Action.SAY_DONE.value
    assert words["WORD_GRANT"] == Event.GRANTED.value
    assert words["WORD_END"] == Event.TOLD_TO_END.value
    assert table.NUMBERS["BEAT_MS"] == BEAT_SECONDS * 1000
    assert table.NUMBERS["SILENCE_MS"] >= 3 * table.NUMBERS["BEAT_MS"]


def test_every_name_in_the_table_is_declared() -> None:
    assert {s for s, _ in table.TABLE} | {n for n, _ in table.TABLE.values()} == set(table.STATES)
    assert {e for _, e in table.TABLE} == set(table.EVENTS)
    assert {a for _, actions in table.TABLE.values() for a in actions} == set(table.ACTIONS)


def test_beats_that_were_missed_are_not_made_up_for() -> None:
    lease = Lease()
    assert Action.BEAT in lease.happened(Event.GRANTED, 10.0)
    assert lease.look(10.5) == ()
    assert lease.look(99.0) == (Action.BEAT,)
    assert lease.look(99.5) == ()
    lease.happened(Event.HUNG_UP, 100.0)
    assert lease.look(1e9) == ()
