"""The trace that a message belongs to, as its publisher says: W3C Trace Context in user properties.

Owns what is passed on of it to the sink, and whether spans of our own are wanted. The event keeps
the context as well (CloudEvents' extension of distributed tracing): that one says where the event
comes from, the header of the request where the request comes from. Knows no SDK.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weir.adaptor.tracing import Tracing

_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_STATE = re.compile(r"[\x20-\x7e]{1,512}")


def published(user_properties: Iterable[tuple[str, str]]) -> dict[str, str]:
    """`traceparent`, and `tracestate` if there is one; nothing when they are not valid. Also with
    the prefix that sdk-go gives to attributes. Of several, the last."""
    parent = state = ""
    for name, value in user_properties:
        name = name.removeprefix("ce-")
        if name == "traceparent":
            parent = value
        elif name == "tracestate":
            state = value.strip(" ")
    if _PARENT.fullmatch(parent) is None:
        return {}
    if _STATE.fullmatch(state) is None:
        return {"traceparent": parent}
    return {"traceparent": parent, "tracestate": state}


def header_lines(context: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in context.items()).encode("ascii")


def passed_on(user_properties: Iterable[tuple[str, str]]) -> bytes:
    """The header lines of a request for a message with these, without spans of our own."""
    return header_lines(published(user_properties))


def wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether spans are to be sent somewhere, by the variables that every OpenTelemetry SDK has."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none":
        return False
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return any(environ.get(name) for name in names)


def start(environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """The spans' way out, if they are wanted. Raises ValueError when it is described wrongly."""
    if not wanted(environ):
        return None
    try:
        from weir.adaptor.tracing import Tracing
    except ImportError as error:
        logging.getLogger("weir.adaptor").warning(
            "no spans are sent, though OTEL_EXPORTER_OTLP_ENDPOINT is set: %s; "
            "install kn-weir[otel]",
            error,
        )
        return None
    return Tracing()
