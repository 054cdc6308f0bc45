"""The routes file: YAML in, frozen values out, and an error that names file, route and field.

    routes:
      - name: temperatures                 # default: the filter
        filter: plant/+/temperature        # wildcards and $share/GROUP/FILTER too
        sink: function                     # or http://host:port/path
        qos: 1                             # 0 or 1
        type: io.example.temperature       # templates: see templates.py
        source: mqtt://plant/{level[1]}
        subject: "{topic}"
        datacontenttype: application/json  # of payloads that do not say
        delivery: {retry: 5, backoffPolicy: exponential, backoffDelay: PT0.2S, timeout: PT30S}
        onFailure: quarantine              # or block, or drop

Unknown keys are errors: a misspelt `onFailure` must not lose an event. Knows nothing of brokers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args
from urllib.parse import urlsplit

import yaml

from weir.adaptor.events import is_media_type
from weir.adaptor.retry import Delivery, parse_duration
from weir.adaptor.templates import Template
from weir.adaptor.topics import TopicFilter

T = TypeVar("T")

OnFailure = Literal["quarantine", "block", "drop"]
FUNCTION = "function"
"""The sink that is no URL: the caller of the adaptor says where it is."""

_ROUTE_KEYS = (
    *("name", "filter", "sink", "qos", "type", "source", "subject", "datacontenttype"),
    *("delivery", "onFailure"),
)
_DELIVERY_KEYS = ("retry", "backoffPolicy", "backoffDelay", "timeout")
_LATER = {
    "deadLetter": "dead letter sinks are not supported yet",
    "deadLetterSink": "dead letter sinks are not supported yet",
    "ordered": "order per topic is not supported yet",
    "retryAfterMax": "Retry-After is obeyed up to five minutes and can't be set yet",
}
DEFAULT_TYPE = "weir.mqtt.message"
DEFAULT_SOURCE = "mqtt://{broker}"
DEFAULT_SUBJECT = "{topic}"


class RoutesError(ValueError):
    """The routes can't be used; str() names the file, the route, the field and the way out."""


@dataclass(frozen=True, slots=True)
class Route:
    name: str
    filter: TopicFilter
    sink: str
    type: Template
    source: Template
    subject: Template
    qos: int = 1
    datacontenttype: str | None = None
    delivery: Delivery = field(default_factory=Delivery)
    on_failure: OnFailure = "quarantine"


def load(path: Path) -> tuple[Route, ...]:
    """The routes of a file, in its order. Raises RoutesError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RoutesError(f"{path}: can't be read: {error}") from error
    return parse(text, str(path))


def parse(text: str, file: str = "routes") -> tuple[Route, ...]:
    """`file`: what errors call it. Raises RoutesError."""
    try:
        document = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RoutesError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(document, dict) or set(document) != {"routes"}:
        raise RoutesError(f"{file}: must hold one key, `routes`, with a list of routes")
    entries = document["routes"]
    if not isinstance(entries, list) or not entries:
        raise RoutesError(f"{file}: `routes` must be a list with at least one route")
    routes = tuple(_route(file, number, entry) for number, entry in enumerate(entries, 1))
    _check_names(file, routes)
    return routes


def _check_names(file: str, routes: tuple[Route, ...]) -> None:
    seen: set[str] = set()
    for number, route in enumerate(routes, 1):
        if route.name in seen:
            raise RoutesError(
                f"{file}: route {number}: the name `{route.name}` is taken; names default to the "
                "filter and must differ, so give each route a `name`"
            )
        seen.add(route.name)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML's own rule is silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in which file we are, for errors."""

    file: str
    route: str
    values: Mapping[str, object]
    prefix: str = ""

    def wrong(self, field: str, problem: object) -> NoReturn:
        raise RoutesError(
            f"{self.file}: route {self.route}: field `{self.prefix}{field}`: {problem}"
        )

    def check_keys(self, known: tuple[str, ...]) -> None:
        for key in self.values:
            if key in _LATER:
                self.wrong(key, f"{_LATER[key]}; remove it")
            if key not in known:
                self.wrong(str(key), f"unknown; the known fields are {', '.join(known)}")

    def text(self, field: str, default: str | None = None) -> str:
        value = self.values.get(field, default)
        if value is None:
            self.wrong(field, "is missing; every route needs it")
        if not isinstance(value, str) or not value:
            self.wrong(field, f"must be a text, not {value!r}; quote it")
        return value

    def parsed(self, field: str, parse: Callable[[str], T], default: str | None = None) -> T:
        text = self.text(field, default)
        try:
            return parse(text)
        except ValueError as error:
            self.wrong(field, error)

    def integer(self, field: str, default: int, lowest: int, highest: int) -> int:
        value = self.values.get(field, default)
        if type(value) is not int or not lowest <= value <= highest:
            self.wrong(field, f"must be a whole number from {lowest} to {highest}, not {value!r}")
        return value

    def one_of(self, field: str, choices: tuple[str, ...], default: str) -> str:
        value = self.values.get(field, default)
        if value not in choices:
            self.wrong(field, f"`{value}` is none of {', '.join(choices)}")
        return str(value)


def _route(file: str, number: int, entry: object) -> Route:
    if not isinstance(entry, dict):
        raise RoutesError(f"{file}: route {number}: must be a mapping with `filter` and `sink`")
    name = entry.get("name", entry.get("filter"))
    place = _Place(file, f"{number} ({name})" if name else str(number), entry)
    place.check_keys(_ROUTE_KEYS)
    topic_filter = place.parsed("filter", TopicFilter.parse)

    def template(text: str) -> Template:
        return Template.parse(text, fewest_levels=topic_filter.fewest_levels)

    return Route(
        name=place.text("name", topic_filter.text),
        filter=topic_filter,
        sink=place.parsed("sink", check_sink),
        type=place.parsed("type", template, DEFAULT_TYPE),
        source=place.parsed("source", template, DEFAULT_SOURCE),
        subject=place.parsed("subject", template, DEFAULT_SUBJECT),
        qos=_qos(place),
        datacontenttype=_datacontenttype(place),
        delivery=_delivery(place),
        on_failure=_on_failure(place),
    )


def _qos(place: _Place) -> int:
    if place.values.get("qos") == 2:
        place.wrong("qos", "2 is not offered: delivery over HTTP is at least once; use 1")
    return place.integer("qos", 1, 0, 1)


def _datacontenttype(place: _Place) -> str | None:
    if "datacontenttype" not in place.values:
        return None
    value = place.text("datacontenttype")
    if not is_media_type(value):
        place.wrong("datacontenttype", f"`{value}` is not a media type like application/json")
    return value


def _on_failure(place: _Place) -> OnFailure:
    if place.values.get("onFailure") == "deadLetter":
        place.wrong("onFailure", "dead letter sinks are not supported yet; use quarantine")
    choice = place.one_of("onFailure", get_args(OnFailure), "quarantine")
    return "block" if choice == "block" else "drop" if choice == "drop" else "quarantine"


def _delivery(place: _Place) -> Delivery:
    values = place.values.get("delivery", {})
    if not isinstance(values, dict):
        place.wrong("delivery", f"must be a mapping of {', '.join(_DELIVERY_KEYS)}")
    inner = _Place(place.file, place.route, values, "delivery.")
    inner.check_keys(_DELIVERY_KEYS)
    policy = inner.one_of("backoffPolicy", ("linear", "exponential"), "exponential")
    timeout = inner.parsed("timeout", parse_duration, "PT30S")
    if timeout <= 0:
        inner.wrong("timeout", "must be longer than nothing, for example PT30S")
    return Delivery(
        retry=inner.integer("retry", Delivery().retry, 0, 1_000_000),
        policy="linear" if policy == "linear" else "exponential",
        delay=inner.parsed("backoffDelay", parse_duration, "PT0.2S"),
        timeout=timeout,
    )


def check_sink(text: str) -> str:
    """The sink unchanged, if it is `function` or an http URL that we can call; else ValueError."""
    if text == FUNCTION:
        return text
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("a URL has no spaces or special characters; percent-encode them")
    parts = urlsplit(text)
    if parts.scheme == "https":
        raise ValueError("https sinks are not supported yet; use an http URL")
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"`{text}` is neither `{FUNCTION}` nor a URL like http://host:8080/path")
    if parts.username is not None or parts.fragment:
        raise ValueError("a sink URL has no user, password or fragment; remove them")
    if parts.port == 0:
        raise ValueError("port 0 is no port; name the one that the sink listens on")
    return text
