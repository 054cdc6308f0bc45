"""Topic filters: what is a valid one, and which of them a topic matches (MQTT 5 section 4.7).

Owns the rules of `+`, `#`, `$`-topics and `$share/group/filter`, and a table that answers "which
routes take this topic" from a cache. Knows nothing of routes, brokers or payloads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

LONGEST = 65_535
"""Bytes of UTF-8 that an MQTT string can hold (section 1.5.4)."""

REMEMBERED = 10_000
"""Topics whose routes are remembered; publishers that mint topics must not grow us without end."""

LONGEST_REMEMBERED = 1024
"""Characters of a topic that is remembered."""


class FilterError(ValueError):
    """The text is not a topic filter; str() says why and what to do."""


@dataclass(frozen=True, slots=True)
class TopicFilter:
    """A valid filter. `levels` are those that topics are compared with, without `$share/group`."""

    text: str
    group: str | None
    levels: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> TopicFilter:
        """Raises FilterError."""
        _check_string(text)
        group, pattern = _split_share(text)
        levels = tuple(pattern.split("/"))
        for position, level in enumerate(levels):
            _check_level(text, level, last=position == len(levels) - 1)
        return cls(text, group, levels)

    @property
    def fewest_levels(self) -> int:
        """Levels that every matching topic has; `a/#` matches `a` too, so `#` adds none.

        A lone `#` still guarantees one: no topic is empty.
        """
        return max(1, len(self.levels) - (self.levels[-1] == "#"))

    def matches(self, topic: str) -> bool:
        return self._matches(topic.split("/"))

    def _matches(self, names: list[str]) -> bool:
        levels = self.levels
        if names[0].startswith("$") and levels[0] in ("+", "#"):
            return False  # 4.7.2: a leading wildcard must not reach the broker's own topics
        for position, level in enumerate(levels):
            if level == "#":
                return True
            if position == len(names):
                return False
            if level != "+" and level != names[position]:
                return False
        return len(names) == len(levels)


def _check_string(text: str) -> None:
    if not text:
        raise FilterError("an empty topic filter matches nothing; use `#` for every topic")
    if "\0" in text:
        raise FilterError("a topic filter must not contain the character U+0000; remove it")
    if len(text.encode("utf-8", "surrogatepass")) > LONGEST:
        raise FilterError(f"a topic filter has at most {LONGEST} bytes; shorten it")


def _split_share(text: str) -> tuple[str | None, str]:
    if text != "$share" and not text.startswith("$share/"):
        return None, text
    group, slash, pattern = text.removeprefix("$share").removeprefix("/").partition("/")
    if not group or not slash or not pattern:
        raise FilterError(f"`{text}` is not a shared subscription; write $share/GROUP/FILTER")
    if "+" in group or "#" in group:
        raise FilterError(f"the group `{group}` of a shared subscription must not hold + or #")
    return group, pattern


def _check_level(text: str, level: str, *, last: bool) -> None:
    if level == "#":
        if not last:
            raise FilterError(f"`{text}`: `#` must be the last level; use + for one level")
    elif level != "+" and ("#" in level or "+" in level):
        raise FilterError(
            f"`{text}`: a wildcard takes a whole level, so `{level}` can't be one; write + or #"
        )


class _Node:
    """What filters have in common up to one of their levels. `ends`, `rest`: numbers of those that
    end here, and of those whose `#` begins here."""

    __slots__ = ("any", "ends", "levels", "rest")

    def __init__(self) -> None:
        self.levels: dict[str, _Node] = {}
        self.any: _Node | None = None
        self.ends: list[int] = []
        self.rest: list[int] = []

    def below(self, level: str) -> _Node:
        if level != "+":
            return self.levels.setdefault(level, _Node())
        if self.any is None:
            self.any = _Node()
        return self.any


class TopicTable(Generic[T]):
    """Which values are registered under filters that match a topic, in order of registration."""

    def __init__(self, entries: Iterable[tuple[TopicFilter, T]]) -> None:
        self._values: list[T] = []
        self._root = _Node()
        for pattern, value in entries:
            self._register(pattern.levels, len(self._values))
            self._values.append(value)
        self._known: dict[str, tuple[T, ...]] = {}

    def matching(self, topic: str) -> tuple[T, ...]:
        known = self._known.get(topic)
        return self._look_up(topic) if known is None else known

    def _register(self, levels: tuple[str, ...], number: int) -> None:
        node, hash_ends_it = self._root, levels[-1] == "#"
        for level in levels[:-1] if hash_ends_it else levels:
            node = node.below(level)
        (node.rest if hash_ends_it else node.ends).append(number)

    def _look_up(self, topic: str) -> tuple[T, ...]:
        found = tuple(self._values[number] for number in self._numbers(topic.split("/")))
        if len(topic) <= LONGEST_REMEMBERED:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[topic] = found
        return found

    def _numbers(self, names: list[str]) -> list[int]:
        """Every node of the tree is looked at once at most, whatever the topic."""
        found: list[int] = []
        at = [self._root]
        for position, name in enumerate(names):
            hidden = position == 0 and name.startswith("$")  # 4.7.2: from a leading wildcard
            below = []
            for node in at:
                if not hidden:
                    found += node.rest
                    if node.any is not None:
                        below.append(node.any)
                if (named := node.levels.get(name)) is not None:
                    below.append(named)
            if not below:
                return sorted(found)
            at = below
        for node in at:
            found += node.rest
            found += node.ends
        return sorted(found)
