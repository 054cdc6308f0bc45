"""Brokers, sinks and dead letter sinks as a routes file describes them: the ends of a route.

Knows nothing of what goes between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from weir.adaptor.address import Broker
from weir.adaptor.document import Place
from weir.adaptor.templates import Template
from weir.adaptor.topics import TopicFilter
from weir.proxy.contract import DATA_PORT
from weir.proxy.policy.balance import Revision

FUNCTION = "function"
"""The sink that is no URL: the caller of the adaptor says where it is."""

_BROKER_KEYS = (
    *("url", "caFile", "certFile", "keyFile", "serverName", "alpn"),
    *("usernameFile", "passwordFile"),
)
_SINK_KEYS = ("uri", "caFile", "tokenFile", "pods", "revisions")
_REVISION_KEYS = ("pods", "weight")


@dataclass(frozen=True, slots=True)
class Access:
    """What an https sink needs: `ca`, PEM, trusted besides the system's; `token`: a file with a
    bearer token, read again when it changes. `pods`: those behind an http sink, where known."""

    ca: Path | None = None
    token: Path | None = None
    pods: tuple[Revision, ...] = ()


@dataclass(frozen=True, slots=True)
class DeadLetterSink:
    """Where events go that their own sink does not take: a URL, or a topic of the broker that they
    came from, of which only one is set."""

    uri: str | None = None
    topic: Template | None = None
    access: Access = field(default_factory=Access)


def parse_brokers(top: Place) -> dict[str, Broker | None]:
    """By name; None for one that is described wrongly, which is noted."""
    inner = top.inner("brokers", "names to URLs, or to {url: ..., caFile: ...}")
    if inner is None:
        return {}
    return {str(name): _broker(inner, str(name)) for name in inner.values}


def _broker(brokers: Place, name: str) -> Broker | None:
    if isinstance(brokers.values.get(name), str):
        return brokers.parsed(name, Broker.parse)
    place = brokers.inner(name, ", ".join(_BROKER_KEYS))
    if place is None:
        return None
    place.check_keys(_BROKER_KEYS)
    alpn = place.values.get("alpn", [])
    if not isinstance(alpn, list) or not all(isinstance(each, str) and each for each in alpn):
        place.wrong("alpn", "must be a list of protocol names, such as [x-amzn-mqtt-ca]")
        return None

    def described(url: str) -> Broker:
        return Broker.parse(
            url,
            place.optional("caFile", Path),
            certificate=place.optional("certFile", Path),
            key=place.optional("keyFile", Path),
            server_name=place.optional("serverName", str),
            alpn=tuple(alpn),
            username_file=place.optional("usernameFile", Path),
            password_file=place.optional("passwordFile", Path),
        )

    return place.parsed("url", described)


def parse_broker_of(place: Place, brokers: Mapping[str, Broker | None]) -> Broker | None:
    name = place.optional("broker", str)
    if name is not None and name not in brokers:
        known = ", ".join(brokers) or "none"
        place.wrong("broker", f"`{name}` is not among `brokers` of this file ({known})")
    return None if name is None else brokers.get(name)


def parse_sink(place: Place, field: str, default: str | None = None) -> tuple[str | None, Access]:
    """A URL, or a mapping of it and what it needs."""
    if not isinstance(place.values.get(field), dict):
        if field not in place.values and default is not None:
            try:
                return check_sink(default), Access()
            except ValueError as error:
                place.wrong(field, f"is missing, and K_SINK of the environment won't do: {error}")
                return None, Access()
        return place.parsed(field, check_sink), Access()
    inner = place.inner(field, ", ".join(_SINK_KEYS))
    assert inner is not None
    inner.check_keys(_SINK_KEYS)
    uri = inner.parsed("uri", check_sink)
    access = Access(
        inner.optional("caFile", Path), inner.optional("tokenFile", Path), _parse_pods(inner)
    )
    if access.pods and uri is not None and not uri.startswith("http://"):
        inner.wrong("uri", "pods are for http sinks: TLS would end in what they are called past")
    if (access.ca or access.token) and uri is not None and not uri.startswith("https://"):
        inner.wrong("uri", "caFile and tokenFile are for https sinks; a token would be readable")
    return uri, access


def _parse_pods(sink: Place) -> tuple[Revision, ...]:
    """`pods: [HOST[:PORT], ...]`, or `revisions: {NAME: {weight: 90, pods: [...]}, ...}`."""
    if "revisions" not in sink.values:
        return (Revision("", _pods(sink)),) if "pods" in sink.values else ()
    if "pods" in sink.values:
        sink.wrong("pods", "stand in each of the `revisions`; remove them here")
    revisions = sink.inner("revisions", "names of revisions to {weight: ..., pods: [...]}")
    found = []
    for name in () if revisions is None else revisions.values:
        assert revisions is not None
        each = revisions.inner(str(name), ", ".join(_REVISION_KEYS))
        if each is not None:
            each.check_keys(_REVISION_KEYS)
            weight = each.number("weight", 0.0, 1_000_000.0)
            found.append(Revision(str(name), _pods(each), 1.0 if weight is None else weight))
    return tuple(found)


def _pods(place: Place) -> tuple[str, ...]:
    value = place.values.get("pods", [])
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        place.wrong("pods", "must be a list of HOST or HOST:PORT, such as [10.0.0.7]")
        return ()
    try:
        return tuple(pod_address(each) for each in value)
    except ValueError as error:
        place.wrong("pods", str(error))
        return ()


def parse_dead_letter(place: Place, topic_filter: TopicFilter | None) -> DeadLetterSink | None:
    value = place.values.get("deadLetterSink")
    if "deadLetterSink" not in place.values:
        return None
    if isinstance(value, dict) and "topic" in value:
        return _dead_letter_topic(place, topic_filter)
    uri, access = parse_sink(place, "deadLetterSink")
    if uri == FUNCTION:
        place.wrong("deadLetterSink", f"`{FUNCTION}` can't be one; write a URL or {{topic: ...}}")
    return None if uri is None else DeadLetterSink(uri, access=access)


def _dead_letter_topic(place: Place, topic_filter: TopicFilter | None) -> DeadLetterSink | None:
    inner = place.inner("deadLetterSink", "topic")
    assert inner is not None
    inner.check_keys(("topic",))
    levels = 1_000 if topic_filter is None else topic_filter.fewest_levels
    template = inner.parsed("topic", lambda text: Template.parse(text, fewest_levels=levels))
    if template is None:
        return None
    plain = "".join(part for part in template.parts if isinstance(part, str))
    if template.dynamic or any(each in plain for each in "+#\0") or plain.startswith("$"):
        inner.wrong(
            "topic",
            "must be a topic to publish to, without wildcards, made of text and of what the "
            "message's topic tells",
        )
        return None
    whole = len(template.parts) == 1 and isinstance(template.parts[0], str)
    if topic_filter is not None and whole and topic_filter.matches(template.text):
        inner.wrong("topic", "is taken by the route's own filter: its letters would go in a circle")
        return None
    return DeadLetterSink(topic=template)


def check_sink(text: str) -> str:
    """The sink unchanged, if it is `function` or a URL that we can call; else ValueError."""
    if text == FUNCTION:
        return text
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("a URL has no spaces or special characters; percent-encode them")
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"`{text}` is neither `{FUNCTION}` nor a URL like http://host:8080/path")
    if parts.username is not None or parts.fragment:
        raise ValueError("a sink URL has no user, password or fragment; remove them")
    if parts.port == 0:
        raise ValueError("port 0 is no port; name the one that the sink listens on")
    return text


def pod_address(text: str) -> str:
    """`host:port` of a pod, given with or without its port. Raises ValueError."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.netloc != text or parts.username is not None:
        raise ValueError(f"`{text}` is not the address of a pod; write HOST or HOST:PORT")
    if parts.port == 0:
        raise ValueError(f"`{text}`: port 0 is no port")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{parts.port or DATA_PORT}"
