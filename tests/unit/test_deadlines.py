"""When the three timers fire (contract 3.7)."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.proxy.contract import RevisionSettings
from weir.proxy.policy.deadlines import Cause, Deadlines, Timeouts

ALL = Timeouts(request=10, response_start=4, idle=2)


@pytest.mark.parametrize(
    ("timeouts", "now", "cause"),
    [
        (Timeouts(10), 109.9, None),
        (Timeouts(10), 110.0, Cause.REQUEST),
        (Timeouts(0), 1e9, None),
        (Timeouts(10, response_start=4), 103.9, None),
        (Timeouts(10, response_start=4), 104.0, Cause.RESPONSE_START),
        (Timeouts(10, idle=2), 101.9, None),
        (Timeouts(10, idle=2), 102.0, Cause.IDLE),
        (ALL, 104.0, Cause.RESPONSE_START),
        (ALL, 110.0, Cause.REQUEST),
    ],
)
def test_before_the_response(timeouts: Timeouts, now: float, cause: Cause | None) -> None:
    deadlines = Deadlines(timeouts, 100.0)
    assert deadlines.fired(now) is cause


def test_the_response_start_timer_is_over_once_a_byte_was_written() -> None:
    deadlines = Deadlines(Timeouts(10, response_start=4), 100.0)
    deadlines.wrote(103.0)
    assert deadlines.fired(109.0) is None
    assert deadlines.next() == 110.0


def test_a_write_arms_the_idle_timer_anew() -> None:
    deadlines = Deadlines(Timeouts(10, idle=2), 100.0)
    assert deadlines.next() == 102.0
    deadlines.wrote(101.5)
    assert deadlines.next() == 103.5
    assert deadlines.fired(103.0) is None
    assert deadlines.fired(103.5) is Cause.IDLE


def test_the_maximum_duration_ends_a_response_that_flows() -> None:
    deadlines = Deadlines(Timeouts(3, idle=2), 0.0)
    for tick in range(1, 30):
        deadlines.wrote(tick / 10)
    assert deadlines.fired(3.0) is Cause.REQUEST


def test_with_all_timers_off_nothing_is_due() -> None:
    assert Deadlines(Timeouts(0), 5.0).next() == inf
    assert Timeouts(0).shortest == inf


def test_the_settings_of_a_revision() -> None:
    settings = RevisionSettings(
        user_port=1, timeout=300, response_start_timeout=20, idle_timeout=30
    )
    assert Timeouts.of(settings) == Timeouts(300, 20, 30)
    assert Timeouts.of(settings).shortest == 20


seconds = st.one_of(st.just(0.0), st.floats(0.001, 100))


@given(
    timeouts=st.builds(Timeouts, seconds, seconds, seconds),
    start=st.floats(0, 1e6),
    writes=st.lists(st.floats(0, 50), max_size=10),
    wait=st.floats(0, 300),
)
def test_it_fires_exactly_when_next_said(
    timeouts: Timeouts, start: float, writes: list[float], wait: float
) -> None:
    deadlines = Deadlines(timeouts, start)
    now = start
    assert deadlines.next() >= start + timeouts.shortest - 1e-6
    for pause in writes:
        now += pause
        if deadlines.fired(now):
            return
        before = deadlines.next()
        deadlines.wrote(now)
        assert deadlines.next() >= before  # a deadline never moves earlier
    now += wait
    assert (deadlines.fired(now) is not None) == (now >= deadlines.next())
