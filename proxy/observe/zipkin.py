"""Spans for a Zipkin server, as releases before v1.19 sent them (TRACING_CONFIG_BACKEND)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any
from urllib import request as urlrequest

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode

_SECONDS = 10.0
_KINDS = {SpanKind.SERVER: "SERVER", SpanKind.CLIENT: "CLIENT"}

log = logging.getLogger("weir.tracing")


class ZipkinExporter(SpanExporter):
    """Posts JSON of Zipkin's API v2 to `url`, from the batch processor's thread."""

    def __init__(self, url: str, service: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"zipkin endpoint {url!r} is no http(s) URL")
        self._url = url
        self._service = service

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        body = json.dumps([self.encoded(span) for span in spans]).encode()
        post = urlrequest.Request(
            self._url, data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urlrequest.urlopen(post, timeout=_SECONDS):
                return SpanExportResult.SUCCESS
        except OSError as error:
            log.warning("%d spans could not be sent to %s: %s", len(spans), self._url, error)
            return SpanExportResult.FAILURE

    def encoded(self, span: ReadableSpan) -> dict[str, Any]:
        context = span.get_span_context()
        assert context is not None and span.start_time is not None and span.end_time is not None
        found: dict[str, Any] = {
            "traceId": f"{context.trace_id:032x}",
            "id": f"{context.span_id:016x}",
            "name": span.name,
            "timestamp": span.start_time // 1000,
            "duration": max((span.end_time - span.start_time) // 1000, 1),
            "localEndpoint": {"serviceName": self._service},
            "tags": {name: str(value) for name, value in (span.attributes or {}).items()},
        }
        if span.parent is not None:
            found["parentId"] = f"{span.parent.span_id:016x}"
        if span.kind in _KINDS:
            found["kind"] = _KINDS[span.kind]
        if span.status.status_code is StatusCode.ERROR:
            found["tags"]["error"] = "true"
        return found
