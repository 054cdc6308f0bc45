"""The CloudEvent (1.0), and its attributes as HTTP header lines.

Owns attribute names, the rules of their values, and the percent-encoding of HTTP header values
(CloudEvents HTTP binding 3.1.3.2). The other encodings have modules of their own: jsonformat,
httpbinding, mqttbinding. Knows nothing of topics or routes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

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
_SAFE = "".join(map(chr, range(0x21, 0x7F))).replace('"', "").replace("%", "")
_SURROGATE = re.compile("[\ud800-\udfff]")
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
    """Lower-case ASCII letters and digits (CloudEvents 1.0, naming conventions); `data` is the
    payload's in every format."""
    return _NAME.fullmatch(name) is not None and name != "data"


def is_media_type(value: str) -> bool:
    """Whether it may stand in a Content-Type header (RFC 2045; no control characters)."""
    return _MEDIA_TYPE.fullmatch(value) is not None


def names_a_format(content_type: str | None) -> bool:
    """Whether it says that a message or request is an event in structured mode, of a format that
    is known or not, or a batch."""
    prefix = "application/cloudevents"
    return content_type is not None and content_type[: len(prefix)].lower() == prefix


def is_timestamp(value: str) -> bool:
    """RFC 3339, as the `time` attribute demands."""
    return _TIME.fullmatch(value) is not None


def shown(text: str) -> str:
    """For a message to people: on one line and of bounded length, whatever strangers wrote."""
    printable = "".join(
        each if each.isprintable() else f"\\u{ord(each):04x}" for each in text[:100]
    )
    return printable if len(text) <= 100 else f"{printable}..."


def check(attributes: Mapping[str, str]) -> None:
    """Raises MalformedEvent when a required attribute is missing or empty, or the version is not
    one that we speak."""
    for name in REQUIRED:
        if not attributes.get(name):
            raise MalformedEvent(f"the attribute `{name}` is missing or empty")
    if not re.fullmatch(r"1\.\d+(?:[.-].*)?", attributes["specversion"]):
        raise MalformedEvent(
            f"specversion `{shown(attributes['specversion'])}` is not supported; "
            "publish version 1.0"
        )


# --- HTTP binary mode ---------------------------------------------------------------------------


def encode_value(value: str) -> str:
    """Percent-encode space, double quote, percent and all outside U+0021..U+007E, byte by byte of
    UTF-8, upper-case. Lone surrogates, which have no UTF-8, become U+FFFD."""
    if _UNSAFE.search(value) is None:
        return value
    return quote(_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", value), safe=_SAFE)


def decode_value(value: str) -> str:
    """First undo double quotes and their backslashes, then exactly one round of percent-decoding.

    Raises MalformedEvent when the result is not UTF-8.
    """
    plain = _QUOTED.sub(lambda quoted: re.sub(r"\\(.)", r"\1", quoted.group(1)), value)
    try:
        return unquote_to_bytes(plain).decode()
    except UnicodeDecodeError as error:
        raise MalformedEvent(f"header value `{shown(value)}` does not decode to UTF-8") from error


def header(name: str, value: str) -> bytes:
    """One header line of an attribute, CRLF included."""
    return f"ce-{name}: {encode_value(value)}\r\n".encode("ascii")


def http_headers(event: Event) -> bytes:
    """The header lines of binary mode. `ce-datacontenttype` must not appear: it is Content-Type."""
    lines = [header(name, value) for name, value in event.attributes.items()]
    if event.content_type is not None:
        lines.append(f"Content-Type: {event.content_type}\r\n".encode("ascii"))
    return b"".join(lines)
