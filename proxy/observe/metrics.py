"""Request metrics by their current names, those of v1.19 and later (contract section 7.1).

Owns which exchange is recorded under which labels. How they leave (text for a scraper, or pushed)
is not decided here: `families` has the numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from weir.proxy import contract
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

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
BYTES = (
    0.0,
    5.0,
    10.0,
    25.0,
    50.0,
    75.0,
    100.0,
    250.0,
    500.0,
    750.0,
    1e3,
    2500.0,
    5e3,
    7500.0,
    1e4,
)
QUEUE_SCOPE = "knative.dev/serving/pkg/queue"
HTTP_SCOPE = "go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
HTTP_SCOPE_VERSION = "0.72.0"
"""The release of that library whose series these are, name by name."""
_METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
)
_KEPT = 1024
_KEPT_BYTES = 512
"""So many combinations of raw values are remembered with their cells, if they are short."""


def _scope(name: str, version: str = "") -> Labels:
    return (
        ("otel_scope_name", name),
        ("otel_scope_schema_url", ""),
        ("otel_scope_version", version),
    )


class _Cells:
    """Where a request is recorded: as one to the user container, for the function, as ours."""

    __slots__ = ("app", "client", "server")

    def __init__(self) -> None:
        self.client: tuple[Cell, Cell] | None = None
        self.app: Cell | None = None
        self.server: tuple[Cell, Cell, Cell] | None = None


class RequestMetrics:
    """An Observer. `in_line` tells the breaker's running and waiting requests, `limit` is CC."""

    def __init__(self, user_port: int, limit: int, in_line: Callable[[], int]) -> None:
        self._limit = limit
        self._in_line = in_line
        self._peer = ("127.0.0.1", str(user_port))
        self.invocation = HistogramFamily(
            "kn_serving_invocation_duration_seconds", "The duration of task execution", SECONDS
        )
        self.queue_depth = ValueFamily(
            "kn_serving_queue_depth", "Number of current items in the queue proxy queue", "gauge"
        )
        self.server = (
            HistogramFamily(
                "http_server_request_duration_seconds",
                "Duration of HTTP server requests.",
                SECONDS,
            ),
            HistogramFamily(
                "http_server_request_body_size_bytes", "Size of HTTP server request bodies.", BYTES
            ),
            HistogramFamily(
                "http_server_response_body_size_bytes",
                "Size of HTTP server response bodies.",
                BYTES,
            ),
        )
        self.client = (
            HistogramFamily(
                "http_client_request_duration_seconds",
                "Duration of HTTP client requests.",
                SECONDS,
            ),
            HistogramFamily(
                "http_client_request_body_size_bytes", "Size of HTTP client request bodies.", BYTES
            ),
        )
        self.families: list[Family[Cell] | Family[Value]] = [
            *self.client,
            *self.server,
            self.invocation,
            self.queue_depth,
        ]
        self._hosts = Names()
        self._tags = Names()
        self._inbound: dict[Exchange, bytes] = {}
        self._cells: dict[tuple[object, ...], _Cells] = {}

    # --- Observer ------------------------------------------------------------------------------
    def begun(self, exchange: Exchange) -> None:
        seen = exchange.head.seen
        if contract.ORIGINAL_HOST in seen:  # the Host is about to become another one
            self._inbound[exchange] = seen.get(b"host", b"")
        if self._limit and (depth := self._in_line()) < self._limit:
            self.queue_depth.of(()).value = depth + 1.0

    def over(self, exchange: Exchange, now: float) -> None:
        head = exchange.head
        seen = head.seen
        host = seen.get(b"host", b"")
        if contract.ORIGINAL_HOST in seen:
            host = self._inbound.pop(exchange, host)
        if self._limit and (depth := self._in_line()) > self._limit:
            self.queue_depth.of(()).value = depth - 1.0  # the next one starts right after this
        error = ""
        if exchange.failure:
            status = outcome.server_status(exchange)
            size = outcome.server_size(exchange)
            app_status = outcome.app_status(exchange)
            error = outcome.transport_error(exchange)
        elif exchange.upgraded:
            status = app_status = 200
            size = 0
        else:
            status = app_status = exchange.status
            size = exchange.sent
        probe = (
            contract.NETWORK_PROBE in seen or contract.KUBELET_PROBE in seen
        ) and outcome.probe_like(seen)
        tag, default = seen.get(contract.ROUTE_TAG), seen.get(contract.DEFAULT_ROUTE)
        key = (head.method, head.version, status, app_status, exchange.user_status, error)
        place = (host, tag, default, exchange.client.tls, probe)
        cells = self._cells.get((key, place))
        if cells is None:
            cells = self._new_cells(exchange, status, app_status, error, host, probe)
            if sum(len(part) for part in (head.method, host, tag or b"")) <= _KEPT_BYTES:
                if len(self._cells) >= _KEPT:
                    self._cells.clear()
                self._cells[key, place] = cells
        # most requests did not wait, and have no body: then one bisection will do
        received = float(exchange.received)
        received_slot = bisect_left(BYTES, received) if received else 0
        whole = now - exchange.started
        whole_slot = bisect_left(SECONDS, whole)
        running = now - exchange.admitted
        running_slot = whole_slot if running == whole else bisect_left(SECONDS, running)
        if cells.client is not None:
            duration, request = cells.client
            if exchange.answered:
                begun = exchange.answered - exchange.admitted
                duration.add(bisect_left(SECONDS, begun), begun)
            else:
                duration.add(running_slot, running)
            request.add(received_slot, received)
        if cells.app is not None:
            cells.app.add(running_slot, running)
        if cells.server is not None:
            duration, request, response = cells.server
            duration.add(whole_slot, whole)
            request.add(received_slot, received)
            response.add(bisect_left(BYTES, size), float(size))

    def probed(self, client: Client, head: Head, status: int, size: int, seconds: float) -> None:
        """Probes are no traffic."""

    # --- label sets ----------------------------------------------------------------------------
    def _new_cells(
        self,
        exchange: Exchange,
        status: int,
        app_status: int,
        error: str,
        host: bytes,
        probe: bool,
    ) -> _Cells:
        cells = _Cells()
        if app_status:
            cells.client = self._client_cells(exchange, error)
        if not probe:
            cells.server = self._server_cells(exchange, status, host)
            if app_status:
                label = ("http_response_status_code", str(app_status))
                cells.app = self.invocation.of((label,))
        return cells

    def _client_cells(self, exchange: Exchange, error: str) -> tuple[Cell, Cell]:
        address, port = self._peer
        result = ("error_type", error)
        if not error:
            result = ("http_response_status_code", str(exchange.user_status))
        labels: list[tuple[str, str]] = [
            result,
            ("http_request_method", method_label(exchange.head.method)),
            ("network_protocol_name", "http"),
            ("network_protocol_version", "2.0" if exchange.head.version == b"HTTP/2.0" else "1.1"),
            ("server_address", address),
            ("url_scheme", "http"),
        ]
        if port != "80":
            labels.append(("server_port", port))
        labels.sort()
        duration, size = self.client
        return duration.of(tuple(labels)), size.of(tuple(labels))

    def _server_cells(
        self, exchange: Exchange, status: int, host: bytes
    ) -> tuple[Cell, Cell, Cell]:
        head = exchange.head
        tls = exchange.client.tls
        labels: list[tuple[str, str]] = [
            ("http_request_method", method_label(head.method)),
            ("http_response_status_code", str(status)),
            ("kn_route_tag", self._tags.bounded(route_tag(head.seen))),
            ("network_protocol_name", "http"),
            ("network_protocol_version", head.version[5:].decode()),
            ("url_scheme", "https" if tls else "http"),
        ]
        address, port = split_host(label(host))
        known = self._hosts.bounded(f"{address}:{port}")
        if known == "_OTHER":
            address, port = known, 0
        labels.append(("server_address", address))
        if port and port != (443 if tls else 80):
            labels.append(("server_port", str(port)))
        labels.sort()
        series = tuple(labels)
        duration, request, response = self.server
        return duration.of(series), request.of(series), response.of(series)

    # --- text ------------------------------------------------------------------------------------
    def lines(self) -> list[str]:
        from weir.proxy.observe.process import process_lines  # the start can do without

        http = _scope(HTTP_SCOPE, HTTP_SCOPE_VERSION)
        lines = render([*self.client, *self.server], http)
        lines += render([self.invocation, self.queue_depth], _scope(QUEUE_SCOPE))
        return lines + process_lines()


def method_label(method: bytes) -> str:
    name = method.decode("latin-1").upper()
    return name if name in _METHODS else "_OTHER"


def route_tag(seen: dict[bytes, bytes]) -> str:
    """Contract section 7.1, kn_route_tag."""
    tag = seen.get(contract.ROUTE_TAG)
    default = seen.get(contract.DEFAULT_ROUTE)
    if not tag:
        return "kn:default" if default else "kn:disabled"
    return "kn:undefined" if default == b"true" else label(tag)


def split_host(value: str) -> tuple[str, int]:
    """Host and port (0: none) of a Host header; an empty host if it makes no sense."""
    if value.startswith("["):
        host, bracket, rest = value[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            return "", 0
        port = rest[1:]
    else:
        host, _, port = value.partition(":")
        if ":" in port:
            return "", 0
    return host, int(port) if port.isascii() and port.isdecimal() and len(port) < 6 else 0
