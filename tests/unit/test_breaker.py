"""Admission under containerConcurrency (contract 3.6), without sockets or time."""

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.proxy.policy.breaker import Admission, Breaker, Place


def nothing() -> None:
    pass


def test_a_limit_of_one_runs_one_lets_ten_wait_and_refuses_the_twelfth() -> None:
    breaker = Breaker(1)
    places = [breaker.admit(nothing).place for _ in range(13)]
    assert places == [Place.RUNNING, *[Place.WAITING] * 10, Place.REFUSED, Place.REFUSED]


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_eleven_times_the_limit_are_admitted(limit: int) -> None:
    breaker = Breaker(limit)
    places = [breaker.admit(nothing).place for _ in range(11 * limit + 1)]
    assert places.count(Place.RUNNING) == limit
    assert places.count(Place.WAITING) == 10 * limit
    assert places[-1] is Place.REFUSED


def test_waiters_get_their_turn_in_the_order_they_came() -> None:
    breaker = Breaker(1)
    turns: list[int] = []
    first = breaker.admit(nothing)
    waiters = [breaker.admit(partial(turns.append, number)) for number in range(3)]
    for admission in (first, *waiters):
        admission.leave()
    assert turns == [0, 1, 2]
    assert (breaker.running, breaker.waiting) == (0, 0)


def test_a_waiter_that_leaves_gives_its_turn_to_the_next() -> None:
    breaker = Breaker(1)
    turns: list[int] = []
    first = breaker.admit(nothing)
    leaver = breaker.admit(lambda: turns.append(0))
    breaker.admit(lambda: turns.append(1))
    leaver.leave()
    first.leave()
    assert turns == [1]


def test_leaving_twice_gives_one_slot_back() -> None:
    breaker = Breaker(1)
    first = breaker.admit(nothing)
    first.leave()
    second = breaker.admit(nothing)
    first.leave()
    assert second.place is Place.RUNNING
    assert breaker.running == 1


def test_a_refused_admission_holds_nothing() -> None:
    breaker = Breaker(1, depth=0)
    running = breaker.admit(nothing)
    refused = breaker.admit(nothing)
    refused.leave()
    assert breaker.running == 1
    running.leave()
    assert breaker.admit(nothing).place is Place.RUNNING


def test_a_turn_that_leaves_at_once_does_not_stop_the_queue() -> None:
    breaker = Breaker(1)
    first = breaker.admit(nothing)
    admissions: list[Admission] = []

    def leave_at_once(index: int) -> Callable[[], None]:
        def turn() -> None:
            admissions[index].leave()

        return turn

    for index in range(10):
        admissions.append(breaker.admit(leave_at_once(index)))
    first.leave()
    assert (breaker.running, breaker.waiting) == (0, 0)


def test_a_limit_below_one_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="0 needs no breaker"):
        Breaker(0)


@given(
    limit=st.integers(1, 4),
    depth=st.integers(0, 6),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=200),
)
def test_never_over_the_limit_never_idle_while_someone_waits_and_first_in_first_out(
    limit: int, depth: int, steps: list[tuple[bool, int]]
) -> None:
    breaker = Breaker(limit, depth)
    present: list[tuple[int, Admission]] = []
    waiting: list[int] = []
    for number, (admit, pick) in enumerate(steps):
        if admit:

            def turn(mine: int = number) -> None:
                assert waiting.pop(0) == mine

            admission = breaker.admit(turn)
            if admission.place is Place.REFUSED:
                assert (breaker.running, breaker.waiting) == (limit, depth)
                continue
            if admission.place is Place.WAITING:
                waiting.append(number)
            present.append((number, admission))
        elif present:
            leaver, admission = present.pop(pick % len(present))
            if admission.place is Place.WAITING:
                waiting.remove(leaver)
            admission.leave()
        assert breaker.running <= limit
        assert breaker.waiting == len(waiting) <= depth
        assert breaker.running == limit or not waiting
        assert breaker.running + breaker.waiting == len(present)
