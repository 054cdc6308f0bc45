"""Templates over topic levels, for the type, source and subject of a route's events.

    {topic}       the whole topic
    {level[0]}    its first level, counted like every index in Python; {level[-1]} is the last one
    {broker}      the broker's host:port
    {{ and }}     plain braces

This is Python's own format syntax cut down to names that exist, so that it needs no explanation
and can be checked when the routes are loaded: an index that a matching topic might lack is an
error then, never at the first message. Knows nothing of routes or CloudEvents.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_LEVEL = re.compile(r"level\[(-?[0-9]{1,3})\]")
_URI_SAFE = "/:@!$&'()*+,;=~"


class TemplateError(ValueError):
    """The text is not a template; str() says why and what to do."""


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
class Template:
    text: str
    parts: tuple[str | Level | Whole, ...]

    @classmethod
    def parse(cls, text: str, *, fewest_levels: int) -> Template:
        """`fewest_levels`: what the route's filter guarantees. Raises TemplateError."""
        parts: list[str | Level | Whole] = []
        end = 0
        for token in _TOKEN.finditer(text):
            parts.append(text[end : token.start()])
            parts.append(_part(token, fewest_levels))
            end = token.end()
        parts.append(text[end:])
        return cls(text, tuple(part for part in parts if part != ""))

    def render(self, topic: str, broker: str, *, uri: bool = False) -> str:
        """`uri`: what comes from the topic is made safe to stand in a URI."""
        levels = topic.split("/")
        out = []
        for part in self.parts:
            if isinstance(part, str):
                out.append(part)
                continue
            if isinstance(part, Level):
                value = levels[part.index]
            else:
                value = topic if part.name == "topic" else broker
            out.append(quote(value, safe=_URI_SAFE) if uri else value)
        return "".join(out)


def _part(token: re.Match[str], fewest_levels: int) -> str | Level | Whole:
    text, name = token.group(), token.group(1)
    if text in ("{{", "}}"):
        return text[0]
    if name is None:
        raise TemplateError(f"a lone `{text}`; write `{text * 2}` for the character itself")
    if name in ("topic", "broker"):
        return Whole(name)
    level = _LEVEL.fullmatch(name)
    if not level:
        raise TemplateError(
            f"unknown name `{{{name}}}`; there are {{topic}}, {{broker}} and {{level[N]}}"
        )
    part = Level(int(level.group(1)))
    if part.needs > fewest_levels:
        raise TemplateError(
            f"`{{{name}}}` may not exist: the filter guarantees {fewest_levels} "
            f"level{'s' * (fewest_levels != 1)} (the first is {{level[0]}}); "
            "use a smaller index or a filter with more levels"
        )
    return part
