"""Values of Go as a template sees them: what they are called, whether they are true, how they look.

Strings of Go are bytes; here they are `str` with bytes that are no UTF-8 as surrogates, so that
what goes in comes out. Refuses to know templates and verbs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple


class TemplateError(ValueError):
    """A template can't be parsed, or can't be rendered with the data it was given."""


class Unsupported(TemplateError):
    """Go would do it; here it is refused."""


class Int64(int):
    """An int64; a plain `int` is Go's int."""

    __slots__ = ()
    go_type = "int64"


class Uint8(int):
    """A byte of a string."""

    __slots__ = ()
    go_type = "uint8"


class Uint16(int):
    __slots__ = ()
    go_type = "uint16"


class Strings(list[str]):
    """A []string; an empty one is nil."""

    go_type = "[]string"


class Nil:
    """A nil pointer of some type; `shown` is how %v prints it."""

    __slots__ = ("go_type", "shown")

    def __init__(self, go_type: str, shown: str = "<nil>") -> None:
        self.go_type = go_type
        self.shown = shown


class Method(NamedTuple):
    """A method with its parameters' types (`string` or `int`)."""

    parameters: tuple[str, ...]
    call: Callable[..., Any]


class Map(dict[str, Strings]):
    """A map[string][]string, such as http.Header."""

    go_type: ClassVar[str] = "map[string][]string"
    go_methods: ClassVar[dict[str, Method]] = {}


class Struct:
    """A struct; `go_fields` are attributes, in Go's order. `go_type` begins with * for a pointer.

    A field without a counterpart here raises TemplateError when it is read.
    """

    __slots__ = ()
    go_type: ClassVar[str] = ""
    go_fields: ClassVar[tuple[str, ...]] = ()
    go_methods: ClassVar[dict[str, Method]] = {}


def type_name(value: object) -> str:
    """As Go's %T prints it."""
    if value is None:
        return "<nil>"
    name = getattr(value, "go_type", None)
    if name is not None:
        return str(name)
    return _NAMES[type(value)]


_NAMES: dict[type, str] = {bool: "bool", int: "int", float: "float64", str: "string"}


def kind(value: object) -> str:
    """The kinds that comparisons tell apart; empty for all others."""
    if isinstance(value, str):
        return "string"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, Uint8 | Uint16):
        return "uint"
    if isinstance(value, int):
        return "int"
    if isinstance(value, float):
        return "float"
    return ""


def is_true(value: Any) -> bool:
    """Not the zero value of its type (text/template's notion of truth)."""
    if isinstance(value, Struct):
        return True
    return not isinstance(value, Nil) and bool(value)


def is_nil(value: Any) -> bool:
    return value is None or isinstance(value, Nil) or (isinstance(value, Strings) and not value)


# --- strings ---------------------------------------------------------------------------------
def octets(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def is_print(char: str) -> bool:
    """Go's unicode.IsPrint."""
    return char.isprintable()


_ESCAPES = {
    "\a": "\\a",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\v": "\\v",
    "\\": "\\\\",
}


def quoted(value: str, mark: str = '"', ascii_only: bool = False) -> str:
    """Go's strconv.Quote (QuoteToASCII), or with "'" QuoteRune."""
    parts = [mark]
    for char in value:
        code = ord(char)
        if char == mark:
            parts.append("\\" + mark)
        elif char in _ESCAPES:
            parts.append(_ESCAPES[char])
        elif 0xDC80 <= code <= 0xDCFF:
            parts.append(f"\\x{code - 0xDC00:02x}")
        elif is_print(char) and (code < 128 or not ascii_only):
            parts.append(char)
        elif code < 32 or code == 127:
            parts.append(f"\\x{code:02x}")
        elif code < 0x10000:
            parts.append(f"\\u{code:04x}")
        else:
            parts.append(f"\\U{code:08x}")
    parts.append(mark)
    return "".join(parts)


# --- numbers ---------------------------------------------------------------------------------
def shortest(value: float) -> str:
    """Go's %v of a float64: the fewest digits that give it back, 1e-05 and 1e+06 with exponent."""
    size = abs(value)
    if 1e-4 <= size < 1e6:
        return repr(value).removesuffix(".0")
    if not size or size - size:  # zero, or none that can be counted
        return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(repr(value), f"{value:.0f}")
    mantissa, _, exponent = repr(size).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).strip("0")
    shift = int(exponent or 0) + len(whole) - 1
    sign = "-" if value < 0 else ""
    return f"{sign}{digits[0]}{'.' if digits[1:] else ''}{digits[1:]}e{shift:+03d}"


_HEX_FLOAT = re.compile(r"(-?)0x([01])\.([0-9a-f]*?)0*p([+-])([0-9]+)")


def hexadecimal(value: float) -> str:
    """Go's %x of a float64 without a precision."""
    match = _HEX_FLOAT.fullmatch(value.hex())
    if match is None:
        return shortest(value)
    sign, whole, fraction, way, exponent = match.groups()
    return f"{sign}0x{whole}{'.' if fraction else ''}{fraction}p{way}{int(exponent):02d}"
