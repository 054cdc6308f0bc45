"""Spans of events on their way, by the official OpenTelemetry SDK. Imported only when asked for.

Two kinds: `process ROUTE`, from the message's receipt to the end of its event, child of the context
that the publisher gave; and under it one `POST` for each attempt, whose context the sink gets, so
that what the function reports hangs below the attempt that reached it. Sampling, batching (a thread
and a bounded queue) and export are the SDK's, and so are the variables that set them.

A batch is one request for many events: their attempts are shown, and the sink is told no context.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from weir.adaptor.delivery import Pipeline
from weir.adaptor.outgoing import Outgoing
from weir.adaptor.tracecontext import header_lines, published
from weir.proxy.wire.client import Response

SCOPE = "weir.adaptor"
_W3C = TraceContextTextMapPropagator()


class Tracing:
    """The SDK's provider; one for all sinks."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """Raises ImportError or ValueError."""
        service = os.environ.get("OTEL_SERVICE_NAME") or "weir-adaptor"
        resource = Resource.create({"service.name": service})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _exporter()))
        self.tracer = self._provider.get_tracer(SCOPE)

    def pipeline(self, *arguments: Any, **more: Any) -> Pipeline:
        return TracedPipeline(self, *arguments, **more)

    async def close(self) -> None:
        """Send what is finished; for a while, if nobody takes it."""
        await asyncio.to_thread(self._provider.shutdown)


def _exporter() -> SpanExporter:
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
    )
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter as OverGrpc,
        )

        return OverGrpc()
    if protocol != "http/protobuf":
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL `{protocol}`: use http/protobuf or grpc")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

    return OverHttp()


class _Trace:
    """The spans of one event. `head`: of its requests, without a context; `error`: of the last."""

    __slots__ = ("attempt", "context", "error", "head", "span")

    def __init__(self, span: Span, head: bytes) -> None:
        self.span, self.head = span, head
        self.context = set_span_in_context(span, Context())
        self.attempt: Span | None = None
        self.error: str | None = None


class TracedPipeline(Pipeline):
    """The pipeline with a span around an event, and one around each attempt."""

    def __init__(self, tracing: Tracing, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._tracer, self._url = tracing.tracer, more.get("url") or self.sink
        self._traces: dict[Outgoing, _Trace] = {}

    def _context(self, user_properties: list[tuple[str, str]]) -> bytes:
        return b""  # it goes to the spans, and the sink gets theirs

    def _begun(self, outgoing: Outgoing) -> _Trace:
        message, route = outgoing.message, outgoing.flow.route
        span = self._tracer.start_span(
            f"process {route.name}",
            _W3C.extract(published(message.user_properties), Context()),
            SpanKind.CONSUMER,
            {
                "messaging.system": "mqtt",
                "messaging.operation.type": "process",
                "messaging.operation.name": "process",
                "messaging.destination.name": message.topic,
                "messaging.destination.template": route.filter.text,
                "messaging.message.body.size": len(message.payload),
                "cloudevents.event_id": outgoing.event_id,
            },
            start_time=int(outgoing.received * 1e9),
        )
        trace = self._traces[outgoing] = _Trace(span, outgoing.head)
        return trace

    def _start(self, outgoing: Outgoing) -> bool:
        trace = self._traces.get(outgoing) or self._begun(outgoing)
        trace.attempt = self._tracer.start_span(
            "POST",
            trace.context,
            SpanKind.CLIENT,
            {"http.request.method": "POST", "url.full": self._url},
        )
        if outgoing.attempts:
            trace.attempt.set_attribute("http.request.resend_count", outgoing.attempts)
        if outgoing.flow.batcher is None:
            carrier: dict[str, str] = {}
            _W3C.inject(carrier, set_span_in_context(trace.attempt, Context()))
            outgoing.head = trace.head + header_lines(carrier)
        return super()._start(outgoing)

    def _answered(self, outgoing: Outgoing, answer: asyncio.Future[Response]) -> None:
        trace = self._traces.get(outgoing)
        if trace is not None and trace.attempt is not None:
            error: str | None = None
            if answer.cancelled():
                error = "cancelled"
            elif (lost := answer.exception()) is not None:
                error = type(lost).__name__
                trace.attempt.set_attribute("error.message", str(lost))
            else:
                status = answer.result().status
                trace.attempt.set_attribute("http.response.status_code", status)
                error = None if 200 <= status <= 299 else str(status)
            if error is not None:
                trace.attempt.set_attribute("error.type", error)
                trace.attempt.set_status(Status(StatusCode.ERROR))
            trace.attempt.end()
            trace.attempt = None
            trace.error = error
        super()._answered(outgoing, answer)

    def _gone(self, outgoing: Outgoing) -> None:
        trace = self._traces.pop(outgoing, None)
        if trace is not None:
            if trace.attempt is not None:  # never sent: its time was over
                trace.attempt.end()
            if outgoing.attempts:
                trace.span.set_attribute("weir.retries", outgoing.attempts)
            if trace.error is not None:
                trace.span.set_attribute("error.type", trace.error)
                trace.span.set_status(Status(StatusCode.ERROR))
            trace.span.end()
        super()._gone(outgoing)

    def stop(self) -> None:
        for trace in self._traces.values():
            trace.span.set_status(Status(StatusCode.ERROR, "not delivered when we stopped"))
            trace.span.end()
        self._traces.clear()
        super().stop()
