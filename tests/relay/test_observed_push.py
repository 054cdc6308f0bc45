"""Metrics that are pushed by OTLP to a collector (contract section 7.1)."""

import builtins
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.collector import Collector, attributes
from tests.relay.rig import Rig, post
from weir.proxy.contract import RevisionSettings
from weir.proxy.environment import Observability, RequestMetrics, SidecarSettings, Tracing
from weir.proxy.observe import push
from weir.proxy.observe.observability import observers_for

Make = Callable[..., Awaitable[Rig]]


def settings(rig: Rig, **observability: Any) -> SidecarSettings:
    revision = RevisionSettings(user_port=rig.user.port, pod="pod-1", revision="hello-00001")
    wanted = Observability(names="current", service_name="hello", **observability)
    return SidecarSettings(revision, 8012, 8112, "10.0.0.1", observability=wanted)


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_metrics_are_pushed_and_once_more_at_the_end(rig: Make, protocol: str) -> None:
    made = await rig()
    with Collector() as collector:
        where = collector.grpc if protocol == "grpc" else collector.url
        wanted = settings(made, request_metrics=RequestMetrics(protocol, where, 0.05))
        observed = observers_for(wanted, in_line=lambda: 0)
        assert observed.render is None
        made.relay.observers.extend(observed.observers)
        await observed.start()
        client = await made.client()
        assert (await client.ask(post("/", b"0123456789"))).status == 200
        await made.settled(lambda: len(collector.metrics) >= 2)  # by themselves
        assert (await client.ask(post("/", b"0123456789"))).status == 200
        await observed.stop()
        (resource,) = collector.metrics[-1].resource_metrics
    told = attributes(resource.resource.attributes)
    assert told["kn.revision.name"] == "hello-00001"
    assert told["service.name"] == "hello"
    assert told["telemetry.sdk.language"] == "python"
    metrics = {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}
    assert set(metrics) >= {
        "http.server.request.duration",
        "http.server.request.body.size",
        "http.server.response.body.size",
        "http.client.request.duration",
        "http.client.request.body.size",
        "kn.serving.invocation.duration",
    }
    size = metrics["http.server.request.body.size"]
    assert size.unit == "By"
    (point,) = size.histogram.data_points
    assert (point.count, point.sum) == (2, 20)
    assert sum(point.bucket_counts) == 2
    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
    assert attributes(point.attributes) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "kn.route.tag": "kn:disabled",
        "network.protocol.name": "http",
        "network.protocol.version": "1.1",
        "server.address": "example.com",
        "url.scheme": "http",
    }
    scopes = {scope.scope.name for scope in resource.scope_metrics}
    assert scopes == {
        "knative.dev/serving/pkg/queue",
        "go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp",
    }


async def test_a_collector_that_is_not_there_holds_up_nobody(rig: Make) -> None:
    made = await rig()
    wanted = settings(
        made, request_metrics=RequestMetrics("http/protobuf", "http://127.0.0.1:9", 0.01)
    )
    observed = observers_for(wanted)
    made.relay.observers.extend(observed.observers)
    await observed.start()
    client = await made.client()
    for _ in range(20):
        assert (await client.ask(post("/", b"x"))).status == 200
    await observed.stop(0.2)


@pytest.mark.parametrize(
    ("configured", "protocol", "where"),
    [
        ("http://c:4318", "http/protobuf", "http://c:4318/v1/metrics"),
        ("http://c:4318/", "http/protobuf", "http://c:4318/v1/metrics"),
        ("http://c/otel/v1/metrics", "http/protobuf", "http://c/otel/v1/metrics"),
        ("http://c:4317", "grpc", "http://c:4317"),
        ("c:4317", "grpc", "https://c:4317"),
        ("", "grpc", None),
    ],
)
def test_the_endpoint_of_a_push(configured: str, protocol: str, where: str | None) -> None:
    assert push.endpoint(configured, "metrics", protocol) == where


@pytest.mark.parametrize(
    "name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"]
)
def test_the_sdk_s_own_variables_are_heard_first(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "http://elsewhere")
    assert push.endpoint("http://c:4318", "metrics", "grpc") is None


def test_the_interval_of_a_push(monkeypatch: pytest.MonkeyPatch) -> None:
    assert push.interval(0.0) == 60.0
    assert push.interval(30.0) == 30.0
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "1500")
    assert push.interval(30.0) == 1.5


async def test_without_the_sdk_the_log_says_what_to_install_and_the_pod_serves(
    rig: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return imported(name, *args, **kwargs)

    for module in ("push", "tracing"):
        monkeypatch.delitem(__import__("sys").modules, f"weir.proxy.observe.{module}", False)
        monkeypatch.delattr(f"weir.proxy.observe.{module}", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    made = await rig()
    wanted = settings(
        made,
        request_metrics=RequestMetrics("grpc", "http://c:4317"),
        tracing=Tracing("grpc", "http://c:4317", 1.0),
    )
    observed = observers_for(wanted)
    monkeypatch.undo()
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert [message.partition(":")[0] for message in messages] == ["no metrics", "no traces"]
    assert all("pip install 'kn-weir[otel]'" in message for message in messages)
    made.relay.observers.extend(observed.observers)
    await observed.start()
    assert (await (await made.client()).get()).status == 200
    await observed.stop()
