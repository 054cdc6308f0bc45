"""Scenarios, and what it takes for two accounts of one scenario to agree.

A scenario is played in two worlds and notes facts in each. Where the accounts differ, the
difference must be one of the named deviations (deviations.py), with exactly those two values; a
deviation that is named and does not show is an error too, so that the list can't rot.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from tests.contract.world import World

Play = Callable[[World], Awaitable[None]]
ABSENT = "(nothing)"


@dataclass(frozen=True)
class Scenario:
    """`ready`: the sidecar runs and listens before `play` begins, and reports after it."""

    name: str
    section: str
    play: Play
    environment: Mapping[str, str | None] = field(default_factory=dict)
    ready: bool = True
    long: bool = False
    """It waits far more than it works: it is played beside the others, from the start."""

    @property
    def sentence(self) -> str:
        return self.name.replace("_", " ")


SCENARIOS: dict[str, Scenario] = {}


def add(scenario: Scenario) -> None:
    assert scenario.name not in SCENARIOS, scenario.name
    SCENARIOS[scenario.name] = scenario


def scenario(
    section: str, *, ready: bool = True, long: bool = False, **environment: str | None
) -> Callable[[Play], Play]:
    """A function whose name is a sentence of the contract."""

    def register(play: Play) -> Play:
        name: str = getattr(play, "__name__", "")
        add(Scenario(name, section, play, environment, ready, long))
        return play

    return register


@dataclass(frozen=True)
class Difference:
    fact: str
    original: str
    weir: str

    def __str__(self) -> str:
        return f"{self.fact}\n    queue-proxy: {self.original!r}\n    weir:        {self.weir!r}"


@dataclass(frozen=True)
class Deviation:
    """A difference that is meant: `scenario`s and facts by their names, and why.

    `facts` are fact -> (what the queue-proxy of 1.15 says, what Weir says).
    """

    scenario: str
    facts: Mapping[str, tuple[str, str]]
    reason: str


def differences(original: Mapping[str, str], weir: Mapping[str, str]) -> list[Difference]:
    facts = [*original, *(fact for fact in weir if fact not in original)]
    pairs = ((fact, original.get(fact, ABSENT), weir.get(fact, ABSENT)) for fact in facts)
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def judge(
    name: str,
    original: Mapping[str, str],
    weir: Mapping[str, str],
    deviations: list[Deviation],
) -> list[str]:
    """What is wrong: differences without a name, and names without a difference."""
    named: dict[str, tuple[str, str]] = {}
    for deviation in deviations:
        if deviation.scenario == name:
            named.update(deviation.facts)
    wrong = []
    for difference in differences(original, weir):
        expected = named.pop(difference.fact, None)
        if expected != (difference.original, difference.weir):
            wrong.append(f"differs: {difference}")
            if expected is not None:
                wrong.append(f"    named otherwise: {expected}")
    wrong += [f"no longer differs: {fact}" for fact in named]
    return wrong
