"""JSON the way Go's decoder fills a struct: typed fields, null is absent, unknown keys are ignored.

Owns the rules of types and the words of the complaint, which name the field by its path. Which
fields there are is the caller's knowledge.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number"}


class FieldError(ValueError):
    """A document or a field of it can't be used. `str()` begins with the field's path."""


def parse(text: str) -> Any:
    """The document. Raises FieldError when it is no JSON; NaN and Infinity are none, as in Go."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise FieldError("not JSON: nested too deeply") from None
    except ValueError as error:
        raise FieldError(f"not JSON: {error}") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


class Fields:
    """The fields of one object; `path` is how it is called in a complaint, "" for the document.

    A field that is absent or null has its default. Names are the same in upper and lower case.
    """

    __slots__ = ("_fields", "path")

    def __init__(self, value: object, path: str = "") -> None:
        self.path = path
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise FieldError(f"{path or 'document'}: expected an object, got {_kind(value)}")
        self._fields = {name.lower(): field for name, field in value.items()}

    def object(self, name: str) -> Fields:
        """The object of that name, empty when absent."""
        return Fields(self._fields.get(name.lower()), self.at(name))

    def optional(self, name: str) -> Fields | None:
        """The object of that name, None when absent."""
        return None if self._fields.get(name.lower()) is None else self.object(name)

    def objects(self, name: str) -> list[Fields]:
        items = self._get(name, list, [])
        return [Fields(item, f"{self.at(name)}[{i}]") for i, item in enumerate(items)]

    def text(self, name: str, default: str = "") -> str:
        return str(self._get(name, str, default))

    def boolean(self, name: str) -> bool:
        return bool(self._get(name, bool, False))

    def integer(self, name: str, *, bits: int = 32) -> int:
        value = self._get(name, int, 0)
        if not -(1 << bits - 1) <= value < 1 << bits - 1:
            self.fault(name, f"{value} is out of range")
        return int(value)

    def whole(self, name: str) -> int:
        """An integer that can't sensibly be negative."""
        value = self.integer(name)
        if value < 0:
            self.fault(name, f"{value} is negative; 0 or more is allowed")
        return value

    def nanoseconds(self, name: str, default: float) -> float:
        """A Go duration, in seconds."""
        if self._fields.get(name.lower()) is None:
            return default
        value = self.integer(name, bits=64)
        if value < 0:
            self.fault(name, f"{value} is negative; 0 or more nanoseconds are allowed")
        return value / 1e9

    def fraction(self, name: str) -> float:
        value = self._fields.get(name.lower())
        if value is None:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fault(name, f"expected a number, got {_kind(value)}")
        if not 0 <= value <= 1:
            self.fault(name, f"{value} is not between 0 and 1")
        return float(value)

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        """One of the words; the first is the default, for an empty string too."""
        value = self.text(name) or allowed[0]
        if value not in allowed:
            self.fault(name, f"{value!r} is unknown; allowed: {', '.join(allowed)}")
        return value

    def any(self, name: str) -> Any:
        return self._fields.get(name.lower())

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def fault(self, name: str, text: str) -> NoReturn:
        raise FieldError(f"{self.at(name)}: {text}")

    def _get(self, name: str, kind: type, default: Any) -> Any:
        value = self._fields.get(name.lower())
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.fault(name, f"expected {_NAMES[kind]}, got {_kind(value)}")
        return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value!r}"
    return _NAMES[type(value)]
