"""Templates for the attributes of a route's events: text with pieces of the message in it.

    {topic}             the whole topic
    {level[0]}          its first level, counted like every index in Python; {level[-1]} is the last
    {broker}            the broker's host:port
    {user[name]}        a user property; of several of that name, the last
    {json[/a/0/b]}      a value in the payload, by JSON pointer (RFC 6901)
    {json[/unit]|K}     the same with a default, for messages that lack it; so too {user[name]|x}
    {{ and }}           plain braces

Python's own format syntax cut down to names that exist, so that it can be checked when the routes
are loaded: an index that a matching topic might lack is an error then, never at the first message.
Knows nothing of routes or CloudEvents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_LEVEL = re.compile(r"level\[(-?[0-9]{1,3})\]")
_USER = re.compile(r"user\[([^\]]+)\](?:\|(.*))?", re.DOTALL)
_JSON = re.compile(r"json\[((?:/[^\]]*)?)\](?:\|(.*))?", re.DOTALL)
_INDEX = re.compile(r"0|[1-9][0-9]*")
_URI_SAFE = "/:@!$&'()*+,;=~"
_MISSING = object()
LARGEST_DOCUMENT = 4 << 20
"""Bytes of a payload that is looked into: parsed, JSON takes up to 28 times the room."""


class TemplateError(ValueError):
    """The text is not a template; str() says why and what to do."""


class Content:
    """What templates may look at in one message, beyond its topic."""

    def __init__(self, user_properties: Sequence[tuple[str, str]], payload: bytes) -> None:
        self._user_properties, self._payload = user_properties, payload

    @cached_property
    def user(self) -> dict[str, str]:
        return dict(self._user_properties)

    @cached_property
    def document(self) -> object:
        """The payload as JSON, decoded once."""
        if len(self._payload) > LARGEST_DOCUMENT:
            return _MISSING
        try:
            return json.loads(self._payload)
        except (ValueError, RecursionError):
            return _MISSING


@dataclass(frozen=True, slots=True)
class Level:
    """One level of the topic, by position."""

    index: int

    @property
    def needs(self) -> int:
        """Levels a topic must have for this one to exist."""
        return self.index + 1 if self.index >= 0 else -self.index


@dataclass(frozen=True, slots=True)
class Whole:
    """The value of a name: `topic` or `broker`."""

    name: str


@dataclass(frozen=True, slots=True)
class User:
    """A user property."""

    name: str
    default: str | None

    def value(self, content: Content) -> str | None:
        return content.user.get(self.name) or self.default


@dataclass(frozen=True, slots=True)
class Json:
    """A value in the payload; objects and arrays, which are no text, count as missing."""

    pointer: tuple[str, ...]
    default: str | None

    def value(self, content: Content) -> str | None:
        found = content.document
        for step in self.pointer:
            if isinstance(found, dict):
                found = found.get(step, _MISSING)
            elif isinstance(found, list) and _INDEX.fullmatch(step) and int(step) < len(found):
                found = found[int(step)]
            else:
                return self.default
        if isinstance(found, bool):
            return "true" if found else "false"
        if isinstance(found, str | int | float) and found != "":
            return str(found)
        return self.default


Part = str | Level | Whole | User | Json


@dataclass(frozen=True, slots=True)
class Template:
    text: str
    parts: tuple[Part, ...]
    dynamic: bool = False
    """Whether it looks at more than the topic, so that it must be rendered for every message."""

    @classmethod
    def parse(cls, text: str, *, fewest_levels: int, always: bool = False) -> Template:
        """`fewest_levels`: what the route's filter guarantees. `always`: there must be a value for
        every message. Raises TemplateError."""
        parts: list[Part] = []
        end = 0
        for token in _TOKEN.finditer(text):
            parts.append(text[end : token.start()])
            parts.append(_part(token, fewest_levels, always))
            end = token.end()
        parts.append(text[end:])
        kept = tuple(part for part in parts if part != "")
        return cls(text, kept, any(isinstance(part, User | Json) for part in kept))

    def render(
        self, topic: str, broker: str, content: Content | None = None, *, uri: bool = False
    ) -> str | None:
        """None when the message lacks something that has no default. `uri`: what comes from the
        message is made safe to stand in a URI. `content`: for a dynamic template."""
        levels = topic.split("/")
        out = []
        for part in self.parts:
            if isinstance(part, str):
                out.append(part)
                continue
            value: str | None
            if isinstance(part, Level):
                value = levels[part.index]
            elif isinstance(part, Whole):
                value = topic if part.name == "topic" else broker
            else:
                value = None if content is None else part.value(content)
            if value is None:
                return None
            out.append(quote(value, safe=_URI_SAFE, errors="replace") if uri else value)
        return "".join(out)


def _part(token: re.Match[str], fewest_levels: int, always: bool) -> Part:
    text, name = token.group(), token.group(1)
    if text in ("{{", "}}"):
        return text[0]
    if name is None:
        raise TemplateError(f"a lone `{text}`; write `{text * 2}` for the character itself")
    if name in ("topic", "broker"):
        return Whole(name)
    if level := _LEVEL.fullmatch(name):
        return _level(name, int(level.group(1)), fewest_levels)
    part: User | Json
    if user := _USER.fullmatch(name):
        part = User(user.group(1), user.group(2))
    elif pointer := _JSON.fullmatch(name):
        part = Json(_steps(pointer.group(1)), pointer.group(2))
    else:
        raise TemplateError(
            f"unknown name `{{{name}}}`; there are {{topic}}, {{broker}}, {{level[N]}}, "
            "{user[NAME]} and {json[/POINTER]}"
        )
    if always and not part.default:
        raise TemplateError(
            f"`{{{name}}}` may be missing in a message, and this field is needed in every event; "
            f"write a default, for example `{{{name.partition('|')[0]}|unknown}}`"
        )
    return part


def _level(name: str, index: int, fewest_levels: int) -> Level:
    part = Level(index)
    if part.needs > fewest_levels:
        raise TemplateError(
            f"`{{{name}}}` may not exist: the filter guarantees {fewest_levels} "
            f"level{'s' * (fewest_levels != 1)} (the first is {{level[0]}}); "
            "use a smaller index or a filter with more levels"
        )
    return part


def _steps(pointer: str) -> tuple[str, ...]:
    """RFC 6901 section 4: ~1 is a slash, ~0 a tilde."""
    for step in re.finditer(r"~(?![01])", pointer):
        raise TemplateError(
            f"`{pointer}` is no JSON pointer: write ~0 for the `~` at {step.start() + 1}"
        )
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:])
