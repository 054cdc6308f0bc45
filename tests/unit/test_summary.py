"""What a run comes to: when it is a success, and what is said when it is none."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from weir.local.sample import Sample
from weir.local.summary import Result

NOTHING = Sample(**{f.name: "" if f.type is str else 0 for f in fields(Sample)})  # type: ignore[arg-type]
FINE = Result(
    sample=replace(NOTHING, received=10, delivered=10, direct_requests=8, relayed_requests=2),
    seconds=2.0,
    quarantine=Path("/q"),
    cpu={"adaptor": 0.001},
    published=10,
    claimed=10,
)


def test_a_run_that_delivered_everything_has_no_problems() -> None:
    assert FINE.problems() == []
    lines = dict(FINE.lines())
    assert lines["result"] == "every event was delivered"
    assert lines["delivered"] == "10 (5 per second)"
    assert lines["counts"] == "10 by Weir, 10 by the function: they agree"
    assert FINE.cpu_us_per_event == {"adaptor": 100.0}


@pytest.mark.parametrize(
    ("result", "word"),
    [
        (replace(FINE, claimed=9), "the counts differ"),
        (replace(FINE, published=12), "2 events undelivered"),
        (replace(FINE, sample=replace(FINE.sample, unacknowledged=3)), "3 events not acknowledged"),
        (replace(FINE, sample=replace(FINE.sample, quarantined=1)), "--quarantine /q"),
    ],
)
def test_every_shortfall_is_named(result: Result, word: str) -> None:
    (problem,) = result.problems()
    assert word in problem
    assert word in dict(result.lines())["result"]
    assert result.facts()["problems"] == [problem]


def test_more_than_once_is_no_shortfall() -> None:
    again = replace(FINE, sample=replace(FINE.sample, delivered=11, direct_requests=9), claimed=11)
    assert again.problems() == []


def test_a_run_without_events_says_so_and_divides_by_nothing() -> None:
    lines = dict(Result(NOTHING, 1.0, Path("/q"), {"adaptor": 1.0}).lines())
    assert lines["result"] == "no event came"
    assert lines["CPU per event"] == "-"
    assert "counts" not in lines
