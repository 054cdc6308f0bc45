"""How many events of a route are on their way at a time, and how many start per second."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from weir.adaptor.gate import SLACK, Gate


def test_no_more_than_the_limit_is_inside() -> None:
    gate = Gate(2, None)
    for _ in range(2):
        assert gate.wait(0.0) == 0.0
        gate.enter(0.0)
    assert gate.wait(100.0) == math.inf
    gate.leave()
    assert gate.wait(100.0) == 0.0


def test_a_rate_spaces_the_events() -> None:
    gate = Gate(None, 2.0)
    gate.enter(0.0)
    assert gate.wait(0.0) == 0.5 - SLACK
    assert gate.wait(0.5) == 0.0


@given(st.floats(0.5, 5000.0), st.lists(st.floats(0.0, 0.3), min_size=1, max_size=200))
def test_no_second_ever_sees_more_than_the_rate_and_its_slack(
    rate: float, pauses: list[float]
) -> None:
    gate, now = Gate(None, rate), 0.0
    starts: list[float] = []
    for pause in pauses:
        now += pause
        for _ in range(20):
            if gate.wait(now) > 0.0:
                break
            gate.enter(now)
            starts.append(now)
    for start in starts:
        within = sum(start <= each < start + 1.0 for each in starts)
        assert within <= math.ceil(rate * (1.0 + SLACK)) + 1


def test_a_busy_gate_reaches_its_rate_though_timers_are_late() -> None:
    gate, now, count = Gate(None, 1000.0), 0.0, 0
    while now < 10.0:
        while gate.wait(now) == 0.0:
            gate.enter(now)
            count += 1
        now += 0.0137
    assert count >= 9_900
