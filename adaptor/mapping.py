"""From an MQTT message to the CloudEvent of a route.

Two kinds of messages come in. Those that already are CloudEvents (see mqttbinding) keep their
identity. Plain messages become events by the route's templates. Both get the extensions that say
how the message came (mqtttopic, mqttqos, mqttretain, mqttdup).

Messages are `mqtt5.PublishPacket`s for both protocol versions; a 3.1.1 message merely lacks
properties. Pure: ids and times are given from outside.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from mqtt5 import PublishPacket

from weir.adaptor.events import (
    OPAQUE,
    Event,
    MalformedEvent,
    encode_value,
    http_headers,
    is_media_type,
    is_timestamp,
    shown,
)
from weir.adaptor.httpbinding import BATCH_LINE, STRUCTURED_LINE, encoded
from weir.adaptor.jsonformat import completed, to_json
from weir.adaptor.mqttbinding import TELLING, maybe_structured, published
from weir.adaptor.routes import Route
from weir.adaptor.templates import Content, Template

PREFER_REPLY = b"Prefer: reply\r\n"
TEXT = "text/plain;charset=utf-8"

PASSED_ON = frozenset(
    [
        *("traceparent", "tracestate", "partitionkey", "sequence", "sequencetype"),
        *("correlationid", "causationid", "dataschema"),
    ]
)
"""User properties of a plain message that have a meaning of their own in CloudEvents."""

_TELLING = PASSED_ON | TELLING | {"time"}
"""User properties that say more about the event than its id."""

REMEMBERED = 10_000
"""Rendered heads kept per route; publishers that mint topics must not grow us without end."""

LONGEST_REMEMBERED = 4096
"""Bytes of a head that is kept: a topic has up to 64 KiB, and stands in it several times."""


def minted_ids() -> Callable[[], str]:
    """A source of ids: UUIDs whose first 80 bits are random per process and whose last 48 count.

    As unique as random ones and several times cheaper; never derived from the payload, because
    two equal readings are two events.
    """
    seed = uuid.uuid4()
    head = str(seed)[:24]
    counter = itertools.count(int(str(seed)[24:], 16) >> 1)
    return lambda: f"{head}{next(counter):012x}"


class Clock:
    """RFC 3339 in UTC with microseconds; renders each second once."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def text(self, seconds: float) -> str:
        """`seconds` since the epoch."""
        whole = int(seconds)
        if whole != self._second:
            self._second = whole
            self._text = datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._text}.{int((seconds - whole) * 1e6):06d}Z"


def publisher_id(user_properties: list[tuple[str, str]]) -> str | None:
    """The id that the publisher gave: the user property `id`; of several, the last."""
    for name, value in reversed(user_properties):
        if name == "id" and value:
            return value
    return None


class Mapper:
    """One route's events. Renders what depends on the topic alone only once per topic."""

    def __init__(
        self, route: Route, broker: str, overrides: Mapping[str, str] | None = None
    ) -> None:
        """`broker`: host:port, for templates. `overrides`: extensions that every event must have,
        whatever it says itself."""
        self.route = route
        self._sniff = route.sending.sniff
        self._overrides = overrides or {}
        self._broker = broker
        self._clock = Clock()
        templates = (route.type, route.source, route.subject, *route.extensions.values())
        self._every_time = (
            any(each.dynamic for each in templates)
            or route.id is not None
            or route.time is not None
        )
        """Whether no two events share their attributes, so that nothing can be kept."""
        self._rendered: dict[tuple[str, str | None, int], bytes] = {}

    @property
    def sniff(self) -> bool:
        """Look for structured mode in payloads without a Content Type, as a 3.1.1 receiver must,
        and as a route may want it."""
        return self._sniff

    @sniff.setter
    def sniff(self, value: bool) -> None:
        self._sniff = value or self.route.sending.sniff

    def encode(self, message: PublishPacket, event_id: str, received: float) -> tuple[bytes, bytes]:
        """The event as HTTP header lines and body; the same as `event()` says, only faster.

        Raises MalformedEvent.
        """
        lines, body = self._encode(message, event_id, received)
        reply = self.route.sending.reply
        if reply is not None and reply.welcome(message.response_topic):
            lines = PREFER_REPLY + lines
        return lines, body

    def _encode(
        self, message: PublishPacket, event_id: str, received: float
    ) -> tuple[bytes, bytes]:
        content_type = message.content_type
        properties = message.user_properties
        if (
            self._every_time
            or message.retain
            or message.duplicate
            or message.payload_format_indicator
            or message.message_expiry_interval is not None
            or (properties and any(name in _TELLING for name, _ in properties))
            or maybe_structured(message, sniff=self._sniff)
        ):
            return encoded(self.event(message, event_id, received), self.route.sending.mode)
        key = (message.topic, content_type, message.qos.value)
        rendered = self._rendered.get(key) or self._render(key, message)
        mode = self.route.sending.mode
        if mode != "binary":
            late = {"id": event_id, "time": self._clock.text(received)}
            body = completed(rendered, late, self._content_type(message), message.payload)
            return (STRUCTURED_LINE, body) if mode == "structured" else (BATCH_LINE, b"[%s]" % body)
        if properties:
            event_id = encode_value(event_id)  # the publisher's; minted ones need no encoding
        stamp = f"ce-id: {event_id}\r\nce-time: {self._clock.text(received)}\r\n"
        return rendered + stamp.encode("ascii"), message.payload

    def encode_plain(
        self, message: PublishPacket, event_id: str, received: float
    ) -> tuple[bytes, bytes]:
        """As `encode`, of the event that `plain()` makes; never raises."""
        return encoded(self.plain(message, event_id, received), self.route.sending.mode)

    def _render(self, key: tuple[str, str | None, int], message: PublishPacket) -> bytes:
        """What is the same for all messages of this key: header lines, or the event as JSON but for
        its id, time and data."""
        attributes = self._fixed(message, None) | _arrival(message)
        without_data = Event(attributes, b"", self._content_type(message))
        binary = self.route.sending.mode == "binary"
        lines = http_headers(without_data) if binary else to_json(without_data)
        if len(lines) + len(message.content_type or "") <= LONGEST_REMEMBERED:
            if len(self._rendered) >= REMEMBERED:
                self._rendered.clear()
            self._rendered[key] = lines
        return lines

    def event(self, message: PublishPacket, event_id: str, received: float) -> Event:
        """`event_id`: for a plain message. `received`: seconds since the epoch.

        Raises MalformedEvent when the message claims to be a CloudEvent and is none.
        """
        try:
            given = published(message, sniff=self._sniff)
        except MalformedEvent as error:
            raise MalformedEvent(f"on the topic `{shown(message.topic)}`: {error}") from error
        if given is None:
            return self.plain(message, event_id, received)
        attributes = dict(given.attributes)
        content = Content(message.user_properties, message.payload)
        for name, value in (_arrival(message) | self._extensions(message, content)).items():
            attributes.setdefault(name, value)
        attributes.update(self._overrides)
        return Event(attributes, given.data, given.content_type)

    def plain(self, message: PublishPacket, event_id: str, received: float) -> Event:
        """The message by the route's rules, whatever it claims to be."""
        properties = dict(message.user_properties)
        content = Content(message.user_properties, message.payload)
        attributes = self._fixed(message, content) | _arrival(message)
        attributes["id"] = self._templated(self.route.id, message, content) or event_id
        now = self._clock.text(received)
        given = self._templated(self.route.time, message, content) or properties.get("time")
        if given is not None and is_timestamp(given):
            attributes["time"] = given
            attributes["recordedtime"] = now
        else:
            attributes["time"] = now
        if message.message_expiry_interval is not None:
            attributes["expirytime"] = self._clock.text(received + message.message_expiry_interval)
        for name in PASSED_ON & properties.keys():
            if properties[name]:
                attributes.setdefault(name, properties[name])
        return Event(attributes, message.payload, self._content_type(message))

    def _fixed(self, message: PublishPacket, content: Content | None) -> dict[str, str]:
        """What does not depend on the moment. `content` is None where the topic tells all."""
        route, topic, broker = self.route, message.topic, self._broker
        attributes = {
            "specversion": "1.0",
            # a level may be empty, a type or source may not
            "type": route.type.render(topic, broker, content) or "-",
            "source": route.source.render(topic, broker, content, uri=True) or "-",
        }
        subject = route.subject.render(topic, broker, content)
        if subject:
            attributes["subject"] = subject
        return attributes | self._extensions(message, content) | dict(self._overrides)

    def _extensions(self, message: PublishPacket, content: Content | None) -> dict[str, str]:
        """Those of the route; what a message has no value for is left out."""
        if not self.route.extensions:
            return {}
        rendered = (
            (name, template.render(message.topic, self._broker, content))
            for name, template in self.route.extensions.items()
        )
        return {name: value for name, value in rendered if value}

    def _templated(
        self, template: Template | None, message: PublishPacket, content: Content
    ) -> str | None:
        return None if template is None else template.render(message.topic, self._broker, content)

    def _content_type(self, message: PublishPacket) -> str:
        declared = message.content_type
        if declared and is_media_type(declared):
            return declared
        if self.route.datacontenttype is not None:
            return self.route.datacontenttype
        return TEXT if message.payload_format_indicator == 1 else OPAQUE


def _arrival(message: PublishPacket) -> dict[str, str]:
    return {
        "mqtttopic": message.topic,
        "mqttqos": str(message.qos.value),
        "mqttretain": "true" if message.retain else "false",
        "mqttdup": "true" if message.duplicate else "false",
    }
