"""Which pod gets the next request: by fewest in flight and weight, and never who failed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.proxy.policy.balance import (
    LONGEST_EJECTION,
    SHORTEST_EJECTION,
    Balance,
    Member,
    Revision,
)

PODS = ("a:8012", "b:8012", "c:8012")


def balance(*revisions: Revision) -> Balance[str]:
    made: Balance[str] = Balance(lambda pod: f"client of {pod}")
    made.update(revisions or (Revision("r", PODS),))
    return made


def chosen(made: Balance[str], now: float = 0.0) -> Member[str]:
    member = made.choose(now)
    assert member is not None
    return member


def by_name(made: Balance[str], name: str) -> Member[str]:
    return next(member for member in made if member.name == name)


def fail(member: Member[str], now: float) -> None:
    member.failed(member.begin(), now)


def test_the_pod_with_the_fewest_in_flight_gets_the_next_request() -> None:
    made = balance()
    for name, running in zip(PODS, (2, 0, 1), strict=True):
        for _ in range(running):
            by_name(made, name).begin()
    assert chosen(made).name == "b:8012"


def test_equals_take_turns() -> None:
    made = balance()
    names = []
    for _ in range(6):
        member = chosen(made)
        member.begin()
        member.succeeded()
        names.append(member.name)
    assert names == [*PODS, *PODS]


def test_an_empty_set_offers_nobody() -> None:
    assert balance(Revision("r", ())).choose(0.0) is None
    nobody: Balance[str] = Balance(str)
    assert nobody.choose(0.0) is None


def test_a_pod_that_fails_is_left_out_for_twice_as_long_with_every_failure() -> None:
    made = balance(Revision("r", PODS[:1]))
    member, now = by_name(made, PODS[0]), 0.0
    wait = SHORTEST_EJECTION
    for _ in range(12):
        assert made.choose(now) is member
        fail(member, now)
        assert made.choose(now + wait * 0.999) is None
        assert member.state(now) == "ejected"
        now += wait
        wait = min(2 * wait, LONGEST_EJECTION)
    assert wait == LONGEST_EJECTION


def test_one_request_tries_an_ejected_pod_again_and_the_others_wait_for_its_answer() -> None:
    made = balance(Revision("r", PODS[:1]))
    member = by_name(made, PODS[0])
    fail(member, 0.0)
    later = SHORTEST_EJECTION
    assert made.choose(later) is member
    member.begin()
    assert member.state(later) == "probing"
    assert made.choose(later) is None
    member.succeeded()
    assert made.choose(later) is member
    assert member.state(later) == "up"


def test_a_probe_that_says_nothing_lets_another_one_try() -> None:
    made = balance(Revision("r", PODS[:1]))
    member = by_name(made, PODS[0])
    fail(member, 0.0)
    member.left(member.begin())
    assert made.choose(SHORTEST_EJECTION) is member


def test_requests_that_fail_together_are_one_failure() -> None:
    made = balance(Revision("r", PODS[:1]))
    member = by_name(made, PODS[0])
    begun = [member.begin() for _ in range(20)]
    for each in begun:
        member.failed(each, 0.0)
    assert (member.failures, member.in_flight) == (1, 0)
    assert made.choose(SHORTEST_EJECTION) is member


def test_a_late_answer_proves_that_an_ejected_pod_lives() -> None:
    made = balance(Revision("r", PODS[:1]))
    member = by_name(made, PODS[0])
    member.begin()
    fail(member, 0.0)
    member.succeeded()
    assert made.choose(0.0) is member


@pytest.mark.parametrize("weights", [(90.0, 10.0), (1.0, 1.0), (5.0, 3.0)])
def test_revisions_get_their_shares_evenly_mixed(weights: tuple[float, float]) -> None:
    made = balance(Revision("old", ("a:1",), weights[0]), Revision("new", ("b:1",), weights[1]))
    rounds = int(sum(weights)) * 10
    found = Counter(chosen(made).revision for _ in range(rounds))
    assert found == {"old": weights[0] * 10, "new": weights[1] * 10}
    half = Counter(chosen(made).revision for _ in range(rounds // 2))
    assert abs(half["new"] - weights[1] * 5) <= 1


def test_a_revision_without_pods_keeps_its_share_for_whoever_can_wake_it() -> None:
    made = balance(Revision("old", ("a:1",), 3), Revision("new", (), 1))
    found = [made.choose(0.0) for _ in range(8)]
    assert sum(each is None for each in found) == 2


def test_a_revision_of_weight_zero_gets_nothing() -> None:
    made = balance(Revision("old", ("a:1",), 0), Revision("new", ("b:1",), 1))
    assert {chosen(made).name for _ in range(9)} == {"b:1"}


def test_who_stays_keeps_its_client_and_who_leaves_is_named() -> None:
    made = balance(Revision("r", ("a:1", "b:1")))
    stays, leaves = by_name(made, "a:1"), by_name(made, "b:1")
    stays.begin()
    assert made.update([Revision("r", ("a:1", "c:1"), 7)]) == [leaves]
    assert leaves.removed and not stays.removed
    assert by_name(made, "a:1") is stays
    assert chosen(made).name == "c:1"
    assert len(made.update([])) == 2


moves = st.lists(
    st.tuples(
        st.sampled_from(("begin", "ok", "fail", "leave", "wait", "change")), st.integers(0, 9)
    ),
    max_size=200,
)


@given(moves)
def test_whatever_happens_no_count_is_lost_and_no_ejected_pod_is_chosen(
    script: list[tuple[str, int]],
) -> None:
    made = balance(Revision("x", PODS, 2), Revision("y", ("d:1", "e:1")))
    now = 0.0
    running: list[tuple[Member[str], int]] = []
    for what, number in script:
        if what == "begin":
            member = made.choose(now)
            if member is not None:
                assert not member.removed
                assert not member.failures or now >= member.until
                assert not member.probing
                running.append((member, member.begin()))
        elif what == "wait":
            now += number / 4
        elif what == "change":
            pods = PODS[: number % 4]
            made.update([Revision("x", pods, 1 + number), Revision("y", ("d:1", "e:1"))])
        elif running:
            member, begun = running.pop(number % len(running))
            if what == "ok":
                member.succeeded()
            elif what == "fail":
                member.failed(begun, now)
                assert member.failures >= 1
            else:
                member.left(begun)
        for member in made:
            mine = sum(each is member for each, _ in running)
            assert member.in_flight == mine
            if member.probing:
                assert any(e is member and b == member.failures for e, b in running)
