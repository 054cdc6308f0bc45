"""Templates of Go's text/template cut into tokens: text, and what stands between {{ and }}.

Owns delimiters, trim markers, comments and the spelling of constants. What the tokens mean
together is decided by the parser.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from weir.proxy.observe.govalues import TemplateError, text

_BLANKS = " \t\r\n"
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
    | (?P<number>[+-]?(?:0[xX][0-9a-fA-F_]*(?:\.[0-9a-fA-F_]*)?(?:[pP][+-]?[0-9_]*)?
        | 0[oO][0-7_]* | 0[bB][01_]*
        | (?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9_]*)?)i?)
    | (?P<char>'(?:\\[^\n]|[^\\'\n])*')
    | (?P<string>"(?:\\[^\n]|[^\\"\n])*")
    | (?P<raw>`[^`]*`)
    | (?P<field>\.\w+)
    | (?P<variable>\$\w*)
    | (?P<dot>\.)
    | (?P<name>\w+)
    | (?P<declare>:=)
    | (?P<assign>=)
    | (?P<pipe>\|)
    | (?P<open>\()
    | (?P<close>\))
    | (?P<comma>,)
    """,
    re.VERBOSE,
)
_WORDS = frozenset({"name", "field", "variable", "number"})
_AFTER_WORD = re.compile(r"[ \t\r\n.,|:)(]|$")
KEYWORDS = frozenset(
    {
        "block",
        "break",
        "continue",
        "define",
        "else",
        "end",
        "if",
        "nil",
        "range",
        "template",
        "with",
        "true",
        "false",
    }
)


class Token(NamedTuple):
    """`kind` is text, end (of the template), right (}}), a keyword, or a group of _TOKEN."""

    kind: str
    value: str
    at: int


def tokens(template: str) -> list[Token]:
    """Raises TemplateError. A { right } token ends each action; blanks are tokens within one."""
    found: list[Token] = []
    at = 0
    trim = False
    while True:
        opening = template.find("{{", at)
        piece = template[at:] if opening < 0 else template[at:opening]
        if trim:
            piece = piece.lstrip(_BLANKS)
        if opening < 0:
            if piece:
                found.append(Token("text", piece, at))
            found.append(Token("end", "", len(template)))
            return found
        inside = opening + 2
        if template[inside : inside + 1] == "-" and template[inside + 1 : inside + 2] in (
            *_BLANKS,
        ):
            piece = piece.rstrip(_BLANKS)
            inside += 2
        if piece:
            found.append(Token("text", piece, at))
        if template.startswith("/*", inside):
            at, trim = _comment(template, inside)
        else:
            found.append(Token("left", "{{", opening))
            at, trim = _action(template, inside, found)


def _closing(template: str, at: int) -> tuple[int, bool] | None:
    """Where the template goes on behind a }} at `at`, and whether it trims."""
    if template.startswith("}}", at):
        return at + 2, False
    if template[at : at + 1] in (*_BLANKS,) and template.startswith("-}}", at + 1):
        return at + 4, True
    return None


def _comment(template: str, at: int) -> tuple[int, bool]:
    end = template.find("*/", at)
    if end < 0:
        raise fault(template, at, "unclosed comment")
    closing = _closing(template, end + 2)
    if closing is None:
        raise fault(template, at, "comment ends before closing delimiter")
    return closing


def _action(template: str, at: int, found: list[Token]) -> tuple[int, bool]:
    depth = 0
    while True:
        closing = _closing(template, at)
        if closing is not None:
            if depth:
                raise fault(template, at, "unclosed left paren")
            found.append(Token("right", "}}", at))
            return closing
        match = _TOKEN.match(template, at)
        if match is None:
            raise fault(template, at, _no_token(template, at))
        kind = str(match.lastgroup)
        value = match[0]
        end = match.end()
        if kind == "space":
            if template.startswith("-}}", end):  # the last blank belongs to the trim marker
                end -= 1
                value = value[:-1]
                if not value:
                    at = end
                    continue
        elif kind in _WORDS and not template.startswith("}}", end):
            follows = template[end : end + 1]
            if kind == "number" and (follows == "_" or follows.isalnum()):
                raise fault(template, at, f"bad number syntax: {value + follows!r}")
            if kind != "number" and not _AFTER_WORD.match(template, end):
                raise fault(template, end, f"bad character {follows!r}")
        depth += (kind == "open") - (kind == "close")
        if depth < 0:
            raise fault(template, at, "unexpected right paren")
        if kind == "name" and value in KEYWORDS:
            kind = value
        found.append(Token(kind, value, at))
        at = end


def _no_token(template: str, at: int) -> str:
    char = template[at : at + 1]
    if not char:
        return "unclosed action"
    if char in "\"'`":
        return {"'": "unterminated character constant", '"': "unterminated quoted string"}.get(
            char, "unterminated raw quoted string"
        )
    if char == ":":
        return "expected :="
    return f"unexpected {char!r} in action"


def fault(template: str, at: int, why: str) -> TemplateError:
    line = template.count("\n", 0, at) + 1
    column = at - (template.rfind("\n", 0, at) + 1) + 1
    return TemplateError(f"line {line}, column {column}: {why}")


# --- constants -------------------------------------------------------------------------------
_SIMPLE = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92}
_ESCAPE = re.compile(
    r"\\(?:x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})"
    r"|(?P<o>[0-7]{3})|(?P<c>.))"
)


def unquoted(literal: str) -> str:
    """The string (or character) that a literal stands for. Raises ValueError."""
    mark, body = literal[0], literal[1:-1]
    if mark == "`":
        return body.replace("\r", "")
    data = bytearray()
    at = 0
    while at < len(body):
        if body[at] != "\\":
            data += body[at].encode("utf-8", "surrogateescape")
            at += 1
            continue
        match = _ESCAPE.match(body, at)
        if match is None:
            raise ValueError("invalid syntax")
        at = match.end()
        data += _escaped(match, mark)
    return text(bytes(data))


def _escaped(match: re.Match[str], mark: str) -> bytes:
    kind = str(match.lastgroup)
    value = match[kind]
    if kind == "c":
        if value == mark:
            return value.encode()
        if value in _SIMPLE:
            return bytes([_SIMPLE[value]])
        raise ValueError("invalid syntax")
    code = int(value, 8 if kind == "o" else 16)
    if kind in "xo":
        if code > 255:
            raise ValueError("invalid syntax")
        return bytes([code])
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise ValueError("invalid syntax")
    return chr(code).encode()


_INTEGER = re.compile(
    r"([+-]?)(?:0[xX]((?:_?[0-9a-fA-F])+)|0[bB]((?:_?[01])+)|0[oO]?((?:_?[0-7])+)"
    r"|(0|[1-9](?:_?[0-9])*))"
)
_FLOAT = re.compile(
    r"[+-]?(?:[0-9](?:_?[0-9])*\.?(?:[0-9](?:_?[0-9])*)?|\.[0-9](?:_?[0-9])*)"
    r"(?:[eE][+-]?[0-9](?:_?[0-9])*)?"
)


def number(literal: str) -> int | float:
    """An int, or a float if it is spelt like one. Raises ValueError."""
    if literal.startswith("'"):
        char = unquoted(literal)
        if len(char) != 1:
            raise ValueError(f"malformed character constant: {literal}")
        return ord(char)
    match = _INTEGER.fullmatch(literal)
    if match is not None:
        for digits, base in zip(match.groups()[1:], (16, 2, 8, 10), strict=True):
            if digits is not None:
                value = int(digits.replace("_", ""), base) * (-1 if match[1] == "-" else 1)
                if not -(1 << 63) <= value < 1 << 63:
                    raise ValueError(f"{literal} overflows int")
                return value
    if _FLOAT.fullmatch(literal):
        value_f = float(literal.replace("_", ""))
        if value_f - value_f:
            raise ValueError(f"{literal} is out of range")
        return value_f
    raise ValueError(f"bad number syntax: {literal!r}")
