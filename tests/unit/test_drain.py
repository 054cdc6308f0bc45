"""The drain of contract section 6, by an imagined clock."""

from __future__ import annotations

from math import inf

from weir.proxy.policy.drain import Drain, Phase

NEVER = -inf


def test_a_pod_that_nobody_stops_serves_for_ever() -> None:
    drain = Drain(grace=300)
    assert drain.look(1e9, NEVER, 0) is Phase.SERVING
    assert drain.due(NEVER) == inf


def test_thirty_seconds_without_a_request_after_sigterm_end_the_drain() -> None:
    drain = Drain(grace=300)
    drain.terminate(100)
    assert drain.due(NEVER) == 130
    assert drain.look(129.9, NEVER, 0) is Phase.DRAINING
    assert drain.look(130, NEVER, 0) is Phase.DRAINED


def test_each_new_request_starts_the_thirty_seconds_anew() -> None:
    drain = Drain(grace=300)
    drain.terminate(100)
    assert drain.look(130, 120, 0) is Phase.DRAINING
    assert drain.due(120) == 150
    assert drain.look(150, 120, 0) is Phase.DRAINED


def test_requests_before_the_sigterm_do_not_shorten_it() -> None:
    drain = Drain(grace=300)
    drain.terminate(100)
    assert drain.due(99) == 130


def test_a_request_in_flight_holds_the_end_of_the_drain() -> None:
    drain = Drain(grace=300)
    drain.terminate(100)
    assert drain.look(131, NEVER, 1) is Phase.DRAINING
    assert drain.look(200, NEVER, 1) is Phase.DRAINING
    assert drain.look(201, NEVER, 0) is Phase.DRAINED


def test_a_held_drain_leaves_the_user_container_time_to_shut_down() -> None:
    drain = Drain(grace=60)
    drain.terminate(100)
    assert drain.look(154.9, NEVER, 1) is Phase.DRAINING
    assert drain.look(155, NEVER, 1) is Phase.DRAINED


def test_a_grace_period_shorter_than_the_quiet_one_holds_nothing() -> None:
    drain = Drain(grace=10)
    drain.terminate(100)
    assert drain.look(130, NEVER, 1) is Phase.DRAINED


def test_a_hook_without_sigterm_is_cancelled_after_a_second() -> None:
    """A failed liveness probe restarts the user container alone."""
    drain = Drain(grace=300)
    drain.hook(100)
    assert drain.due(NEVER) == 101
    assert drain.look(100.9, NEVER, 0) is Phase.DRAINING
    assert drain.look(101, NEVER, 0) is Phase.SERVING
    assert drain.due(NEVER) == inf


def test_the_first_of_several_hooks_counts_for_the_cancellation() -> None:
    drain = Drain(grace=300)
    drain.hook(100)
    drain.hook(100.8)
    assert drain.look(101, NEVER, 0) is Phase.SERVING


def test_a_cancelled_drain_can_begin_again() -> None:
    drain = Drain(grace=300)
    drain.hook(100)
    drain.look(101, NEVER, 0)
    drain.terminate(200)
    assert drain.look(229, NEVER, 0) is Phase.DRAINING
    assert drain.look(230, NEVER, 0) is Phase.DRAINED


def test_sigterm_within_the_second_after_the_hook_makes_it_a_real_drain() -> None:
    drain = Drain(grace=300)
    drain.hook(100)
    drain.terminate(100.5)
    assert drain.due(NEVER) == 130
    assert drain.look(101, NEVER, 0) is Phase.DRAINING
    assert drain.look(130, NEVER, 0) is Phase.DRAINED


def test_a_hook_after_sigterm_changes_nothing() -> None:
    drain = Drain(grace=300)
    drain.terminate(100)
    drain.hook(110)
    assert drain.due(NEVER) == 130


def test_drained_is_for_good() -> None:
    drain = Drain(grace=300)
    drain.terminate(100)
    drain.look(130, NEVER, 0)
    drain.hook(131)
    drain.terminate(132)
    assert drain.look(140, 139, 5) is Phase.DRAINED
    assert drain.due(139) == inf
