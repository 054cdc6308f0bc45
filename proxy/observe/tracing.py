"""Spans of proxied requests, by the official OpenTelemetry SDK (contract section 7.3).

Owns which spans there are and what the user container is told of them. Sampling, batching (a
thread and a bounded queue of its own) and export are the SDK's. Imported only when asked for.

The parent of everything the user container reports is the span of our request to it. Its id is
made when the request comes, because the header has to carry it; the span itself, like the others
but the first, when the request is over and it is known how long everything took.
"""

from __future__ import annotations

import os
import sys
import time
from typing import NamedTuple

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    ParentBased,
    Sampler,
    TraceIdRatioBased,
)
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from weir.proxy.environment import Tracing
from weir.proxy.exchange import Client, Exchange, Head
from weir.proxy.observe import outcome
from weir.proxy.observe.instruments import label
from weir.proxy.observe.metrics import QUEUE_SCOPE, method_label, split_host
from weir.proxy.observe.push import endpoint

_ZIPKIN_FIELDS = (b"x-b3-traceid", b"x-b3-spanid", b"x-b3-sampled")
_PARENT_FIELDS = frozenset({b"traceparent", b"tracestate", b"x-forwarded-for", *_ZIPKIN_FIELDS})
_W3C = TraceContextTextMapPropagator()


class _Ids(RandomIdGenerator):
    """Gives a span the id that was promised for it."""

    promised = 0

    def generate_span_id(self) -> int:
        promised, self.promised = self.promised, 0
        return promised or super().generate_span_id()


_NAMES = ("kn.queueproxy.proxy", "kn.queueproxy.wait")
_NAMES_BEFORE = ("queue_proxy", "queue_wait")
"""Of the spans between the request's and ours to the user container; before v1.19."""


class _Trace(NamedTuple):
    server: Span
    at: int
    """Nanoseconds of the wall clock, when the request came."""
    client_id: int


class RequestTracer:
    """An Observer. With Zipkin's protocol, its headers (B3) are read and written as well."""

    def __init__(
        self,
        tracing: Tracing,
        export: SpanExporter,
        attributes: dict[str, str],
        user: str,
        breaker: bool,
    ) -> None:
        self._ids = _Ids()
        self.provider = TracerProvider(
            sampler=sampler(tracing),
            resource=Resource.create(dict(attributes)),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self.provider.add_span_processor(BatchSpanProcessor(export))
        self._tracer = self.provider.get_tracer(QUEUE_SCOPE)
        self._user = user
        self._breaker = breaker
        self._zipkin = tracing.protocol == "zipkin"

    # --- Observer ------------------------------------------------------------------------------
    def begun(self, exchange: Exchange) -> None:
        head = exchange.head
        if outcome.probe_like(head.seen):
            return
        at = time.time_ns()
        fields = {
            name.lower(): value for name, value in head.fields() if name.lower() in _PARENT_FIELDS
        }
        parent, traced = self._parent(fields)
        span = self._tracer.start_span(
            self._path(head)
            if self._zipkin
            else method_label(head.method).replace("_OTHER", "HTTP"),
            context=parent,
            kind=SpanKind.SERVER,
            start_time=at,
        )
        if span.is_recording():
            self._describe(span, exchange, fields.get(b"x-forwarded-for", b""))
        client_id = self._ids.generate_span_id()
        exchange.trace = _Trace(span, at, client_id)
        context = span.get_span_context()
        sampled = context.trace_flags & TraceFlags.SAMPLED
        told = {b"traceparent": b"00-%032x-%016x-%02x" % (context.trace_id, client_id, sampled)}
        if not traced and b"tracestate" in fields:
            told[b"tracestate"] = b""  # of a trace that nobody can tell
        if self._zipkin:
            values = (b"%032x" % context.trace_id, b"%016x" % client_id, b"%d" % sampled)
            told |= dict(zip(_ZIPKIN_FIELDS, values, strict=True))
        head.replace(told)

    def over(self, exchange: Exchange, now: float) -> None:
        trace = exchange.trace
        if not isinstance(trace, _Trace):
            return
        span = trace.server
        if not span.is_recording():
            return
        end = trace.at + _nanoseconds(now - exchange.started)
        turn = trace.at + _nanoseconds(exchange.admitted - exchange.started)
        context = set_span_in_context(span)
        proxy_name, wait_name = _NAMES_BEFORE if self._zipkin else _NAMES
        proxy = self._tracer.start_span(proxy_name, context, start_time=trace.at)
        within = set_span_in_context(proxy)
        if self._breaker and exchange.admission is not None:
            waited = self._tracer.start_span(wait_name, within, start_time=trace.at)
            waited.end(turn if outcome.had_its_turn(exchange) else end)
        if outcome.had_its_turn(exchange):
            self._asked(exchange, trace, within, turn, end)
        proxy.end(end)
        status = outcome.server_status(exchange)
        span.set_attribute("http.response.status_code", status)
        if exchange.received:
            span.set_attribute("http.request.body.size", exchange.received)
        if exchange.sent:
            span.set_attribute("http.response.body.size", exchange.sent)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)

    def probed(self, client: Client, head: Head, status: int, size: int, seconds: float) -> None:
        """Probes are not traced."""

    # --- spans -----------------------------------------------------------------------------------
    def _parent(self, fields: dict[bytes, bytes]) -> tuple[Context, bool]:
        """The context the request came with, and whether it came with any."""
        carrier = {
            name.decode(): label(fields[name])
            for name in (b"traceparent", b"tracestate")
            if name in fields
        }
        context = _W3C.extract(carrier, Context())
        if not context and self._zipkin:
            context = _of_zipkin(fields)
        return context, bool(context)

    def _describe(self, span: Span, exchange: Exchange, forwarded_for: bytes) -> None:
        head, client = exchange.head, exchange.client
        address, port = split_host(label(head.seen.get(b"host", b"")))
        peer = label(client.peer)
        method = method_label(head.method)
        span.set_attributes(
            {
                "server.address": address,
                "http.request.method": method,
                "url.scheme": "https" if client.tls else "http",
                "url.path": self._path(head),
                "network.peer.address": peer,
                "network.peer.port": client.peer_port,
                "network.protocol.version": head.version[5:].decode(),
                "client.address": label(forwarded_for.partition(b",")[0].strip()) or peer,
            }
        )
        if port and port != (443 if client.tls else 80):
            span.set_attribute("server.port", port)
        if method == "_OTHER":
            span.set_attribute("http.request.method_original", label(head.method))
        agent = head.seen.get(b"user-agent")
        if agent:
            span.set_attribute("user_agent.original", label(agent))

    def _asked(
        self, exchange: Exchange, trace: _Trace, context: Context, turn: int, end: int
    ) -> None:
        """The span of our request to the user container."""
        head = exchange.head
        self._ids.promised = trace.client_id
        host, _, port = self._user.rpartition(":")
        client = self._tracer.start_span(
            self._path(head) if self._zipkin else f"HTTP {label(head.method)}",
            context,
            SpanKind.CLIENT,
            {
                "http.request.method": method_label(head.method),
                "url.full": f"http://{self._user}{label(head.target)}",
                "server.address": host,
                "server.port": int(port),
                "network.protocol.version": "2.0" if head.version == b"HTTP/2.0" else "1.1",
            },
            start_time=turn,
        )
        error = outcome.transport_error(exchange)
        if error:
            client.set_attribute("error.type", error)
        else:
            client.set_attribute("http.response.status_code", exchange.user_status)
            if exchange.user_status >= 400:
                error = str(exchange.user_status)
                client.set_attribute("error.type", error)
        if error:
            client.set_status(Status(StatusCode.ERROR))
        client.end(end)

    @staticmethod
    def _path(head: Head) -> str:
        return label(head.target.partition(b"?")[0])


def sampler(tracing: Tracing) -> Sampler | None:
    """Upstream's rules: all, none, or parent-based by ratio. None: the environment says.

    OTEL_TRACES_SAMPLER is the SDK's own variable, OTEL_TRACES_SAMPLER_ARG replaces the rate.
    """
    if os.environ.get("OTEL_TRACES_SAMPLER"):
        return None
    rate = 1.0 if tracing.debug else tracing.sampling_rate
    given = os.environ.get("OTEL_TRACES_SAMPLER_ARG")
    if given:
        rate = float(given)
    if rate >= 1.0:
        return ALWAYS_ON
    if tracing.protocol == "zipkin":  # who samples is followed at any rate, who does not never is
        by_rate = TraceIdRatioBased(max(rate, 0.0))
        return ParentBased(by_rate, remote_parent_not_sampled=by_rate)
    return ALWAYS_OFF if rate <= 0.0 else ParentBased(TraceIdRatioBased(rate))


def exporter(tracing: Tracing, service: str) -> SpanExporter:
    """Raises ImportError or ValueError. `service` is how Zipkin calls us."""
    if tracing.protocol == "zipkin":
        from weir.proxy.observe.zipkin import ZipkinExporter

        return ZipkinExporter(tracing.endpoint, service)
    if tracing.protocol == "stdout":
        return ConsoleSpanExporter(
            out=sys.stdout, formatter=lambda span: span.to_json(indent=None) + "\n"
        )
    where = endpoint(tracing.endpoint, "traces", tracing.protocol)
    if tracing.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter as OverGrpc,
        )

        return OverGrpc(endpoint=where)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

    return OverHttp(endpoint=where)


def _of_zipkin(fields: dict[bytes, bytes]) -> Context:
    """The parent that B3's headers name, if they do."""
    try:
        trace_id, span_id = (int(fields[name], 16) for name in _ZIPKIN_FIELDS[:2])
    except (KeyError, ValueError):
        return Context()
    sampled = fields.get(b"x-b3-sampled", b"0") in (b"1", b"true")
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    context = SpanContext(
        trace_id, span_id, is_remote=True, trace_flags=flags, trace_state=TraceState()
    )
    return (
        set_span_in_context(NonRecordingSpan(context), Context())
        if context.is_valid
        else (Context())
    )


def _nanoseconds(seconds: float) -> int:
    return max(round(seconds * 1e9), 0)
