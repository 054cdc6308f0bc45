"""The MQTT binding of CloudEvents: events that messages already are, and messages of events.

Two dialects of binary mode are in use. `spec`: every attribute is a user property of its own name,
datacontenttype is MQTT's Content Type. `sdk-go` (and what is built on it, Knative's prototype among
them): the names begin with `ce-`, and the content type may stand in a user property named like the
HTTP header. Both are read, always; which one is written is said. Of a property that repeats, the
last one wins. MQTT 3.1.1 has no properties, and so structured mode only.

Messages are `mqtt5.PublishPacket`s for both versions. Knows nothing of routes or sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mqtt5 import PublishPacket

from weir.adaptor.events import (
    REQUIRED,
    Event,
    MalformedEvent,
    check,
    is_attribute_name,
    is_media_type,
    names_a_format,
    shown,
)
from weir.adaptor.jsonformat import STRUCTURED, from_json, to_json

Dialect = Literal["spec", "sdk-go"]

PREFIX = "ce-"
CONTENT_TYPE = "Content-Type"
LONGEST_STRING = 65_535
"""Bytes of any text in MQTT."""


class Uncarried(ValueError):
    """MQTT has no way to carry the event; str() names the attribute and says why."""


# --- in -----------------------------------------------------------------------------------------


TELLING = frozenset(["specversion", f"{PREFIX}specversion", CONTENT_TYPE, CONTENT_TYPE.lower()])
"""User properties without which a message is an event by its Content Type or its looks alone."""


def maybe_structured(message: PublishPacket, *, sniff: bool) -> bool:
    """Cheap, and never wrongly no, of a message without TELLING properties. `sniff`: structured
    mode without a Content Type is looked for, as a 3.1.1 receiver must."""
    if message.content_type:
        return names_a_format(message.content_type)
    return sniff and _looks_structured(message.payload)


def published(message: PublishPacket, *, sniff: bool) -> Event | None:
    """The event that the message already is, by the receiver's rule of the binding; None if it is
    none. Raises MalformedEvent when it claims to be one and is not."""
    properties = message.user_properties
    declared = message.content_type or _named_content_type(properties)
    if names_a_format(declared):
        essence = declared.partition(";")[0].strip().lower()
        if essence in (STRUCTURED, STRUCTURED.removesuffix("+json")):
            return from_json(message.payload)
        return None  # a format we don't know is forwarded as it is, by the route's rules
    attributes = _attributes(properties)
    if all(attributes.get(name) for name in REQUIRED):
        check(attributes)
        also = attributes.pop("datacontenttype", "")
        content_type = next((each for each in (declared, also) if is_media_type(each)), None)
        return Event(attributes, message.payload, content_type)
    if sniff and not declared and _looks_structured(message.payload):
        try:
            return from_json(message.payload)
        except MalformedEvent:
            return None  # nothing but its looks said that it was one
    return None


def _named_content_type(pairs: Sequence[tuple[str, str]]) -> str:
    """Where older sdk-go put it; it means nothing but in an event."""
    of_event = any(name == f"{PREFIX}specversion" for name, _ in pairs)
    for name, value in reversed(pairs):
        if name in (CONTENT_TYPE, CONTENT_TYPE.lower()) and (of_event or names_a_format(value)):
            return value
    return ""


def _attributes(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Those in user properties; what is no attribute's name is left out."""
    attributes: dict[str, str] = {}
    prefixed = any(name == f"{PREFIX}specversion" for name, _ in pairs)
    for name, value in pairs:
        if prefixed:
            if not name.startswith(PREFIX):
                continue
            name = name[len(PREFIX) :]
        if is_attribute_name(name):
            attributes[name] = value
    return attributes


def _looks_structured(payload: bytes) -> bool:
    return payload[:16].lstrip()[:1] == b"{" and b'"specversion"' in payload


# --- out ----------------------------------------------------------------------------------------


def properties(event: Event, dialect: Dialect) -> tuple[str | None, list[tuple[str, str]], bytes]:
    """Content Type, user properties and payload of a message in binary mode; in structured mode
    for data that is itself an event in some format, whose type would be taken for the message's.
    Raises Uncarried."""
    if names_a_format(event.content_type):
        return STRUCTURED, [], to_json(event)
    prefix = "" if dialect == "spec" else PREFIX
    pairs = [(prefix + name, value) for name, value in event.attributes.items()]
    if dialect == "sdk-go" and event.content_type is not None:
        pairs.append((CONTENT_TYPE, event.content_type))
    for name, value in pairs:
        _carried(name, value)
    if event.content_type is not None:
        _carried("datacontenttype", event.content_type)
    return event.content_type, pairs, event.data


def _carried(name: str, value: str) -> None:
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise Uncarried(
            f"the attribute `{shown(name)}` is no text: half a surrogate pair"
        ) from None
    if size > LONGEST_STRING or len(name) > LONGEST_STRING:
        raise Uncarried(
            f"the attribute `{shown(name)}` has {size} bytes; a user property has at most "
            f"{LONGEST_STRING}"
        )
    if "\0" in value:
        raise Uncarried(f"the attribute `{shown(name)}` has a null character, which MQTT forbids")
