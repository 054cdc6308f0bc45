"""The arithmetic of the autoscaler's stats (contract 5.2)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.proxy.policy.meter import Meter, Report


def test_half_a_second_of_one_request_is_half_a_request_on_average() -> None:
    meter = Meter(10.0)
    meter.arrive(10.0)
    meter.depart(10.5)
    assert meter.report(11.0) == Report(0.5, 0.0, 1, 0)


def test_a_request_in_flight_is_counted_once_and_weighs_in_every_period() -> None:
    meter = Meter(0.0)
    meter.arrive(0.0)
    assert meter.report(1.0) == Report(1.0, 0.0, 1, 0)
    assert meter.report(2.0) == Report(1.0, 0.0, 0, 0)
    meter.depart(2.25)
    assert meter.report(3.0) == Report(0.25, 0.0, 0, 0)


def test_the_activators_share_is_told_apart() -> None:
    meter = Meter(0.0)
    meter.arrive(0.0, proxied=True)
    meter.arrive(0.5)
    meter.depart(0.75, proxied=True)
    meter.depart(1.0)
    assert meter.report(1.0) == Report(1.25, 0.75, 2, 1)


def test_a_period_without_length_has_an_average_of_nothing() -> None:
    meter = Meter(5.0)
    meter.arrive(5.0)
    assert meter.report(5.0) == Report(0.0, 0.0, 1, 0)


def test_time_that_runs_backwards_adds_nothing() -> None:
    meter = Meter(5.0)
    meter.arrive(6.0)
    meter.depart(5.5)
    assert meter.integral(7.0) == 0.0
    assert meter.report(7.0).count == 1


def test_a_report_takes_nothing_from_the_integral() -> None:
    meter = Meter(0.0)
    meter.arrive(0.0)
    meter.report(1.0)
    assert meter.integral(3.0) == 3.0
    assert meter.arrived == 1


@given(
    st.lists(
        st.tuples(st.sampled_from("adr"), st.floats(0, 10), st.booleans()), min_size=1, max_size=60
    )
)
def test_the_integral_is_the_sum_of_every_requests_time_however_it_is_reported(
    events: list[tuple[str, float, bool]],
) -> None:
    meter = Meter(0.0)
    now = 0.0
    inside: list[tuple[float, bool]] = []
    time_inside = weighed = counted = 0.0
    last_report = 0.0
    for kind, wait, proxied in events:
        now += wait
        if kind == "a":
            meter.arrive(now, proxied)
            inside.append((now, proxied))
        elif kind == "d" and inside:
            since, was_proxied = inside.pop(0)
            meter.depart(now, was_proxied)
            time_inside += now - since
        elif kind == "r":
            report = meter.report(now)
            weighed += report.average * (now - last_report)
            counted += report.count
            assert report.average_proxied <= report.average + 1e-9
            last_report = now
        assert meter.in_flight == len(inside)
    report = meter.report(now)
    weighed += report.average * (now - last_report)
    counted += report.count
    time_inside += sum(now - since for since, _ in inside)
    assert meter.integral(now) == pytest.approx(time_inside, abs=1e-6)
    assert weighed == pytest.approx(time_inside, abs=1e-6)
    assert counted == meter.arrived
