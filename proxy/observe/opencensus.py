"""Request metrics by their names before v1.19, when OpenCensus made them (contract section 7.2)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from weir.proxy import contract
from weir.proxy.contract import RevisionSettings
from weir.proxy.exchange import Client, Exchange, Head
from weir.proxy.observe import outcome
from weir.proxy.observe.instruments import (
    Cell,
    Family,
    HistogramFamily,
    Labels,
    Names,
    Value,
    ValueFamily,
    label,
    render,
)

MILLISECONDS = (
    *(5.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0),
    *(450.0, 500.0, 600.0, 700.0, 800.0, 900.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5),
)
_TIMED_OUT = 502
"""What an invocation is recorded as that was given up before its first byte."""
_KEPT = 1024
_KEPT_BYTES = 256


class RevisionMetrics:
    """An Observer. `in_line` tells the breaker's running and waiting requests."""

    def __init__(self, revision: RevisionSettings, in_line: Callable[[], int]) -> None:
        self._limit = revision.container_concurrency
        self._in_line = in_line
        self.common: Labels = (
            ("configuration_name", revision.configuration),
            ("container_name", "queue-proxy"),
            ("namespace_name", revision.namespace),
            ("pod_name", revision.pod),
            ("revision_name", revision.revision),
            ("service_name", revision.service),
        )
        self.requests = ValueFamily(
            "revision_request_count",
            "The number of requests that are routed to queue-proxy",
            "counter",
        )
        self.latencies = HistogramFamily(
            "revision_request_latencies", "The response time in millisecond", MILLISECONDS
        )
        self.app_requests = ValueFamily(
            "revision_app_request_count",
            "The number of requests that are routed to user-container",
            "counter",
        )
        self.app_latencies = HistogramFamily(
            "revision_app_request_latencies", "The response time in millisecond", MILLISECONDS
        )
        self.queue_depth = ValueFamily(
            "revision_queue_depth", "The number of items queued at this queue proxy.", "gauge"
        )
        self.families: list[Family[Cell] | Family[Value]] = [
            self.requests,
            self.latencies,
            self.app_requests,
            self.app_latencies,
            self.queue_depth,
        ]
        self._no_code = self._labels(("response_code", ""), ("response_code_class", ""))
        self._gauge: Value | None = None
        self._tags = Names()
        self._cells: dict[tuple[object, ...], tuple[Value, Cell]] = {}
        self._app_cells: dict[int, tuple[Value, Cell]] = {}

    # --- Observer ------------------------------------------------------------------------------
    def begun(self, exchange: Exchange) -> None:
        if self._limit and (depth := self._in_line()) < self._limit:
            self._depth(depth + 1)

    def over(self, exchange: Exchange, now: float) -> None:
        seen = exchange.head.seen
        if self._limit and (depth := self._in_line()) > self._limit:
            self._depth(depth - 1)  # the next one starts right after this
        if (
            contract.NETWORK_PROBE in seen or contract.KUBELET_PROBE in seen
        ) and outcome.probe_like(seen):
            return
        if exchange.failure or exchange.upgraded:
            status = outcome.server_status(exchange)
            app_status = outcome.app_status(exchange, _TIMED_OUT)
        else:
            status = app_status = exchange.status
        key = (status, seen.get(contract.ROUTE_TAG), seen.get(contract.DEFAULT_ROUTE))
        count, cell = self._cells.get(key) or self._new_cells(key, status, seen)
        count.value += 1
        milliseconds = int((now - exchange.started) * 1e3)
        bucket = bisect_left(MILLISECONDS, milliseconds)
        cell.counts[bucket] += 1
        cell.sum += milliseconds
        if app_status:
            count, cell = self._app_cells.get(app_status) or self._new_app_cells(app_status)
            count.value += 1
            if exchange.admitted != exchange.started:  # it waited
                milliseconds = int((now - exchange.admitted) * 1e3)
                bucket = bisect_left(MILLISECONDS, milliseconds)
            cell.counts[bucket] += 1
            cell.sum += milliseconds

    def probed(self, client: Client, head: Head, status: int, size: int, seconds: float) -> None:
        """Probes are no traffic."""

    def _depth(self, depth: int) -> None:
        gauge = self._gauge
        if gauge is None:
            gauge = self._gauge = self.queue_depth.of(self._no_code)
        gauge.value = depth

    # --- label sets ----------------------------------------------------------------------------
    def _labels(self, *labels: tuple[str, str]) -> Labels:
        return tuple(sorted((*self.common, *labels)))

    def _new_cells(
        self, key: tuple[object, ...], status: int, seen: dict[bytes, bytes]
    ) -> tuple[Value, Cell]:
        tag = ("route_tag", self._tags.bounded(route_tag(seen)))
        labels = self._labels(*_code(status), tag)
        cells = self.requests.of(labels), self.latencies.of(labels)
        if sum(len(part) for part in key if isinstance(part, bytes)) <= _KEPT_BYTES:
            if len(self._cells) >= _KEPT:
                self._cells.clear()
            self._cells[key] = cells
        return cells

    def _new_app_cells(self, status: int) -> tuple[Value, Cell]:
        labels = self._labels(*_code(status))
        cells = self.app_requests.of(labels), self.app_latencies.of(labels)
        self._app_cells[status] = cells
        return cells

    # --- text ------------------------------------------------------------------------------------
    def lines(self) -> list[str]:
        return render(self.families)


def _code(status: int) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("response_code", str(status)), ("response_code_class", f"{status // 100}xx")


def route_tag(seen: dict[bytes, bytes]) -> str:
    tag = seen.get(contract.ROUTE_TAG)
    default = seen.get(contract.DEFAULT_ROUTE)
    if not tag:
        return "DEFAULT" if default else "DISABLED"
    return "UNDEFINED" if default == b"true" else label(tag)
