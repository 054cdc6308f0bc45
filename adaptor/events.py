"""The CloudEvent (1.0) and its two encodings that meet here: HTTP binary mode out, JSON in.

Owns attribute names, the rules of their values, and the percent-encoding of HTTP header values
(CloudEvents HTTP binding 3.1.3.2). Knows nothing of MQTT, topics or routes.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

REQUIRED = ("specversion", "id", "source", "type")
OPAQUE = "application/octet-stream"

_NAME = re.compile(r"[a-z0-9]+")
_MEDIA_TYPE = re.compile(
    r"[!#$%&'*+.^_`|~0-9A-Za-z-]+/[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:[ \t]*;[ -~]*)?"
)
_TIME = re.compile(
    r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])[Tt](?:[01]\d|2[0-3]):[0-5]\d:(?:[0-5]\d|60)"
    r"(?:\.\d+)?(?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
)
_UNSAFE = re.compile(r"[^!#$&-~]")
_ENCODED = re.compile(rb"%([0-9A-Fa-f]{2})")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)


class MalformedEvent(ValueError):
    """Meant to be a CloudEvent and is none; str() says why. No retry can change that."""


@dataclass(frozen=True, slots=True)
class Event:
    """`attributes` in their canonical string form, without datacontenttype; `data` as bytes."""

    attributes: Mapping[str, str]
    data: bytes
    content_type: str | None = OPAQUE


def is_attribute_name(name: str) -> bool:
    """Lower-case ASCII letters and digits (CloudEvents 1.0, naming conventions)."""
    return _NAME.fullmatch(name) is not None


def is_media_type(value: str) -> bool:
    """Whether it may stand in a Content-Type header (RFC 2045; no control characters)."""
    return _MEDIA_TYPE.fullmatch(value) is not None


def is_timestamp(value: str) -> bool:
    """RFC 3339, as the `time` attribute demands."""
    return _TIME.fullmatch(value) is not None


def check(attributes: Mapping[str, str]) -> None:
    """Raises MalformedEvent when a required attribute is missing or empty, or the version is not
    one that we speak."""
    for name in REQUIRED:
        if not attributes.get(name):
            raise MalformedEvent(f"the attribute `{name}` is missing or empty")
    if not re.fullmatch(r"1\.\d+(?:[.-].*)?", attributes["specversion"]):
        raise MalformedEvent(
            f"specversion `{attributes['specversion']}` is not supported; publish version 1.0"
        )


# --- HTTP binary mode ---------------------------------------------------------------------------


def encode_value(value: str) -> str:
    """Percent-encode space, double quote, percent and all outside U+0021..U+007E, byte by byte of
    UTF-8, upper-case. Lone surrogates, which have no UTF-8, become U+FFFD."""
    return _UNSAFE.sub(_encode_character, value)


def _encode_character(match: re.Match[str]) -> str:
    character = match.group()
    if 0xD800 <= ord(character) <= 0xDFFF:
        character = "\N{REPLACEMENT CHARACTER}"
    return "".join(f"%{byte:02X}" for byte in character.encode())


def decode_value(value: str) -> str:
    """First undo double quotes and their backslashes, then exactly one round of percent-decoding.

    Raises MalformedEvent when the result is not UTF-8.
    """
    plain = _QUOTED.sub(lambda quoted: re.sub(r"\\(.)", r"\1", quoted.group(1)), value)
    raw = _ENCODED.sub(lambda code: bytes([int(code.group(1), 16)]), plain.encode())
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedEvent(f"header value `{value}` does not decode to UTF-8") from error


def header(name: str, value: str) -> bytes:
    """One header line of an attribute, CRLF included."""
    return f"ce-{name}: {encode_value(value)}\r\n".encode("ascii")


def http_headers(event: Event) -> bytes:
    """The header lines of binary mode. `ce-datacontenttype` must not appear: it is Content-Type."""
    lines = [header(name, value) for name, value in event.attributes.items()]
    if event.content_type is not None:
        lines.append(f"Content-Type: {event.content_type}\r\n".encode("ascii"))
    return b"".join(lines)


# --- JSON format --------------------------------------------------------------------------------


def from_json(payload: bytes) -> Event:
    """An event in the JSON format (structured mode). Raises MalformedEvent."""
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise MalformedEvent(f"structured mode, but the payload is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise MalformedEvent("structured mode, but the payload is not a JSON object")
    attributes: dict[str, str] = {}
    for name, value in document.items():
        if name in ("data", "data_base64", "datacontenttype") or value is None:
            continue
        if not is_attribute_name(name):
            raise MalformedEvent(f"`{name}` is no attribute name (lower-case letters and digits)")
        attributes[name] = _canonical(name, value)
    check(attributes)
    content_type, data = _json_data(document)
    return Event(attributes, data, content_type)


def to_json(event: Event) -> bytes:
    """The event in the JSON format: data as JSON where it is JSON, as text where it is text, else
    in base64."""
    document: dict[str, object] = dict(event.attributes)
    declared = event.content_type
    if declared is not None:
        document["datacontenttype"] = declared
    if event.data:
        document |= _data_members(declared, event.data)
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "replace"
    )


def _data_members(declared: str | None, data: bytes) -> dict[str, object]:
    try:
        if declared is not None and _is_json(declared):
            return {"data": json.loads(data)}
        if declared is not None and declared.lower().startswith("text/"):
            return {"data": data.decode("utf-8")}
    except (ValueError, RecursionError):
        pass  # not what it says it is; base64 carries everything
    return {"data_base64": base64.b64encode(data).decode("ascii")}


def from_http(headers: list[tuple[bytes, bytes]], body: bytes) -> Event:
    """An event of a request, binary or structured mode (CloudEvents HTTP binding). `headers`: names
    in lower case. Raises MalformedEvent."""
    declared = next((value for name, value in headers if name == b"content-type"), b"")
    content_type = declared.decode("latin-1").strip()
    essence = content_type.partition(";")[0].strip().lower()
    if essence.startswith("application/cloudevents-batch"):
        raise MalformedEvent("batches are not taken; send one event per request")
    if essence == "application/cloudevents+json":
        return from_json(body)
    if essence.startswith("application/cloudevents"):
        raise MalformedEvent(f"the format `{essence}` is not known; send JSON or binary mode")
    attributes: dict[str, str] = {}
    for name, value in headers:
        if not name.startswith(b"ce-"):
            continue
        attribute = name[3:].decode("latin-1")
        if attribute in attributes:
            raise MalformedEvent(f"the attribute `{attribute}` stands twice")
        if attribute == "datacontenttype" or not is_attribute_name(attribute):
            raise MalformedEvent(f"`ce-{attribute}` is no attribute of binary mode")
        attributes[attribute] = decode_value(value.decode("latin-1"))
    check(attributes)
    if content_type and not is_media_type(content_type):
        raise MalformedEvent(f"the content type `{content_type}` is not a media type")
    return Event(attributes, body, content_type or None)


def _canonical(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    raise MalformedEvent(f"the attribute `{name}` is neither string, boolean nor integer")


def _json_data(document: dict[str, object]) -> tuple[str | None, bytes]:
    declared = document.get("datacontenttype")
    if declared is not None and not (isinstance(declared, str) and is_media_type(declared)):
        raise MalformedEvent(f"datacontenttype `{declared}` is not a media type")
    if document.get("data_base64") is not None:
        encoded = document["data_base64"]
        if "data" in document or not isinstance(encoded, str):
            raise MalformedEvent("data_base64 must be a string and stand without data")
        try:
            return declared, base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise MalformedEvent(f"data_base64 is not base64: {error}") from error
    if "data" not in document:
        return declared, b""
    data = document["data"]
    if isinstance(data, str) and declared is not None and not _is_json(declared):
        return declared, data.encode("utf-8", "replace")
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return declared or "application/json", text.encode("utf-8", "replace")


def _is_json(media_type: str) -> bool:
    essence = media_type.partition(";")[0].strip().lower()
    return essence in ("application/json", "text/json") or essence.endswith("+json")
