"""The agent's page as text, and the sums that are on it."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.promtext import Page, read
from weir.proxy.agentmetrics import page
from weir.proxy.contract import RevisionSettings
from weir.proxy.counters import (
    FOLD,
    ColdStarts,
    Direct,
    PodCounters,
    Relayed,
    Shown,
    bucket_start,
)
from weir.proxy.environment import Observability, RequestMetrics, SidecarSettings
from weir.proxy.holds import Hold
from weir.proxy.observe import observability
from weir.proxy.observe.podpage import PodPage, read_back, written_down
from weir.proxy.pod import PodSpec
from weir.proxy.policy import histogram
from weir.proxy.policy.histogram import BUCKETS, EDGES, lower_bound
from weir.proxy.served import FRESH_SECONDS, ServedPod

NUMBERS = [each.name for each in fields(PodCounters) if each.name != "latency"]


def counters(number: int = 0, **more: Any) -> PodCounters:
    latency = more.pop("latency", (0,) * 128)
    return PodCounters(**{**dict.fromkeys(NUMBERS, number), **more}, latency=latency)


def served(name: str = "hello", **settings: Any) -> ServedPod:
    revision = RevisionSettings(user_port=1, **settings)
    return ServedPod(PodSpec(name, revision), None, "no kernel here")


def paged(*pods: ServedPod, cold_starts: ColdStarts | None = None) -> Page:
    return read(page(pods, 1, "no kernel here", cold_starts or ColdStarts()).decode())


# --- the page -------------------------------------------------------------------------------------


def test_a_pod_is_on_it_by_the_names_that_upstream_has_for_it() -> None:
    pod = served(namespace="shop", revision="cart-00001", service="cart", configuration="cart")
    assert paged(pod).value(
        "weir_pod_ready",
        k8s_namespace_name="shop",
        k8s_pod_name="hello",
        kn_configuration_name="cart",
        kn_revision_name="cart-00001",
        kn_service_name="cart",
    ) == 0  # fmt: skip


def test_what_nothing_is_known_of_has_no_labels_that_would_change_later() -> None:
    pod = ServedPod(PodSpec("hello", RevisionSettings(user_port=0), hold=1), None, "none")
    ((_, labels),) = paged(pod).found("weir_pod_ready")
    assert dict(labels) == {"k8s_pod_name": "hello"}
    assert paged(pod).value("weir_lease_state", state="looking") == 1
    assert paged(pod).value("weir_direct_ineligible", reason="not_held") == 1


def test_both_paths_are_told_apart_and_their_histograms_are_of_what_was_counted() -> None:
    pod = served()
    latency = [0] * 128
    latency[20] = 3  # 64 to 79 us
    direct = counters(started=5, aborted=1, integral_ns=2_500_000_000, latency=tuple(latency))
    pod.direct.look(direct)
    said = {"requests": 7, "2xx": 6, "aborted": 1, "seconds": 0.5, "cut": 4, "full": 1}
    pod.relayed.report("1", said)
    pod.relayed.ended("1")
    found = paged(pod)
    for path, requests in (("direct", 5), ("relayed", 7)):
        assert found.value("weir_requests_total", path=path) == requests
        assert found.value("weir_aborted_requests_total", path=path) == 1
    assert found.value("weir_request_seconds_total", path="direct") == 2.5
    assert found.value("weir_relayed_responses_total", code="2xx") == 6
    assert found.value("weir_relayed_cut_total") == 4
    assert found.value("weir_relayed_full_total") == 1
    name = "weir_request_duration_seconds"
    assert found.value(f"{name}_bucket", path="direct", le="6.4e-05") == 0
    assert found.value(f"{name}_bucket", path="direct", le="0.000128") == 3
    assert found.value(f"{name}_sum", path="direct") == pytest.approx(3 * 72e-6)


def test_a_pod_that_was_never_attached_has_no_direct_series() -> None:
    found = paged(served())
    assert not found.found("weir_requests_total", path="direct")
    assert not found.found("weir_direct_connections_total")
    assert found.value("weir_requests_total", path="relayed") == 0


def test_the_node_says_why_it_can_not_steer() -> None:
    found = paged()
    assert found.value("weir_kernel_able") == 0
    assert found.value("weir_kernel_unable", reason="no kernel here") == 1
    able = read(page([], 2, "", ColdStarts()).decode())
    assert (able.value("weir_kernel_able"), able.value("weir_workers")) == (1, 2)
    assert not able.found("weir_kernel_unable")


def test_cold_starts_are_a_histogram_of_the_node() -> None:
    cold_starts = ColdStarts()
    for seconds in (0.1, 0.3, 400.0):
        cold_starts.record(seconds)
    found = paged(cold_starts=cold_starts)
    name = "weir_cold_start_duration_seconds"
    assert found.value(f"{name}_bucket", le="0.1") == 1
    assert found.value(f"{name}_bucket", le="300") == 2
    assert found.value(f"{name}_count") == 3
    assert found.value(f"{name}_sum") == pytest.approx(400.4)


@given(st.lists(st.text(), unique=True, max_size=5), st.text(), st.text())
def test_whatever_pods_are_called_the_page_can_be_read(
    names: list[str], namespace: str, why: str
) -> None:
    pods = [served(name, namespace=namespace, revision=namespace) for name in names]
    found = read(page(pods, 1, why, ColdStarts()).decode())
    shown = [dict(labels)["k8s_pod_name"] for _, labels in found.found("weir_pod_ready")]
    assert sorted(shown) == sorted(names)


def test_half_a_character_does_not_cost_the_page() -> None:
    assert paged(served("a\ud800")).value("weir_pod_ready", k8s_pod_name="a?") == 0


def test_quotes_backslashes_and_line_ends_in_names_stay_what_they_are() -> None:
    name = 'a"b\\c\nd} 1\nweir_pod_ready 7\r\n\\n{'
    found = paged(served(name), served("other", revision=name))
    assert found.value("weir_pod_ready", k8s_pod_name=name) == 0
    assert found.value("weir_pod_ready", kn_revision_name=name) == 0


def test_a_pod_can_not_make_the_page_long_or_be_taken_for_another() -> None:
    liar = served("liar", pod="hello", namespace="x" * 50_000, revision="y" * 50_000)
    text = page([served("hello"), liar], 1, "", ColdStarts())
    assert len(text) < 100_000
    assert len(read(text.decode()).found("weir_pod_ready", k8s_pod_name="hello")) == 1


# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fold", "lower", "buckets"),
    [(histogram.FOLD, lower_bound, BUCKETS), (FOLD, bucket_start, 128)],
    ids=["relay", "kernel"],
)
def test_no_bucket_lies_across_an_edge(fold: histogram.Fold, lower: Any, buckets: int) -> None:
    starts = [lower(index) for index in range(buckets)]
    assert set(EDGES) <= set(starts)
    for index in range(buckets):
        one = [0] * buckets
        one[index] = 1
        place = fold.of(one).index(1)
        assert sum(fold.of(one)) == 1
        assert place == 0 or starts[index] >= EDGES[place - 1]
        assert place == len(EDGES) or starts[index] < EDGES[place]
        assert starts[index] <= fold.seconds(one) * 1e6 <= lower(index + 1)


def test_a_meter_that_begins_anew_is_added_to_the_one_before() -> None:
    direct = Direct()
    direct.look(counters(5, connections=5, in_flight=2))
    direct.look(counters(0))
    now = direct.look(counters(3, connections=3, in_flight=1))
    assert (now.started, now.finished, now.connections, now.in_flight) == (8, 8, 8, 1)
    direct.look(counters(0))
    assert direct.look(counters(1, connections=1)).started == 9


@given(st.lists(st.integers(-3, 50), min_size=1, max_size=20), st.integers(0, 2**64))
def test_neither_requests_nor_their_time_ever_go_down(steps: list[int], start: int) -> None:
    direct = Direct()
    seen = []
    at = 100
    for step in steps:
        at += step
        integral = (start + at) % 2**64
        now = direct.look(counters(started=at, integral_ns=integral, connections=1))
        seen.append((now.started, (now.integral_ns - start) % 2**64))
    assert seen == sorted(seen)


def test_sums_outlive_a_worker_and_gauges_do_not() -> None:
    relayed = Relayed()
    relayed.report("1", {"requests": 5, "2xx": 4, "in_flight": 1, "latency": [1] * 22})
    relayed.report("2", {"requests": 2, "2xx": 2, "in_flight": 0, "latency": [2] * 22})
    relayed.ended("1")
    assert relayed.totals() == {"requests": 7, "2xx": 6, "in_flight": 0, "integral": 0}
    assert relayed.latency() == [3] * 22


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=23) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=30,
    )
)
def test_no_worker_says_anything_that_breaks_the_page(said: Any) -> None:
    pod = served()
    pod.relayed.report("1", {"requests": said, "seconds": said, "latency": said, "2xx": said})
    paged(pod)
    pod.relayed.ended("1")
    paged(pod)


# --- 9091 of a borrowed pod -----------------------------------------------------------------------


def settings(names: Any) -> SidecarSettings:
    revision = RevisionSettings(
        user_port=8080, pod="pod-1", namespace="ns", revision="hello-1", service="hello"
    )
    asked = Observability(names=names, request_metrics=RequestMetrics("prometheus"))
    return SidecarSettings(revision, 8012, 8112, "10.0.0.1", observability=asked)


class Told:
    """What a worker told, as the supervisor keeps it."""

    def __init__(self) -> None:
        self.shown = Shown()
        self.times = 0

    def __call__(self, text: str) -> None:
        self.times += 1
        for number in range(0, len(text), 100):
            self.shown.take(text[number : number + 100], number + 100 >= len(text))


@pytest.fixture(params=["current", "before"])
def names(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def worker(names: str) -> tuple[PodPage, Any, Told]:
    told = Told()
    seen = observability.observers_for(settings(names))
    return PodPage(seen, told), seen.families, told


def count(families: Any, times: int) -> None:
    for family in families:
        if family.kind != "gauge":
            for _ in range(times):
                cell = family.of((("code", '2"0\\0\n'),))
                if family.kind == "histogram":
                    cell.record(0.3)
                else:
                    cell.value += 1


def test_what_came_directly_is_on_the_pods_own_page(names: str) -> None:
    made, _, _ = worker(names)
    assert b"weir_direct" not in made.render()
    made, _, _ = worker(names)
    made.direct.told = json.loads(json.dumps(counters(4, latency=(1,) * 128).told()))
    found = read(made.render().decode())
    common = {} if names == "current" else {"pod_name": "pod-1", "service_name": "hello"}
    assert found.value("weir_direct_requests_total", **common) == 4
    assert found.value("weir_direct_requests_in_flight", **common) == 4
    assert found.value("weir_direct_request_duration_seconds_count", **common) == 128


def test_the_next_worker_goes_on_from_what_was_shown_last(names: str) -> None:
    first, families, told = worker(names)
    count(families, 3)
    shown = read(first.render().decode())
    count(families, 2)  # nobody saw these
    second, again, _ = worker(names)
    second.resume(told.shown.handed_on())
    assert (
        read(second.render().decode()).counters().items()
        >= {
            key: value for key, value in shown.counters().items() if "process" not in key[0]
        }.items()
    )
    count(again, 1)
    assert written_down(again) != written_down(families)


def test_a_page_is_told_once_however_often_it_is_asked_for(names: str) -> None:
    made, families, told = worker(names)
    count(families, 1)
    pages = {made.render() for _ in range(50)}
    assert (len(pages), told.times) == (1, 1)
    made._until = 0.0  # a second later, and nothing happened
    made.render()
    assert told.times == 1


def test_too_much_to_tell_is_told_as_nothing(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weir.proxy.observe.podpage.MOST_TOLD", 50)
    made, families, told = worker(names)
    count(families, 1)
    made.render()
    assert told.shown.handed_on() == ""


def test_a_worker_that_dies_while_it_tells_leaves_what_it_had_told_before() -> None:
    shown = Shown()
    shown.take("one", True)
    shown.take("tw", False)
    assert shown.handed_on() == "one"
    shown.take("three", True)
    assert shown.handed_on() == "three"


@pytest.mark.parametrize("nonsense", [None, 7, [], {}, "x" * 70_000])
def test_a_worker_can_not_fill_the_supervisor(nonsense: Any) -> None:
    shown = Shown()
    for _ in range(100):
        shown.take(nonsense, False)
        assert len(shown._begun) <= Shown.MOST
    shown.take(nonsense, True)
    assert shown.handed_on() == ""


def _breakages(told: Any) -> list[Any]:
    """Copies of the JSON with one thing in it replaced by another."""
    found: list[Any] = []
    others: list[Any] = [None, -1, "x", 1e400, [], {}, [[]], True, ["a", "b"]]
    for other in others:
        found.append(other)
        for name in list(told):
            found.append({**told, name: other})
            found.append({**told, name: [other]})
            for index in range(2):
                entry = list(told[name][0])
                entry[index] = other
                found.append({**told, name: [entry]})
        found.append({**told, "other": other})
    labels = [["a\n} 1", "x"]]
    name = next(iter(told))
    found.append({**told, name: [[labels, told[name][0][1]]]})
    return found


def test_what_no_worker_writes_is_not_read_back_in_part(names: str) -> None:
    _, families, _ = worker(names)
    count(families, 1)
    told = json.loads(written_down(families))
    _, fresh, _ = worker(names)
    empty = written_down(fresh)
    read_back(fresh, {})
    refused = 0
    breakages = _breakages(told)
    for broken in breakages:
        _, fresh, _ = worker(names)
        try:
            read_back(fresh, broken)
        except ValueError:
            refused += 1
            assert written_down(fresh) == empty
    assert refused > 0.7 * len(breakages)  # an empty list of series, say, is fine


# --- cold starts ----------------------------------------------------------------------------------


def held(age: float, cold_starts: ColdStarts) -> ServedPod:
    """A pod as it is when a hold that is `age` seconds old has been lent."""
    spec = PodSpec("hello", RevisionSettings(user_port=0), hold=1)
    pod = ServedPod(spec, None, "no kernel here", cold_starts)
    pod.describe(Hold(-1, -1, {}, settings("current"), age, 1, None))
    pod.lease = ""
    pod.attach()
    return pod


def test_a_cold_start_begins_with_the_container_and_is_counted_once() -> None:
    cold_starts = ColdStarts()
    pod = held(0.5, cold_starts)
    pod.found(False)
    assert sum(cold_starts.counts) == 0
    pod.found(True)
    first = pod.cold_start
    assert first is not None
    assert first >= 0.5
    pod.found(False)
    pod.found(True)
    assert pod.cold_start == first
    assert (sum(cold_starts.counts), cold_starts.seconds) == (1, first)


def test_of_a_hold_that_may_have_been_anybodys_no_cold_start_is_known() -> None:
    cold_starts = ColdStarts()
    pod = held(FRESH_SECONDS + 0.1, cold_starts)
    pod.found(True)
    assert pod.cold_start is None
    assert sum(cold_starts.counts) == 0
