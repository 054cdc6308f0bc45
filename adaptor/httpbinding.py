"""The HTTP binding of CloudEvents 1.0: what a request or a response says, in any of its modes.

Owns how the modes are told apart, and what they look like going out. The header lines of binary
mode are made in events.py, on the fast path. Knows nothing of sockets or sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from weir.adaptor.events import (
    Event,
    MalformedEvent,
    check,
    decode_value,
    http_headers,
    is_attribute_name,
    is_media_type,
    names_a_format,
    shown,
)
from weir.adaptor.jsonformat import BATCH, STRUCTURED, batch_from_json, from_json, to_batch, to_json

Mode = Literal["binary", "structured", "batch"]
Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case."""

STRUCTURED_LINE = f"Content-Type: {STRUCTURED}\r\n".encode("ascii")
BATCH_LINE = f"Content-Type: {BATCH}\r\n".encode("ascii")


def encoded(event: Event, mode: Mode) -> tuple[bytes, bytes]:
    """Header lines and body of a request with this one event. Data that is itself an event in some
    format goes in structured mode: its Content-Type would be taken for the request's own mode."""
    if mode == "binary" and not names_a_format(event.content_type):
        return http_headers(event), event.data
    if mode == "batch":
        return BATCH_LINE, to_batch([to_json(event)])
    return STRUCTURED_LINE, to_json(event)


def mode_of(headers: Headers) -> Mode | None:
    """By Content-Type, in any case, batches first since the shorter name begins the longer one;
    None: no event is meant."""
    essence = _essence(_content_type(headers))
    if essence.startswith("application/cloudevents-batch"):
        return "batch"
    if essence.startswith("application/cloudevents"):
        return "structured"
    return "binary" if any(name == b"ce-specversion" for name, _ in headers) else None


def from_http(headers: Headers, body: bytes) -> Event:
    """The one event of a request or a response, in binary or structured mode. Raises
    MalformedEvent."""
    mode = mode_of(headers)
    if mode == "batch":
        raise MalformedEvent("a batch is not taken here; send one event")
    if mode == "structured":
        _known_format(headers, STRUCTURED)
        return from_json(body)
    attributes: dict[str, str] = {}
    for name, value in headers:
        if not name.startswith(b"ce-"):
            continue
        attribute = name[3:].decode("latin-1")
        if attribute in attributes:
            raise MalformedEvent(f"the attribute `{shown(attribute)}` stands twice")
        if attribute == "datacontenttype" or not is_attribute_name(attribute):
            raise MalformedEvent(f"`ce-{shown(attribute)}` is no attribute of binary mode")
        try:
            attributes[attribute] = decode_value(value.decode("latin-1"))
        except MalformedEvent as error:
            raise MalformedEvent(f"the attribute `{attribute}`: {error}") from error
    check(attributes)
    content_type = _content_type(headers)
    if content_type and not is_media_type(content_type):
        raise MalformedEvent(f"the content type `{shown(content_type)}` is not a media type")
    return Event(attributes, body, content_type or None)


def events_from_http(headers: Headers, body: bytes) -> list[Event]:
    """The events of a request in any mode; of a batch there may be none. Raises MalformedEvent."""
    if mode_of(headers) != "batch":
        return [from_http(headers, body)]
    _known_format(headers, BATCH)
    return batch_from_json(body)


def _known_format(headers: Headers, known: str) -> None:
    essence = _essence(_content_type(headers))
    if essence not in (known, known.removesuffix("+json")):
        raise MalformedEvent(
            f"the format `{shown(essence)}` is not known; send JSON or binary mode"
        )


def _content_type(headers: Headers) -> str:
    declared = next((value for name, value in headers if name == b"content-type"), b"")
    return declared.decode("latin-1").strip()


def _essence(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()
