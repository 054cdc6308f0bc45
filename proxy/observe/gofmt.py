"""Printing as Go's fmt package prints: Sprint, Sprintln, and Sprintf with its verbs and complaints.

Owns verbs, flags and the `%!d(string=hi)` of a verb that doesn't fit. Only for the values of
`govalues`; what Go has beyond them (channels, complex numbers, %p) is refused as Unsupported.
"""

from __future__ import annotations

from typing import Any

from weir.proxy.observe.govalues import (
    Map,
    Nil,
    Struct,
    Unsupported,
    hexadecimal,
    octets,
    quoted,
    shortest,
    type_name,
)

_TOO_LARGE = 1_000_000
_FLAGS = "+-# 0"
_DIGITS = "0123456789"


class _Spec:
    """Flags, width and precision of one verb; -1 is not given."""

    __slots__ = ("minus", "named", "plus", "precision", "sharp", "space", "width", "zero")

    def __init__(self) -> None:
        self.minus = self.plus = self.sharp = self.space = self.zero = False
        self.named = False  # %+v: with the names of fields
        self.width = self.precision = -1

    def pad(self, text: str, zero: bool = True) -> str:
        """To the width; `zero`: with zeros on the left, if there is that flag."""
        if len(text) >= self.width:
            return text
        if self.minus:
            return text.ljust(self.width)
        return text.rjust(self.width, "0" if zero and self.zero else " ")


_PLAIN = _Spec()


def sprint(values: list[Any]) -> str:
    """Blanks between operands when neither is a string."""
    parts: list[str] = []
    before = True
    for value in values:
        is_text = isinstance(value, str)
        if parts and not is_text and not before:
            parts.append(" ")
        parts.append(shown(value))
        before = is_text
    return "".join(parts)


def sprintln(values: list[Any]) -> str:
    return " ".join(map(shown, values)) + "\n"


def shown(value: Any) -> str:
    """A value as %v shows it."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(int(value))
    return _formatted(value, "v", _PLAIN, 0)


def sprintf(template: str, arguments: list[Any]) -> str:
    return _Printer(template, arguments).run()


class _Printer:
    """One call of Sprintf: where we are in the format, and which argument comes next."""

    def __init__(self, template: str, arguments: list[Any]) -> None:
        self.format = template
        self.arguments = arguments
        self.at = 0
        self.number = 0
        self.reordered = False
        self.good = True
        self.indexed = False

    def run(self) -> str:
        parts: list[str] = []
        template = self.format
        while True:
            percent = template.find("%", self.at)
            if percent < 0:
                parts.append(template[self.at :])
                break
            parts.append(template[self.at : percent])
            self.at = percent + 1
            parts.append(self._verb())
        if not self.reordered and self.number < len(self.arguments):
            extra = [
                shown(value) if value is None else f"{type_name(value)}={shown(value)}"
                for value in self.arguments[self.number :]
            ]
            parts.append("%!(EXTRA " + ", ".join(extra) + ")")
        return "".join(parts)

    def _verb(self) -> str:
        spec = _Spec()
        self.good, self.indexed = True, False
        complaints = self._flags_and_sizes(spec)
        if self.at >= len(self.format):
            return complaints + "%!(NOVERB)"
        verb = self.format[self.at]
        self.at += 1
        if verb == "%":
            return complaints + "%"
        if not self.good:
            return f"{complaints}%!{verb}(BADINDEX)"
        if self.number >= len(self.arguments):
            return f"{complaints}%!{verb}(MISSING)"
        value = self.arguments[self.number]
        self.number += 1
        if verb == "v":
            spec.named, spec.plus = spec.plus, False
        return complaints + _formatted(value, verb, spec, 0)

    def _flags_and_sizes(self, spec: _Spec) -> str:
        complaints = ""
        while self._peek() and self._peek() in _FLAGS:
            flag = self._take()
            if flag == "-":
                spec.minus, spec.zero = True, False
            elif flag == "0":
                spec.zero = not spec.minus
            elif flag == "+":
                spec.plus = True
            elif flag == "#":
                spec.sharp = True
            else:
                spec.space = True
        self._index()
        if self._peek() == "*":
            self._take()
            size = self._size()
            if size is None:
                complaints += "%!(BADWIDTH)"
            elif size < 0:
                spec.minus, spec.zero, spec.width = True, False, -size
            else:
                spec.width = size
            self.indexed = False
        else:
            size = self._digits()
            if size is not None:
                if self.indexed:
                    self.good = False
                spec.width = size
        if self._peek() == ".":
            self._take()
            if self.indexed:
                self.good = False
            self._index()
            if self._peek() == "*":
                self._take()
                size = self._size()
                if size is None or size < 0:
                    complaints += "%!(BADPREC)"
                else:
                    spec.precision = size
                self.indexed = False
            else:
                spec.precision = self._digits() or 0
        if not self.indexed:
            self._index()
        return complaints

    def _peek(self) -> str:
        return self.format[self.at : self.at + 1]

    def _take(self) -> str:
        char = self._peek()
        self.at += 1
        return char

    def _digits(self) -> int | None:
        start = self.at
        while self._peek() and self._peek() in _DIGITS:
            self.at += 1
        if start == self.at:
            return None
        if self.at - start > 7 or int(self.format[start : self.at]) > _TOO_LARGE:
            self.at = len(self.format)  # as Go: the rest is no verb any more
            return None
        return int(self.format[start : self.at])

    def _size(self) -> int | None:
        """An argument that is a width or a precision."""
        if self.number >= len(self.arguments):
            return None
        value = self.arguments[self.number]
        self.number += 1
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _TOO_LARGE:
            return None
        return int(value)

    def _index(self) -> None:
        """`[3]`: go on with the third argument."""
        if self._peek() != "[":
            return
        self.reordered = True
        end = self.format.find("]", self.at)
        if end < 0:
            self.good = False
            self.at += 1
            return
        text = self.format[self.at + 1 : end]
        self.at = end + 1
        if text.isdecimal() and len(text) < 8 and 1 <= int(text) <= len(self.arguments):
            self.number = int(text) - 1
            self.indexed = True
        else:
            self.good = False


# --- values ----------------------------------------------------------------------------------
def _formatted(value: Any, verb: str, spec: _Spec, depth: int) -> str:
    if verb == "T":
        return spec.pad(type_name(value))
    if verb == "p" or (verb == "v" and spec.sharp and not isinstance(value, str | int)):
        raise Unsupported(f"printf: no %{'#' if spec.sharp else ''}{verb} here")
    if value is None or isinstance(value, Nil):
        text = "<nil>" if value is None else value.shown
        return spec.pad(text) if verb == "v" else _misfit(value, verb, spec)
    if isinstance(value, str):
        return _string(value, verb, spec)
    if isinstance(value, bool):
        text = "true" if value else "false"
        return spec.pad(text) if verb in "tv" else _misfit(value, verb, spec)
    if isinstance(value, int):
        return _integer(value, verb, spec)
    if isinstance(value, float):
        return _float(value, verb, spec)
    return _composite(value, verb, spec, depth)


def _composite(value: Any, verb: str, spec: _Spec, depth: int) -> str:
    if isinstance(value, list):
        return "[" + " ".join(_formatted(item, verb, spec, depth + 1) for item in value) + "]"
    if isinstance(value, Map):
        pairs = (
            f"{_formatted(key, verb, spec, depth)}:{_formatted(value[key], verb, spec, depth + 1)}"
            for key in sorted(value, key=octets)
        )
        return "map[" + " ".join(pairs) + "]"
    assert isinstance(value, Struct)
    stringer = value.go_methods.get("String")
    if stringer is not None and verb in "vsxXq":
        return _string(stringer.call(value), verb, spec)
    fields = []
    for name in value.go_fields:
        item = getattr(value, name)
        if (
            isinstance(item, Struct)
            and item.go_type.startswith("*")
            and "String" not in (item.go_methods)
        ):
            raise Unsupported(f"{name} of {value.go_type} prints as an address")
        shown_field = _formatted(item, verb, spec, depth + 1)
        fields.append(f"{name}:{shown_field}" if spec.named else shown_field)
    mark = "&" if value.go_type.startswith("*") else ""
    return mark + "{" + " ".join(fields) + "}"


def _misfit(value: Any, verb: str, spec: _Spec) -> str:
    """The complaint about a verb that doesn't fit; the flags hold within it."""
    if value is None:
        return f"%!{verb}(<nil>)"
    return f"%!{verb}({type_name(value)}={_formatted(value, 'v', spec, 0)})"


def _string(value: str, verb: str, spec: _Spec) -> str:
    if verb in "vsq" and spec.precision >= 0:
        value = value[: spec.precision]
    if verb == "s" or (verb == "v" and not spec.sharp):
        return spec.pad(value)
    if verb in "qv":
        if spec.sharp and verb == "q" and "`" not in value and _raw(value):
            return spec.pad(f"`{value}`")
        return spec.pad(quoted(value, ascii_only=spec.plus))
    if verb in "xX":
        data = octets(value)
        if spec.precision >= 0:
            data = data[: spec.precision]
        prefix = "0x" if spec.sharp and data else ""
        text = prefix + data.hex()
        if spec.space:
            text = prefix + data.hex(" ").replace(" ", " " + prefix)
        return spec.pad(text.upper() if verb == "X" else text)
    return _misfit(value, verb, spec)


def _raw(value: str) -> bool:
    return all(
        (char >= " " and char != "\x7f" and char != "\ufeff") or char == "\t" for char in (value)
    ) and not any("\udc80" <= char <= "\udcff" for char in value)


_BASES = {"d": "d", "v": "d", "b": "b", "o": "o", "O": "o", "x": "x", "X": "X"}
_PREFIXES = {"b": "0b", "o": "0", "x": "0x", "X": "0X"}


def _integer(value: int, verb: str, spec: _Spec) -> str:
    value_name = value
    value = int(value)
    if verb in _BASES:
        digits = format(abs(value), _BASES[verb])
        if spec.precision == 0 and value == 0:
            return " " * max(spec.width, 0)
        sign = "-" if value < 0 else "+" if spec.plus else " " if spec.space else ""
        if spec.precision >= 0:
            digits = digits.rjust(spec.precision, "0")
        elif spec.zero and spec.width >= 0:
            digits = digits.rjust(spec.width - len(sign), "0")
        prefix = "0o" if verb == "O" else ""
        if spec.sharp and verb in _PREFIXES:
            prefix = _PREFIXES[verb]
            if verb == "o" and digits.startswith("0"):
                prefix = ""
        return spec.pad(sign + prefix + digits, zero=False)
    if verb in "cqU":
        char = chr(value) if 0 <= value <= 0x10FFFF and not 0xD800 <= value < 0xE000 else "\ufffd"
        if verb == "c":
            return spec.pad(char)
        if verb == "q":
            return spec.pad(quoted(char, "'", spec.plus))
        code = format(value & 0xFFFFFFFFFFFFFFFF, "X").rjust(max(spec.precision, 4), "0")
        shown_char = f" '{char}'" if spec.sharp and char.isprintable() else ""
        return spec.pad(f"U+{code}{shown_char}", zero=False)
    return _misfit(value_name, verb, spec)


def _float(value: float, verb: str, spec: _Spec) -> str:
    if verb not in "vbeEfFgGxX":
        return _misfit(value, verb, spec)
    if spec.sharp or verb == "b" or (verb in "xX" and spec.precision >= 0):
        raise Unsupported(f"printf: no such %{verb} of a float here")
    if verb in "xX":
        text = hexadecimal(value)
    elif verb in "vgG" and spec.precision < 0:
        text = shortest(value)
    else:
        precision = 6 if spec.precision < 0 else spec.precision
        text = f"%.{precision}{'g' if verb in 'vgG' else verb.lower()}" % value
    if verb in "EGX":
        text = text.upper()
    if not text.startswith(("-", "+")):
        text = ("+" if spec.plus else " " if spec.space else "") + text
    if spec.zero and len(text) < spec.width:
        sign = text[:1] if text[:1] in "+- " else ""
        return sign + text[len(sign) :].rjust(spec.width - len(sign), "0")
    return spec.pad(text)
