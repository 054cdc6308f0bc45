"""Request metrics pushed by OTLP, with the exporters of the official OpenTelemetry SDK.

Owns the thread that pushes, and the translation of our cells into the SDK's data points; the SDK's
own instruments would cost a request more than the request. Imported only when asked for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from weir.proxy.observe import metrics
from weir.proxy.observe.instruments import HistogramFamily, Labels, ValueFamily
from weir.proxy.observe.metrics import RequestMetrics

DEFAULT_SECONDS = 60.0
_LAST_SECONDS = 10.0
_ATTRIBUTES = {
    "error_type": "error.type",
    "http_request_method": "http.request.method",
    "http_response_status_code": "http.response.status_code",
    "kn_route_tag": "kn.route.tag",
    "network_protocol_name": "network.protocol.name",
    "network_protocol_version": "network.protocol.version",
    "otel_metric_overflow": "otel.metric.overflow",
    "server_address": "server.address",
    "server_port": "server.port",
    "url_scheme": "url.scheme",
}
_NUMBERS = frozenset({"http_response_status_code", "server_port"})
_INSTRUMENTS = {
    "kn_serving_invocation_duration_seconds": ("kn.serving.invocation.duration", "s"),
    "kn_serving_queue_depth": ("kn.serving.queue.depth", "{request}"),
    "http_server_request_duration_seconds": ("http.server.request.duration", "s"),
    "http_server_request_body_size_bytes": ("http.server.request.body.size", "By"),
    "http_server_response_body_size_bytes": ("http.server.response.body.size", "By"),
    "http_client_request_duration_seconds": ("http.client.request.duration", "s"),
    "http_client_request_body_size_bytes": ("http.client.request.body.size", "By"),
}

log = logging.getLogger("weir.metrics")


def endpoint(configured: str, signal: str, protocol: str) -> str | None:
    """Where to push; None: where the SDK's own environment variables say, or its default.

    `signal` is `metrics` or `traces`. A URL without a scheme is HTTPS; over HTTP the signal's
    path is added to one that has none.
    """
    variables = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
    if not configured or any(os.environ.get(name) for name in variables):
        return None
    url = configured if "://" in configured else f"https://{configured}"
    if protocol == "http/protobuf" and urlsplit(url).path in ("", "/"):
        url = f"{url.rstrip('/')}/v1/{signal}"
    return url


def interval(configured: float) -> float:
    """Seconds between two pushes; OTEL_METRIC_EXPORT_INTERVAL (milliseconds) is heard first."""
    given = os.environ.get("OTEL_METRIC_EXPORT_INTERVAL", "")
    if given.isdecimal() and int(given):
        return int(given) / 1e3
    return configured or DEFAULT_SECONDS


def exporter(protocol: str, configured: str) -> MetricExporter:
    where = endpoint(configured, "metrics", protocol)
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (
            OTLPMetricExporter as OverGrpc,
        )

        return OverGrpc(endpoint=where)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import (
        OTLPMetricExporter as OverHttp,
    )

    return OverHttp(endpoint=where)


class Pusher:
    """Pushes every so many seconds, and once more when it is stopped."""

    def __init__(
        self,
        recorded: RequestMetrics,
        export: MetricExporter,
        attributes: dict[str, str],
        seconds: float,
    ) -> None:
        self._recorded = recorded
        self._exporter = export
        self._resource = Resource.create(dict(attributes))
        self._seconds = seconds
        self._started = time.time_ns()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weir-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Push what is left and end; blocks."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._exporter.shutdown(_LAST_SECONDS * 1e3)

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds):
            self._push()
        self._push()

    def _push(self) -> None:
        try:
            self._exporter.export(self.data(time.time_ns()), timeout_millis=_LAST_SECONDS * 1e3)
        except Exception:  # whatever an exporter raises: the next interval tries again
            log.exception("metrics could not be pushed")

    def data(self, now: int) -> MetricsData:
        """Everything recorded since the start, as of `now` (nanoseconds of the wall clock)."""
        recorded = self._recorded
        http = InstrumentationScope(metrics.HTTP_SCOPE, metrics.HTTP_SCOPE_VERSION)
        queue = InstrumentationScope(metrics.QUEUE_SCOPE)
        scopes: list[tuple[InstrumentationScope, list[Any]]] = [
            (http, [*recorded.server, *recorded.client]),
            (queue, [recorded.invocation, recorded.queue_depth]),
        ]
        return MetricsData(
            [
                ResourceMetrics(
                    self._resource,
                    [
                        ScopeMetrics(scope, [self._metric(family, now) for family in families], "")
                        for scope, families in scopes
                    ],
                    "",
                )
            ]
        )

    def _metric(self, family: HistogramFamily | ValueFamily, now: int) -> Metric:
        name, unit = _INSTRUMENTS[family.name]
        data: Histogram | Gauge
        if isinstance(family, HistogramFamily):
            points = []
            for labels, cell in list(family.series.items()):
                counts = list(cell.counts)
                points.append(
                    HistogramDataPoint(
                        attributes=attributes_of(labels),
                        start_time_unix_nano=self._started,
                        time_unix_nano=now,
                        count=sum(counts),
                        sum=cell.sum,
                        bucket_counts=counts,
                        explicit_bounds=cell.bounds,
                        min=None,  # type: ignore[arg-type]  # optional on the wire
                        max=None,  # type: ignore[arg-type]
                    )
                )
            data = Histogram(points, AggregationTemporality.CUMULATIVE)
        else:
            data = Gauge(
                [
                    NumberDataPoint(attributes_of(labels), self._started, now, int(value.value))
                    for labels, value in list(family.series.items())
                ]
            )
        return Metric(name, family.help, unit, data)


def attributes_of(labels: Labels) -> dict[str, str | int | bool]:
    found: dict[str, str | int | bool] = {}
    for name, value in labels:
        key = _ATTRIBUTES[name]
        if name == "otel_metric_overflow":
            found[key] = True
        else:
            found[key] = int(value) if name in _NUMBERS else value
    return found
