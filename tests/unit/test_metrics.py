"""Cells, label sets and their text; the page of the metrics port (contract section 7)."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from weir.proxy.contract import RevisionSettings
from weir.proxy.environment import Observability, RequestMetrics, SidecarSettings
from weir.proxy.observe.identity import target_info
from weir.proxy.observe.instruments import (
    MOST_SERIES,
    OVERFLOW,
    Cell,
    HistogramFamily,
    Names,
    ValueFamily,
    label,
    render,
)
from weir.proxy.observe.metrics import split_host
from weir.proxy.observe.observability import observers_for
from weir.proxy.observe.process import process_lines

SAMPLE = re.compile(r'[a-z_]+(\{([a-z0-9_]+="([^"\\\n]|\\[\\"n])*",?)*\})? [^ ]+')


def settings(**observability: object) -> SidecarSettings:
    return SidecarSettings(
        RevisionSettings(
            user_port=8080,
            pod="pod-1",
            namespace="ns",
            revision="hello-00001",
            service="hello",
            configuration="conf",
        ),
        8012,
        8112,
        "10.0.0.1",
        observability=Observability(**observability),  # type: ignore[arg-type]
    )


def test_a_bucket_holds_the_values_up_to_its_edge() -> None:
    cell = Cell((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        cell.record(value)
    assert (cell.counts, cell.sum) == ([2, 2, 1], 7.5)


def test_a_histogram_is_written_with_counts_that_add_up() -> None:
    family = HistogramFamily("a_seconds", "How long.", (0.5, 1.0))
    family.of((("code", "200"),)).record(0.7)
    family.of((("code", "200"),)).record(3)
    assert list(family.text((("app", "x"),))) == [
        "# HELP a_seconds How long.",
        "# TYPE a_seconds histogram",
        'a_seconds_bucket{app="x",code="200",le="0.5"} 0',
        'a_seconds_bucket{app="x",code="200",le="1"} 1',
        'a_seconds_bucket{app="x",code="200",le="+Inf"} 2',
        'a_seconds_sum{app="x",code="200"} 3.7',
        'a_seconds_count{app="x",code="200"} 2',
    ]


def test_a_metric_without_a_series_is_not_written() -> None:
    assert render([HistogramFamily("a", "b", (1.0,)), ValueFamily("c", "d", "gauge")]) == []


def test_label_sets_beyond_the_limit_are_counted_together() -> None:
    family = ValueFamily("a_total", "All.", "counter")
    for number in range(MOST_SERIES + 50):
        family.of((("host", str(number)),)).value += 1
    assert len(family.series) == MOST_SERIES + 1
    assert family.series[OVERFLOW].value == 50
    family.of((("host", "3"),)).value += 1
    assert family.series[(("host", "3"),)].value == 2


def test_names_that_clients_make_up_are_told_apart_up_to_a_limit() -> None:
    names = Names(most=2)
    assert [names.bounded(name) for name in ("a", "b", "c", "a", "x" * 254)] == [
        "a",
        "b",
        "_OTHER",
        "a",
        "_OTHER",
    ]


@examples(deadline=None)
@given(st.binary(max_size=60))
def test_no_value_of_a_label_breaks_a_line(value: bytes) -> None:
    family = ValueFamily("a_total", "All.", "counter")
    family.of((("host", label(value)),)).value = 1
    *_, line = family.text()
    assert SAMPLE.fullmatch(line)
    assert line.encode()  # and it is UTF-8


@examples(deadline=None)
@given(st.text(max_size=40))
def test_any_host_splits_into_something(value: str) -> None:
    host, port = split_host(value)
    assert host in value and 0 <= port < 100_000


def test_the_page_is_nothing_but_samples_and_comments() -> None:
    observed = observers_for(
        settings(names="current", request_metrics=RequestMetrics("prometheus"), pod_name="pod-1")
    )
    assert observed.render is not None
    page = observed.render().decode()
    assert page.endswith("\n")
    for line in page.splitlines():
        assert line.startswith(("# HELP ", "# TYPE ")) or SAMPLE.fullmatch(line), line
    assert "target_info{" in page


def test_target_info_tells_the_revision() -> None:
    *_, line = target_info(settings(pod_name="pod-1", service_name="hello"))
    for wanted in (
        'container_name="queue-proxy"',
        'k8s_namespace_name="ns"',
        'k8s_pod_name="pod-1"',
        'kn_service_name="hello"',
        'kn_configuration_name="conf"',
        'kn_revision_name="hello-00001"',
        'service_name="hello"',
        'service_instance_id="pod-1"',
        'service_version="',
    ):
        assert wanted in line
    assert line.endswith("} 1")


def test_a_process_tells_of_itself() -> None:
    found = {line.split()[0]: float(line.split()[1]) for line in process_lines() if line[0] != "#"}
    assert found["process_resident_memory_bytes"] > 1e6
    assert found["process_open_fds"] >= 3
    assert found["process_start_time_seconds"] > 1.6e9
    assert set(found) >= {
        "process_cpu_seconds_total",
        "process_max_fds",
        "process_virtual_memory_bytes",
        "process_virtual_memory_max_bytes",
        "process_network_receive_bytes_total",
        "process_network_transmit_bytes_total",
    }


@pytest.mark.parametrize("names", ["current", "opencensus"])
@pytest.mark.parametrize("protocol", ["none", "stackdriver"])
def test_without_prometheus_there_is_no_page(
    names: str, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = settings(names=names, request_metrics=RequestMetrics(protocol))
    assert observers_for(wanted).render is None
    assert bool(caplog.records) == (protocol != "none")


def test_before_v1_19_the_page_has_the_old_names_and_no_target_info() -> None:
    wanted = settings(names="opencensus", request_metrics=RequestMetrics("prometheus"))
    observed = observers_for(wanted)
    assert observed.render is not None
    assert observed.render() == b""  # no request yet


ENVIRONMENT = {
    **dict.fromkeys(("QUEUE_SERVING_PORT", "QUEUE_SERVING_TLS_PORT", "USER_PORT"), "8012"),
    **dict.fromkeys(("CONTAINER_CONCURRENCY", "REVISION_TIMEOUT_SECONDS"), "0"),
    **dict.fromkeys(("SERVING_NAMESPACE", "SERVING_CONFIGURATION", "SERVING_REVISION"), "x"),
    **dict.fromkeys(("SERVING_POD", "SERVING_POD_IP"), "x"),
    **dict.fromkeys(("SERVING_LOGGING_CONFIG", "SERVING_LOGGING_LEVEL"), ""),
}
IMPORTED = """
import sys
from weir.proxy.environment import read_environment
from weir.proxy.observe.observability import observers_for
observers_for(read_environment(dict(pair.split("=", 1) for pair in sys.argv[1:])))
print(*(name for name in sys.modules if name.split(".")[0] in ("opentelemetry", "grpc")
        or name in ("weir.proxy.observe.metrics", "weir.proxy.observe.gotemplate")))
"""


def test_what_nobody_asked_for_is_not_imported() -> None:
    arguments = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
    run = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, check=True
    )
    assert run.stdout == "\n"
