"""Which messages are events, how events look to the sink, and where its replies go, by the file.

    mode: batch                            # or binary, the default, or structured
    batch: {events: 100, bytes: 262144, age: PT0.05S}
    reply: true                            # to the response topic of each message that has one
    reply: {topic: done/{topic}, allow: replies/#}
    dialect: sdk-go                        # of what the route publishes; or spec
    sniff: true                            # payloads without a Content Type may be events, too

Values and their checks; knows nothing of what is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, get_args

from weir.adaptor.document import Place
from weir.adaptor.httpbinding import Mode
from weir.adaptor.mqttbinding import Dialect
from weir.adaptor.retry import parse_duration
from weir.adaptor.templates import Template
from weir.adaptor.topics import TopicFilter

FIELDS = ("mode", "batch", "reply", "dialect", "sniff")
"""Of a route, which are read here."""

_BATCH_KEYS = ("events", "bytes", "age")
_REPLY_KEYS = ("topic", "allow")
MOST_EVENTS = 10_000
LARGEST = 16 << 20
LONGEST_AGE = 60.0


_EVERYTHING = TopicFilter.parse("#")


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch goes out when it has so many `events` or `bytes`, or its first event has waited for
    `age` seconds. One event that is larger goes alone."""

    events: int = 100
    bytes: int = 256 << 10
    age: float = 0.05


@dataclass(frozen=True, slots=True)
class Reply:
    """`topic`: where replies to messages go that name no response topic; None: those are not asked
    for. `allow`: the response topics that messages may name."""

    topic: Template | None = None
    allow: TopicFilter = _EVERYTHING

    def welcome(self, response_topic: str | None) -> bool:
        """Whether the sink is told that a message of this response topic wants a reply."""
        return self.topic is not None or bool(response_topic)


@dataclass(frozen=True, slots=True)
class Sending:
    mode: Mode = "binary"
    batch: Batch | None = None
    """Only in the mode of that name, and then always."""
    reply: Reply | None = None
    dialect: Dialect = "spec"
    sniff: bool = False
    """Publishers of MQTT 3.1.1 can't declare structured mode; a session of MQTT 5 gets what they
    publish, too."""


def parse_sending(route: Place, topic_filter: TopicFilter | None) -> Sending:
    """What is wrong is noted."""
    mode = cast(Mode, route.one_of("mode", get_args(Mode), "binary"))
    batch = _batch(route) if mode == "batch" else None
    if batch is None and "batch" in route.values:
        route.wrong("batch", f"is for `mode: batch`, and the mode is {mode}; change one of them")
    if batch is not None and "concurrency" in route.values:
        route.wrong("concurrency", "would keep batches from filling up; remove it, or the mode")
    reply = _reply(route, topic_filter)
    if reply is not None and batch is not None:
        route.wrong("reply", "a batch has no reply; use another mode, or remove one of them")
    dialect = cast(Dialect, route.one_of("dialect", get_args(Dialect), "spec"))
    return Sending(mode, batch, reply, dialect, route.flag("sniff", False))


def _batch(route: Place) -> Batch:
    inner = route.inner("batch", ", ".join(_BATCH_KEYS))
    if inner is None:
        return Batch()
    inner.check_keys(_BATCH_KEYS)
    age = inner.parsed("age", parse_duration, "PT0.05S")
    if age is not None and age > LONGEST_AGE:
        inner.wrong("age", f"is at most PT{LONGEST_AGE:.0f}S: so long is the first event kept back")
    return Batch(
        inner.integer("events", Batch().events, 1, MOST_EVENTS),
        inner.integer("bytes", Batch().bytes, 1, LARGEST),
        Batch().age if age is None else age,
    )


def _reply(route: Place, topic_filter: TopicFilter | None) -> Reply | None:
    if route.values.get("reply") in (None, False, True):  # also when it is not there
        return Reply() if route.values.get("reply") else None
    inner = route.inner("reply", f"{', '.join(_REPLY_KEYS)}, or true")
    if inner is None:
        return None
    inner.check_keys(_REPLY_KEYS)
    allow = inner.parsed("allow", _allowed, "#")
    topic = None
    if "topic" in inner.values:
        levels = 1_000 if topic_filter is None else topic_filter.fewest_levels
        topic = inner.parsed("topic", lambda text: _reply_topic(text, levels))
    if topic is not None and topic_filter is not None and _is_fixed_in(topic, topic_filter):
        inner.wrong("topic", "is taken by the route's own filter: replies would go in a circle")
    return Reply(topic, allow or Reply().allow)


def _is_fixed_in(topic: Template, topic_filter: TopicFilter) -> bool:
    fixed = all(isinstance(part, str) for part in topic.parts)
    return fixed and topic_filter.matches(topic.text)


def _allowed(text: str) -> TopicFilter:
    found = TopicFilter.parse(text)
    if found.group is not None:
        raise ValueError("is a filter of topics to publish to; leave $share/GROUP/ out")
    return found


def _reply_topic(text: str, levels: int) -> Template:
    template = Template.parse(text, fewest_levels=levels, always=True)
    plain = "".join(part for part in template.parts if isinstance(part, str))
    if any(each in plain for each in "+#\0") or plain.startswith("$"):
        raise ValueError("must be a topic to publish to, without wildcards or a $ at its beginning")
    return template
