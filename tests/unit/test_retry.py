"""Knative's delivery rules, and our line between a bad event and a sink that is down."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.adaptor.retry import (
    LONGEST_BACKOFF,
    LONGEST_PROBE,
    LONGEST_RETRY_AFTER,
    Delivery,
    Verdict,
    judge,
    judge_silence,
    parse_duration,
    retry_after,
)


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        *((each, Verdict.DELIVERED) for each in (200, 201, 202, 204, 299)),
        *((each, Verdict.REJECTED) for each in (100, 199, 300, 301, 307, 400, 401, 403, 410)),
        *((each, Verdict.REJECTED) for each in (413, 415, 422, 499)),
        *((each, Verdict.FAILED) for each in (408, 409, 500, 501, 505, 599, 600, 999)),
        *((each, Verdict.UNAVAILABLE) for each in (404, 429, 502, 503)),
        (504, Verdict.UNANSWERED),
    ],
)
def test_a_status_means(status: int, verdict: Verdict) -> None:
    assert judge(status) is verdict


@given(st.integers(100, 999))
def test_exactly_knatives_codes_are_retried(status: int) -> None:
    retried = judge(status) not in (Verdict.DELIVERED, Verdict.REJECTED)
    assert retried == (status >= 500 or status in (404, 408, 409, 429))


def test_no_answer_is_the_sinks_fault_unless_the_request_went_out() -> None:
    assert judge_silence(sent=False) is Verdict.UNAVAILABLE
    assert judge_silence(sent=True) is Verdict.UNANSWERED


def test_exponential_backoff_doubles_from_the_delay() -> None:
    schedule = [Delivery(delay=0.2).backoff(attempt) for attempt in range(5)]
    assert schedule == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2])


def test_the_first_linear_retry_is_at_once() -> None:
    linear = Delivery(policy="linear", delay=0.5)
    assert [linear.backoff(attempt) for attempt in range(4)] == [0.0, 0.5, 1.0, 1.5]


@given(
    st.sampled_from(["linear", "exponential"]),
    st.floats(0, 1000),
    st.integers(0, 1_000_000),
    st.floats(0, 1e9),
)
def test_a_wait_is_bounded_never_negative_and_grows(
    policy: str, delay: float, attempt: int, asked: float
) -> None:
    delivery = Delivery(policy="linear" if policy == "linear" else "exponential", delay=delay)
    wait = delivery.backoff(attempt, asked)
    assert 0 <= wait <= max(LONGEST_BACKOFF, LONGEST_RETRY_AFTER)
    assert wait >= min(asked, LONGEST_RETRY_AFTER)
    assert delivery.backoff(attempt) <= delivery.backoff(attempt + 1)
    assert 0.05 <= delivery.probe(attempt) <= LONGEST_PROBE


def test_retry_after_in_seconds_or_as_a_date_on_429_and_503_only() -> None:
    now = 1_700_000_000.0
    date = format_datetime(datetime.fromtimestamp(now + 90, UTC), usegmt=True).encode()
    assert retry_after(429, b"7", now) == 7.0
    assert retry_after(503, date, now) == pytest.approx(90.0)
    assert retry_after(503, date, now + 1000) == 0.0
    assert retry_after(500, b"7", now) == 0.0
    assert retry_after(429, None, now) == 0.0


@given(st.binary(max_size=40))
def test_a_strange_retry_after_counts_as_none(value: bytes) -> None:
    assert retry_after(503, value, 1_700_000_000.0) >= 0.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("PT0.2S", 0.2), ("PT1M", 60), ("PT1H30M", 5400), ("P1DT1S", 86401), ("P2D", 172800)],
)
def test_durations_are_iso_8601(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "P", "PT", "5", "5s", "PT5", "P1M", "PT-1S", "P1DT", "PT1S "])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ISO 8601"):
        parse_duration(text)
