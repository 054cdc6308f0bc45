"""Latencies: exact enough, mergeable, monotonic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.proxy.policy.histogram import BUCKETS, Histogram, Latencies, bucket, lower_bound


def test_every_bucket_begins_where_the_one_before_ends() -> None:
    for index in range(1, BUCKETS):
        assert bucket(lower_bound(index)) == index
        assert bucket(lower_bound(index) - 1) == index - 1


@given(st.integers(0, 60_000_000_000))
def test_a_bucket_is_no_wider_than_a_sixteenth_of_its_values(microseconds: int) -> None:
    index = bucket(microseconds)
    low, high = lower_bound(index), lower_bound(index + 1)
    assert low <= microseconds < high
    assert high - low <= max(1, microseconds / 16)


@given(st.floats(0, 1e6))
def test_recording_and_the_bucket_function_agree(seconds: float) -> None:
    histogram = Histogram()
    histogram.record(seconds)
    assert histogram.snapshot().counts[bucket(int(seconds * 1e6))] == 1


def test_nothing_recorded_has_quantiles_of_zero() -> None:
    assert Histogram().snapshot().quantile(0.99) == 0.0
    assert Latencies().quantile(0.5) == 0.0


def test_a_quantile_outside_its_range_is_an_error() -> None:
    with pytest.raises(ValueError, match="outside"):
        Latencies((1,)).quantile(1.5)


@given(st.lists(st.floats(1e-5, 100), min_size=1, max_size=200), st.floats(0, 1))
def test_a_quantile_is_within_a_bucket_of_the_true_one(values: list[float], q: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    ordered = sorted(values)
    rank = q * len(values)
    true = ordered[max(0, min(len(values), -int(-rank // 1)) - 1)]
    got = histogram.snapshot().quantile(q)
    assert got == pytest.approx(true, rel=1 / 8, abs=2e-6)


@given(st.lists(st.floats(0, 10), max_size=50), st.lists(st.floats(0, 10), max_size=50))
def test_merged_parts_are_as_if_recorded_in_one_place(one: list[float], two: list[float]) -> None:
    both, first, second = Histogram(), Histogram(), Histogram()
    for part, values in ((first, one), (second, two)):
        for value in values:
            part.record(value)
            both.record(value)
    merged = Latencies.merged([first.snapshot(), second.snapshot()])
    assert merged == both.snapshot()
    assert merged.since(first.snapshot()) == second.snapshot()
    assert merged.total() == len(one) + len(two)
