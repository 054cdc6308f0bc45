"""YAML (and so JSON) as values that know on which line they stand, and a collection of complaints.

A file is read to its end whatever is wrong in it: all that is to be mended is said at once, each
with its line, where it is, and the way out. Knows nothing of routes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
Path = tuple[str | int, ...]
"""Of a value in the document: keys, and indices of lists from 0."""


class DocumentError(ValueError):
    """The file can't be used; str() has one line for each thing to mend."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML's own rule is silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key_node, _), key in zip(node.value, keys, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` stands twice", key_node.start_mark
                )
        return super().construct_mapping(node, deep)


@dataclass(slots=True)
class Document:
    """`file`: what complaints call it. `problems`: (line, text), in the order they were found."""

    file: str
    value: object = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str, file: str) -> Document:
        """Raises DocumentError when it is not YAML."""
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            value = None if node is None else loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
            raise DocumentError(f"{file}: {where}not valid YAML: {error.problem}") from error
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise DocumentError(f"{file}: not valid YAML: {error}") from error
        document = cls(file, value)
        document._number(node, (), ())
        return document

    def _number(self, node: yaml.Node | None, path: Path, above: tuple[yaml.Node, ...]) -> None:
        if node is None or node in above:  # an anchor that holds itself
            return
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*path, str(key.value))
                self.lines[inner] = key.start_mark.line + 1
                self._number(value, inner, (*above, node))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._number(value, (*path, index), (*above, node))

    def line(self, path: Path) -> int:
        """Where it stands; of what is missing, where it would belong."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def wrong(self, path: Path, problem: str) -> None:
        self.problems.append((self.line(path), problem))

    def check(self) -> None:
        """Raises DocumentError if anything was wrong."""
        if self.problems:
            found = sorted(self.problems, key=lambda each: each[0])
            raise DocumentError("\n".join(f"{self.file}:{line}: {text}" for line, text in found))


@dataclass(frozen=True, slots=True)
class Place:
    """A mapping in the document. Every getter notes what is wrong and returns a default, so that
    the next field can be looked at as well."""

    document: Document
    path: Path
    called: str
    """What complaints call it: `route 2 (temperatures)`."""
    values: Mapping[str, object]
    prefix: str = ""

    def wrong(self, field: str, problem: object) -> None:
        text = f"{self.called}: field `{self.prefix}{field}`: {problem}"
        self.document.wrong((*self.path, field), text)

    def check_keys(self, known: Iterable[str]) -> None:
        names = list(known)
        for key in self.values:
            if key not in names:
                meant = _meant(str(key), names)
                hint = f"did you mean `{meant}`? " if meant else ""
                self.wrong(str(key), f"unknown; {hint}The known fields are {', '.join(names)}")

    def text(self, field: str, default: str | None = None) -> str | None:
        """None, too, when it is missing or wrong, which is noted."""
        value = self.values.get(field, default)
        if value is None:
            self.wrong(field, f"is missing; every {self.called.partition(' ')[0]} needs it")
        elif not isinstance(value, str) or not value:
            self.wrong(field, f"must be a text, not {value!r}; quote it")
        else:
            return value
        return None

    def parsed(self, field: str, parse: Callable[[str], T], default: str | None = None) -> T | None:
        text = self.text(field, default)
        if text is None:
            return None
        try:
            return parse(text)
        except ValueError as error:
            self.wrong(field, error)
            return None

    def optional(self, field: str, parse: Callable[[str], T]) -> T | None:
        """None when it is not there."""
        return self.parsed(field, parse) if field in self.values else None

    def integer(self, field: str, default: int, lowest: int, highest: int) -> int:
        value = self.values.get(field, default)
        if type(value) is int and lowest <= value <= highest:
            return value
        self.wrong(field, f"must be a whole number from {lowest} to {highest}, not {value!r}")
        return default

    def number(self, field: str, lowest: float, highest: float) -> float | None:
        value = self.values.get(field)
        if value is None:
            return None
        if (
            isinstance(value, int | float)
            and type(value) is not bool
            and lowest <= value <= highest
        ):
            return float(value)
        self.wrong(field, f"must be a number from {lowest:g} to {highest:g}, not {value!r}")
        return None

    def flag(self, field: str, default: bool) -> bool:
        value = self.values.get(field, default)
        if isinstance(value, bool):
            return value
        self.wrong(field, f"must be true or false, not {value!r}")
        return default

    def one_of(self, field: str, choices: tuple[str, ...], default: str) -> str:
        value = self.values.get(field, default)
        if isinstance(value, str) and value in choices:
            return value
        self.wrong(field, f"`{value}` is none of {', '.join(choices)}")
        return default

    def inner(self, field: str, what: str) -> Place | None:
        """The mapping in a field; None when there is none."""
        value = self.values.get(field)
        if field not in self.values:
            return None
        if not isinstance(value, dict):
            self.wrong(field, f"must be a mapping of {what}")
            return None
        path = (*self.path, field)
        return Place(self.document, path, self.called, value, f"{self.prefix}{field}.")


def _meant(written: str, known: list[str]) -> str | None:
    from difflib import get_close_matches

    lower = {name.lower(): name for name in known}
    found = get_close_matches(written.lower(), lower, 1, 0.75)
    return lower[found[0]] if found else None
