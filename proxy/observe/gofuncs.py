"""The functions that a template of Go can call, on the values of `govalues`.

Owns comparison, indexing, slicing and escaping as Go does them. A function takes evaluated
arguments and raises TemplateError; `and` and `or` choose their arguments, so the parser has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import quote_plus

from weir.proxy.observe.gofmt import sprint, sprintf, sprintln
from weir.proxy.observe.govalues import (
    Map,
    Nil,
    Strings,
    Struct,
    TemplateError,
    Uint8,
    is_nil,
    is_print,
    is_true,
    kind,
    octets,
    text,
    type_name,
)


class Function(NamedTuple):
    """`most` None: any number. `first` is the type that the first argument must have, if any."""

    call: Callable[..., Any]
    least: int
    most: int | None
    first: str = ""


# --- comparison ------------------------------------------------------------------------------
def _eq(first: Any, *others: Any) -> bool:
    if not others:
        raise TemplateError("missing argument for comparison")
    return any(_equal(first, other) for other in others)


def _equal(one: Any, other: Any) -> bool:
    kinds = kind(one), kind(other)
    if kinds[0] and kinds[1] and (kinds[0] == kinds[1] or set(kinds) == {"int", "uint"}):
        return bool(one == other)
    if kinds[0] != kinds[1]:
        if one is None or other is None:
            return False
        raise _incompatible(one, other)
    if is_nil(one) or is_nil(other):
        if one is not None and other is not None and _shape(one) != _shape(other):
            raise _incompatible(one, other)
        return is_nil(one) and is_nil(other)
    if _shape(one) != _shape(other) or isinstance(one, list | Map):
        raise TemplateError(f"non-comparable type {type_name(other)}")
    return one is other


def _shape(value: Any) -> str:
    """Go's reflect.Kind of what is no number, string or bool."""
    if isinstance(value, Strings):
        return "slice"
    if isinstance(value, Map):
        return "map"
    return "pointer" if type_name(value).startswith("*") else "struct"


def _incompatible(one: Any, other: Any) -> TemplateError:
    return TemplateError(
        f"incompatible types for comparison: {type_name(one)} and {type_name(other)}"
    )


def _less(one: Any, other: Any) -> bool:
    kinds = kind(one), kind(other)
    if not kinds[0] or not kinds[1]:
        raise TemplateError("invalid type for comparison")
    if kinds[0] != kinds[1] and set(kinds) != {"int", "uint"}:
        raise _incompatible(one, other)
    if kinds[0] == "bool":
        raise TemplateError("invalid type for comparison")
    if kinds[0] == "string":
        return octets(one) < octets(other)
    return bool(one < other)


def _le(one: Any, other: Any) -> bool:
    return _less(one, other) or _equal(one, other)


# --- parts of things ---------------------------------------------------------------------------
def _index_in(index: Any, limit: int) -> int:
    if kind(index) not in ("int", "uint"):
        what = "nil" if index is None else f"type {type_name(index)}"
        raise TemplateError(f"cannot index slice/array with {what}")
    if not 0 <= index < limit:
        raise TemplateError(f"index out of range: {index}")
    return int(index)


def _index(item: Any, *indexes: Any) -> Any:
    if item is None:
        raise TemplateError("index of untyped nil")
    for index in indexes:
        if isinstance(item, Nil):
            raise TemplateError("index of nil pointer")
        if isinstance(item, str):
            data = octets(item)
            item = Uint8(data[_index_in(index, len(data))])
        elif isinstance(item, list):
            item = item[_index_in(index, len(item))]
        elif isinstance(item, Map):
            if not isinstance(index, str):
                raise TemplateError(f"value has type {type_name(index)}; should be string")
            item = item.get(index, Strings())
        else:
            raise TemplateError(f"can't index item of type {type_name(item)}")
    return item


def _slice(item: Any, *indexes: Any) -> Any:
    if item is None:
        raise TemplateError("slice of untyped nil")
    if len(indexes) > 3:
        raise TemplateError(f"too many slice indexes: {len(indexes)}")
    whole = octets(item) if isinstance(item, str) else item
    if not isinstance(whole, bytes | list):
        raise TemplateError(f"can't slice item of type {type_name(item)}")
    if len(indexes) == 3 and isinstance(whole, bytes):
        raise TemplateError("cannot 3-index slice a string")
    chosen = [_index_in(index, len(whole) + 1) for index in indexes]
    bounds = [0, len(whole)]
    bounds[: len(chosen)] = chosen
    for low, high in pairwise(bounds):
        if low > high:
            raise TemplateError(f"invalid slice index: {low} > {high}")
    piece = whole[bounds[0] : bounds[1]]
    return text(piece) if isinstance(piece, bytes) else Strings(piece)


def _len(item: Any) -> int:
    if isinstance(item, Nil):
        raise TemplateError("len of nil pointer")
    if isinstance(item, str):
        return len(octets(item))
    if isinstance(item, list | dict):
        return len(item)
    raise TemplateError(f"len of type {type_name(item)}")


def _call(function: Any, *_: Any) -> Any:
    if function is None:
        raise TemplateError("call of nil")
    raise TemplateError(f"non-function of type {type_name(function)}")


# --- escaping --------------------------------------------------------------------------------
def _as_text(values: tuple[Any, ...]) -> str:
    if len(values) == 1 and isinstance(values[0], str):
        return values[0]
    return sprint([printable(value) for value in values])


def printable(value: Any) -> Any:
    """What is printed for a value: pointers are followed, and there may be none."""
    if value is None:
        return "<no value>"
    if isinstance(value, Struct) and value.go_type.startswith("*"):
        return _Pointed(value)
    return value


class _Pointed(Struct):
    """What a pointer points to, for printing."""

    __slots__ = ("go_fields", "go_methods", "go_type", "of")

    def __init__(self, of: Struct) -> None:
        self.of = of
        self.go_type = of.go_type[1:]  # type: ignore[misc]
        self.go_fields = of.go_fields  # type: ignore[misc]
        self.go_methods = {}  # type: ignore[misc]
        stringer = of.go_methods.get("String")
        if stringer is not None:
            self.go_methods["String"] = stringer._replace(call=lambda _: stringer.call(of))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)


_JS = {
    "\\": "\\\\",
    "'": "\\'",
    '"': '\\"',
    "<": "\\u003C",
    ">": "\\u003E",
    "&": "\\u0026",
    "=": "\\u003D",
}
_JS_SPECIAL = re.compile(r"[\\'\"<>&=\x00-\x1f]|[^\x00-\x7f]")


def _js_escape(match: re.Match[str]) -> str:
    char = match[0]
    code = ord(char)
    if char in _JS:
        return _JS[char]
    if is_print(char) or 0xDC80 <= code <= 0xDCFF:  # bytes that are no text stay as they are
        return char
    return f"\\u{code:04X}"


def _js(*values: Any) -> str:
    return _JS_SPECIAL.sub(_js_escape, _as_text(values))


_HTML = {
    '"': "&#34;",
    "'": "&#39;",
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    "\0": "\ufffd",
}
_HTML_SPECIAL = re.compile(r"[\"'&<>\x00]")


def _html(*values: Any) -> str:
    return _HTML_SPECIAL.sub(lambda match: _HTML[match[0]], _as_text(values))


def _urlquery(*values: Any) -> str:
    return quote_plus(octets(_as_text(values)))


FUNCTIONS = {
    "call": Function(_call, 1, None),
    "eq": Function(_eq, 1, None),
    "ge": Function(lambda one, other: not _less(one, other), 2, 2),
    "gt": Function(lambda one, other: not _le(one, other), 2, 2),
    "html": Function(_html, 0, None),
    "index": Function(_index, 1, None),
    "js": Function(_js, 0, None),
    "le": Function(_le, 2, 2),
    "len": Function(_len, 1, 1),
    "lt": Function(_less, 2, 2),
    "ne": Function(lambda one, other: not _equal(one, other), 2, 2),
    "not": Function(lambda value: not is_true(value), 1, 1),
    "print": Function(lambda *values: sprint(list(values)), 0, None),
    "printf": Function(lambda form, *values: sprintf(form, list(values)), 1, None, "string"),
    "println": Function(lambda *values: sprintln(list(values)), 0, None),
    "slice": Function(_slice, 1, None),
    "urlquery": Function(_urlquery, 0, None),
}
SHORT_CIRCUITS = {"and": False, "or": True}
"""Stop at the first argument whose truth is this; at least one argument."""
