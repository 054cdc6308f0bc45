"""The JSON event format of CloudEvents 1.0: one event as an object, a batch as an array of them.

Data that is JSON goes through as it stands in either direction: numbers keep their digits, objects
their order, strings their escapes. So the members of an event are cut out of the text, not made
again from what was parsed. Knows nothing of HTTP or MQTT.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import NoReturn

from weir.adaptor.events import (
    Event,
    MalformedEvent,
    check,
    is_attribute_name,
    is_media_type,
    shown,
)

STRUCTURED = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"

LARGEST = 4 << 20
"""Bytes of JSON that is looked into. Parsed it takes up to 28 times the room, and a message that
kills us by that comes again, to kill us again."""

_SPACE = re.compile(r"[ \t\n\r]*")
_CHARSET = re.compile(r""";\s*charset\s*=\s*"?([^\s";]+)""", re.IGNORECASE)
_OWN_MEMBERS = ("data", "data_base64", "datacontenttype")
_Members = dict[str, tuple[object, str]]
"""By name: the value, and how it is written."""


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_decoder = json.JSONDecoder(parse_constant=_no_number)


def is_json(media_type: str) -> bool:
    """Whether data of this type stands in an event as it is (JSON format, section 3.1)."""
    essence = media_type.partition(";")[0].strip().lower()
    return essence in ("application/json", "text/json") or essence.endswith("+json")


# --- in -----------------------------------------------------------------------------------------


def from_json(payload: bytes) -> Event:
    """An event in structured mode. Raises MalformedEvent."""
    _check_size(payload)
    try:
        text = payload.decode("utf-8-sig")
        members, end = _object(text, _after_space(text, 0))
        _nothing_more(text, end)
    except MalformedEvent:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedEvent(f"structured mode, but the payload is not JSON: {error}") from error
    return _event(members)


def batch_from_json(payload: bytes) -> list[Event]:
    """The events of a batch, in order; there may be none. Raises MalformedEvent."""
    _check_size(payload)
    found: list[_Members] = []
    try:
        text = payload.decode("utf-8-sig")
        at = _after_space(text, 0)
        if text[at : at + 1] != "[":
            raise MalformedEvent("a batch, but the payload is not a JSON array")
        at = _after_space(text, at + 1)
        more = text[at : at + 1] != "]"
        at += not more
        while more:
            members, at = _object(text, at)
            found.append(members)
            more, at = _goes_on(text, at, "]")
        _nothing_more(text, at)
    except MalformedEvent as error:
        raise MalformedEvent(f"event {len(found) + 1} of the batch: {error}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedEvent(f"a batch, but the payload is not JSON: {error}") from error
    events = []
    for number, members in enumerate(found, 1):
        try:
            events.append(_event(members))
        except MalformedEvent as error:
            raise MalformedEvent(f"event {number} of the batch: {error}") from error
    return events


def _check_size(payload: bytes) -> None:
    if len(payload) > LARGEST:
        raise MalformedEvent(
            f"an event in JSON has at most {LARGEST} bytes, this one {len(payload)}; "
            "use binary mode"
        )


def _object(text: str, at: int) -> tuple[_Members, int]:
    """The members of the object that begins here, and where it ends. Raises ValueError,
    RecursionError, and MalformedEvent where it is JSON and still no event."""
    if text[at : at + 1] != "{":
        _decoder.raw_decode(text, at)  # says what is wrong, if it isn't JSON at all
        raise MalformedEvent("structured mode, but the payload is not a JSON object")
    members: _Members = {}
    at = _after_space(text, at + 1)
    if text[at : at + 1] == "}":
        return members, at + 1
    more = True
    while more:
        if text[at : at + 1] != '"':
            raise json.JSONDecodeError("Expecting a name in double quotes", text, at)
        name, at = _decoder.raw_decode(text, at)
        at = _after_space(text, at)
        if text[at : at + 1] != ":":
            raise json.JSONDecodeError("Expecting a colon", text, at)
        start = _after_space(text, at + 1)
        value, at = _decoder.raw_decode(text, start)
        if name in members:
            raise MalformedEvent(f"`{shown(name)}` stands twice")
        members[name] = value, text[start:at]
        more, at = _goes_on(text, at, "}")
    return members, at


def _goes_on(text: str, at: int, end: str) -> tuple[bool, int]:
    """Whether a comma follows, with the place of what comes after it; else `end` does."""
    at = _after_space(text, at)
    if text[at : at + 1] == ",":
        return True, _after_space(text, at + 1)
    if text[at : at + 1] != end:
        raise json.JSONDecodeError(f"Expecting a comma or {end}", text, at)
    return False, at + 1


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # it may be empty
    return found.end()


def _nothing_more(text: str, at: int) -> None:
    at = _after_space(text, at)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _event(members: _Members) -> Event:
    attributes: dict[str, str] = {}
    for name, (value, _) in members.items():
        if name in _OWN_MEMBERS or value is None:
            continue
        if not is_attribute_name(name):
            raise MalformedEvent(
                f"`{shown(name)}` is no attribute name (lower-case letters and digits)"
            )
        attributes[name] = _canonical(name, value)
    check(attributes)
    content_type, data = _data(members)
    return Event(attributes, data, content_type)


def _canonical(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise MalformedEvent(f"the attribute `{name}` is neither string, boolean nor integer")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise MalformedEvent(f"the attribute `{name}` is no text: it has half a surrogate pair")
    return value


def _data(members: _Members) -> tuple[str | None, bytes]:
    """The content type and the data."""
    declared = members.get("datacontenttype", (None, ""))[0]
    if declared is not None and not (isinstance(declared, str) and is_media_type(declared)):
        raise MalformedEvent(f"datacontenttype `{shown(str(declared))}` is not a media type")
    encoded = members.get("data_base64", (None, ""))[0]
    if encoded is not None:
        if "data" in members or not isinstance(encoded, str):
            raise MalformedEvent("data_base64 must be a string and stand without data")
        try:
            return declared, base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise MalformedEvent(f"data_base64 is not base64: {error}") from error
    if "data" not in members:
        return declared, b""
    value, written = members["data"]
    if isinstance(value, str) and declared is not None and not is_json(declared):
        try:
            return declared, value.encode()
        except UnicodeEncodeError as error:
            raise MalformedEvent("data is no text: it has half a surrogate pair") from error
    return declared or "application/json", written.encode()


# --- out ----------------------------------------------------------------------------------------


def to_json(event: Event) -> bytes:
    """The event as an object: data as JSON where it is JSON, as text where it is text, else in
    base64 (as JSON larger than LARGEST, too). Attributes with half a surrogate pair get U+FFFD in
    its place."""
    members = dict(event.attributes)
    if event.content_type is not None:
        members["datacontenttype"] = event.content_type
    return _with_data(_object_of(members), event.content_type, event.data)


def completed(
    begun: bytes, late: Mapping[str, str], content_type: str | None, data: bytes
) -> bytes:
    """`to_json` of the event whose other attributes and content type `begun` is the `to_json` of;
    `late`: the attributes that it lacks."""
    return _with_data(b"%s,%s" % (begun[:-1], _object_of(late)[1:]), content_type, data)


def _object_of(members: Mapping[str, str]) -> bytes:
    text = json.dumps(members, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text).encode()


def _with_data(members: bytes, declared: str | None, data: bytes) -> bytes:
    return b"%s,%s}" % (members[:-1], _data_member(declared, data)) if data else members


def _data_member(declared: str | None, data: bytes) -> bytes:
    try:
        if declared is not None and is_json(declared) and len(data) <= LARGEST:
            _decoder.decode(data.decode())
            return b'"data":%s' % data
        if declared is not None and _is_text(declared):
            return b'"data":%s' % json.dumps(data.decode(), ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        pass  # not what it says it is; base64 carries everything
    return b'"data_base64":"%s"' % base64.b64encode(data)


def _is_text(media_type: str) -> bool:
    """Text whose bytes a reader makes again from its characters."""
    charset = _CHARSET.search(media_type)
    utf8 = charset is None or charset.group(1).lower() in ("utf-8", "utf8", "us-ascii")
    return media_type[:5].lower() == "text/" and utf8


def to_batch(events: list[bytes]) -> bytes:
    """One array of events that `to_json` made."""
    return b"[%s]" % b",".join(events)
