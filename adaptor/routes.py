"""The routes file: YAML in, frozen values out, and an error that names file, line, route and field.

    version: 1                             # of this format; 1 unless told otherwise
    brokers: {plant: mqtts://host}         # besides the one of the command line
    routes:
      - name: temperatures                 # default: the filter
        broker: plant
        filter: plant/+/temperature        # wildcards and $share/GROUP/FILTER too
        sink: function                     # or a URL, or {uri: ..., caFile: ..., tokenFile: ...}
        qos: 1                             # 0 or 1; 2 with a spool
        retained: new                      # or always, or never
        type: io.example.temperature       # templates: see templates.py
        source: mqtt://plant/{level[1]}
        subject: "{topic}"
        id: "{json[/readingId]}"
        time: "{json[/at]}"
        extensions: {unit: "{json[/unit]|celsius}"}
        datacontenttype: application/json  # of payloads that do not say
        delivery: {retry: 5, backoffPolicy: exponential, backoffDelay: PT0.2S, timeout: PT30S}
        concurrency: 8                     # events of this route at a time
        rate: 100                          # and per second
        onFailure: deadLetter              # or quarantine, block, drop
        deadLetterSink: http://host:port/  # like `sink`, or {topic: dead/{topic}}
        spool: always                      # and ordered: see keeping.py
        mode: structured                   # and batch, reply, dialect: see sending.py

Unknown keys are errors: a misspelt `onFailure` must not lose an event. Connects to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast, get_args

from weir.adaptor.address import Broker
from weir.adaptor.document import Document, DocumentError, Place
from weir.adaptor.endpoints import (
    Access,
    DeadLetterSink,
    parse_broker_of,
    parse_brokers,
    parse_dead_letter,
    parse_sink,
)
from weir.adaptor.events import REQUIRED, is_attribute_name, is_media_type, names_a_format
from weir.adaptor.keeping import FIELDS as KEEPING_FIELDS
from weir.adaptor.keeping import Keeping, parse_keeping
from weir.adaptor.retry import Delivery, parse_duration
from weir.adaptor.sending import FIELDS as SENDING_FIELDS
from weir.adaptor.sending import Sending, parse_sending
from weir.adaptor.templates import Template
from weir.adaptor.topics import TopicFilter

VERSION = 1
"""Of the format of the file."""

OnFailure = Literal["deadLetter", "quarantine", "block", "drop"]
Retained = Literal["new", "always", "never"]
MOST_CONCURRENT = 64
"""Requests at a time of one route; a sink has no more connections than that."""

_DOCUMENT_KEYS = ("version", "brokers", "routes")
_ROUTE_KEYS = (
    *(
        "name",
        "broker",
        "filter",
        "sink",
        "qos",
        "retained",
        "type",
        "source",
        "subject",
        "id",
        "time",
    ),
    *("extensions", "datacontenttype", "delivery", "concurrency", "rate"),
    *("onFailure", "deadLetterSink", *KEEPING_FIELDS, *SENDING_FIELDS),
)
_DELIVERY_KEYS = ("retry", "backoffPolicy", "backoffDelay", "timeout", "retryAfterMax")
_OWN_FIELD = {
    **{name: f"set it by the route's field `{name}`" for name in ("id", "source", "type", "time")},
    **{name: f"set it by the route's field `{name}`" for name in ("subject", "datacontenttype")},
    "specversion": "it is always 1.0",
    "data": "it is no extension; the payload is the data",
    "mqtttopic": "it says how the message came",
    "mqttqos": "it says how the message came",
    "mqttretain": "it says how the message came",
    "mqttdup": "it says how the message came",
}
LONGEST_NAME = 20
"""Characters of an extension's name, as the CloudEvents specification recommends."""

DEFAULT_TYPE = "weir.mqtt.message"
DEFAULT_SOURCE = "mqtt://{broker}"
DEFAULT_SUBJECT = "{topic}"


class RoutesError(ValueError):
    """The routes can't be used; str() names the file, the line, the field and the way out."""


@dataclass(frozen=True, slots=True)
class Route:
    name: str
    filter: TopicFilter
    sink: str
    type: Template
    source: Template
    subject: Template
    qos: int = 1
    retained: Retained = "new"
    id: Template | None = None
    time: Template | None = None
    extensions: Mapping[str, Template] = field(default_factory=lambda: MappingProxyType({}))
    datacontenttype: str | None = None
    delivery: Delivery = field(default_factory=Delivery)
    concurrency: int | None = None
    rate: float | None = None
    on_failure: OnFailure = "quarantine"
    dead_letter: DeadLetterSink | None = None
    access: Access = field(default_factory=Access)
    sending: Sending = field(default_factory=Sending)
    keeping: Keeping = field(default_factory=Keeping)
    broker: Broker | None = None
    """None: the one that the adaptor was started with."""


def load(path: Path, default_sink: str | None = None) -> tuple[Route, ...]:
    """The routes of a file, in its order. `default_sink`: of routes that name none (K_SINK).
    Raises RoutesError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RoutesError(f"{path}: can't be read: {error}") from error
    return parse(text, str(path), default_sink)


def parse(text: str, file: str = "routes", default_sink: str | None = None) -> tuple[Route, ...]:
    """`file`: what errors call it. Raises RoutesError that has a line for everything wrong."""
    try:
        document = Document.parse(text, file)
        routes = _routes(document, default_sink)
        document.check()
    except DocumentError as error:
        raise RoutesError(str(error)) from error
    return routes


def _routes(document: Document, default_sink: str | None) -> tuple[Route, ...]:
    value = document.value
    if not isinstance(value, dict) or "routes" not in value:
        document.wrong((), "the file must hold one key, `routes`, with a list of routes")
        return ()
    top = Place(document, (), "the file", value)
    top.check_keys(_DOCUMENT_KEYS)
    if value.get("version", VERSION) != VERSION:
        top.wrong("version", f"{value['version']!r} is not known here; this Weir reads {VERSION}")
    entries = value["routes"]
    if not isinstance(entries, list) or not entries:
        top.wrong("routes", "must be a list with at least one route")
        return ()
    brokers = parse_brokers(top)
    found = [
        _route(document, index, entry, default_sink, brokers) for index, entry in enumerate(entries)
    ]
    _check_names(document, entries)
    _check_retained(document, found)
    _check_access(document, found)
    return tuple(route for route in found if route is not None)


def _check_names(document: Document, entries: list[object]) -> None:
    seen: set[object] = set()
    for index, entry in enumerate(entries):
        name = entry.get("name", entry.get("filter")) if isinstance(entry, dict) else None
        if isinstance(name, str) and name in seen:
            document.wrong(
                ("routes", index, "name"),
                f"route {index + 1}: the name `{name}` is taken; names default to the filter and "
                "must differ, so give each route a `name`",
            )
        if isinstance(name, str):
            seen.add(name)


def _check_retained(document: Document, routes: list[Route | None]) -> None:
    """One filter of one sink is one subscription, and so has one way with retained messages."""
    seen: dict[tuple[Broker | None, str, str], str] = {}
    for index, route in enumerate(routes):
        if route is None:
            continue
        first = seen.setdefault((route.broker, route.sink, route.filter.text), route.retained)
        if first != route.retained:
            document.wrong(
                ("routes", index, "retained"),
                f"route {index + 1} ({route.name}): field `retained`: another route with this "
                f"filter and sink says `{first}`; they share a subscription, so say the same",
            )


def _check_access(document: Document, routes: list[Route | None]) -> None:
    """A sink has one client, so its routes must agree on how it is reached."""
    seen: dict[str, Access] = {}
    for index, route in enumerate(routes):
        if route is None:
            continue
        reached = [("sink", route.sink, route.access)]
        if route.dead_letter is not None and route.dead_letter.uri is not None:
            reached.append(("deadLetterSink", route.dead_letter.uri, route.dead_letter.access))
        for name, uri, access in reached:
            if seen.setdefault(uri, access) != access:
                document.wrong(
                    ("routes", index, name),
                    f"route {index + 1} ({route.name}): field `{name}`: another route reaches "
                    f"{uri} with another caFile, tokenFile or pods; say the same in both",
                )


def _route(
    document: Document,
    index: int,
    entry: object,
    default_sink: str | None,
    brokers: Mapping[str, Broker | None],
) -> Route | None:
    path = ("routes", index)
    if not isinstance(entry, dict):
        document.wrong(path, f"route {index + 1}: must be a mapping with `filter` and `sink`")
        return None
    name = entry.get("name", entry.get("filter"))
    place = Place(document, path, f"route {index + 1}" + (f" ({name})" if name else ""), entry)
    place.check_keys(_ROUTE_KEYS)
    before = len(document.problems)
    topic_filter = place.parsed("filter", TopicFilter.parse)
    levels = 1_000 if topic_filter is None else topic_filter.fewest_levels  # one complaint suffices

    def template(text: str) -> Template:
        return Template.parse(text, fewest_levels=levels)

    def needed(text: str) -> Template:
        return Template.parse(text, fewest_levels=levels, always=True)

    sink, access = parse_sink(place, "sink", default_sink)
    dead_letter = parse_dead_letter(place, topic_filter)
    values = {
        "name": place.text("name", str(entry.get("filter", "?"))),
        "broker": parse_broker_of(place, brokers),
        "sink": sink,
        "access": access,
        "type": place.parsed("type", needed, DEFAULT_TYPE),
        "source": place.parsed("source", needed, DEFAULT_SOURCE),
        "subject": place.parsed("subject", template, DEFAULT_SUBJECT),
        "qos": _qos(place),
        "retained": cast(Retained, place.one_of("retained", get_args(Retained), "new")),
        "id": place.optional("id", template),
        "time": place.optional("time", template),
        "extensions": _extensions(place, levels),
        "datacontenttype": place.optional("datacontenttype", _media_type),
        "delivery": _delivery(place),
        "concurrency": _concurrency(place),
        "rate": place.number("rate", 0.001, 1_000_000.0),
        "on_failure": _on_failure(place, dead_letter),
        "dead_letter": dead_letter,
        "sending": parse_sending(place, topic_filter),
        "keeping": parse_keeping(place, levels),
    }
    if topic_filter is None or len(document.problems) > before:
        return None
    return Route(filter=topic_filter, **values)  # type: ignore[arg-type]


def _qos(place: Place) -> int:
    if place.values.get("qos") == 2 and "spool" not in place.values:
        place.wrong("qos", "2 needs `spool: always`, or a message could be lost; or use 1")
        return 1
    return place.integer("qos", 1, 0, 2)


def _concurrency(place: Place) -> int | None:
    if "concurrency" not in place.values:
        return None
    return place.integer("concurrency", 1, 1, MOST_CONCURRENT)


def _media_type(value: str) -> str:
    if not is_media_type(value):
        raise ValueError(f"`{value}` is not a media type like application/json")
    if names_a_format(value):
        raise ValueError(f"`{value}` is for messages that say so themselves; leave it out")
    return value


def _extensions(place: Place, levels: int) -> Mapping[str, Template]:
    inner = place.inner("extensions", "extension names to templates")
    if inner is None:
        return {}
    found = {}
    for name in inner.values:
        if not isinstance(name, str) or not is_attribute_name(name) or len(name) > LONGEST_NAME:
            inner.wrong(
                str(name),
                f"is no name of an extension; use up to {LONGEST_NAME} lower-case letters, digits",
            )
        elif name in _OWN_FIELD or name in REQUIRED:
            inner.wrong(name, f"is not yours to set here: {_OWN_FIELD[name]}")
        else:
            template = inner.parsed(name, lambda text: Template.parse(text, fewest_levels=levels))
            if template is not None:
                found[name] = template
    return MappingProxyType(found)


def _on_failure(place: Place, dead_letter: DeadLetterSink | None) -> OnFailure:
    default = "quarantine" if dead_letter is None else "deadLetter"
    choice = cast(OnFailure, place.one_of("onFailure", get_args(OnFailure), default))
    if choice == "deadLetter" and "deadLetterSink" not in place.values:
        place.wrong("onFailure", "deadLetter needs a `deadLetterSink`; write its URL there")
    elif choice != "deadLetter" and "deadLetterSink" in place.values:
        place.wrong("onFailure", f"is `{choice}`, so the deadLetterSink gets nothing; remove one")
    return choice


def _delivery(place: Place) -> Delivery:
    inner = place.inner("delivery", ", ".join(_DELIVERY_KEYS))
    if inner is None:
        return Delivery()
    inner.check_keys(_DELIVERY_KEYS)
    policy = inner.one_of("backoffPolicy", ("linear", "exponential"), "exponential")
    timeout = inner.parsed("timeout", parse_duration, "PT30S")
    if timeout is not None and timeout <= 0:
        inner.wrong("timeout", "must be longer than nothing, for example PT30S")
    return Delivery(
        retry=inner.integer("retry", Delivery().retry, 0, 1_000_000),
        policy="linear" if policy == "linear" else "exponential",
        delay=inner.parsed("backoffDelay", parse_duration, "PT0.2S") or 0.0,
        timeout=timeout or Delivery().timeout,
        retry_after_max=_retry_after_max(inner),
    )


def _retry_after_max(delivery: Place) -> float:
    longest = delivery.optional("retryAfterMax", parse_duration)
    return Delivery().retry_after_max if longest is None else longest
