"""Header fields of HTTP/1 messages: judged strictly, found by name, kept byte for byte.

llhttp (httptools) judges a header block, so everything a request smuggler likes (obs-fold, bare CR
or LF, blanks before a colon, two lengths, a length beside a transfer coding) ends in `Malformed`.
What llhttp accepted is safe to search for lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from weir.proxy import contract

HEAD_END: Final = b"\r\n\r\n"

_LISTS = contract.HOP_BY_HOP | {b"x-forwarded-for"}
_ONCE = frozenset({b"host", b"content-length"})
PLAIN_TOKENS = frozenset({b"close", b"keep-alive", b"upgrade", b""})
"""What Connection may say without naming a field to remove."""
NO_TOKENS: frozenset[bytes] = frozenset()
_KEEP_ALIVE = frozenset({b"keep-alive"})
_MAX_TOKENS = 1000
_NAMES = dict[bytes, bytes]()
"""Names of the fields that are searched for, in lower case, by how they are mostly spelled."""


class Malformed(ValueError):
    """The peer broke HTTP. `status` and `reason` are what a client of ours is told."""

    def __init__(self, why: str, status: int = 400, reason: bytes = b"Bad Request") -> None:
        super().__init__(why)
        self.status = status
        self.reason = reason


def _any_of(names: Iterable[bytes]) -> bytes:
    """A pattern for any of the names, branching on the first letter so that it fails fast."""
    initials: dict[bytes, list[bytes]] = {}
    for name in sorted(names):
        initials.setdefault(name[:1], []).append(re.escape(name[1:]))
    groups = (initial + b"(?:" + b"|".join(rest) + b")" for initial, rest in initials.items())
    return b"(?i:" + b"|".join(groups) + b")"


def fields_of(names: Iterable[bytes]) -> re.Pattern[bytes]:
    """For `understood`: finds name and value of each field of these (lower-case) names."""
    _NAMES.update((spelled, name) for name in names for spelled in (name, name.title()))
    return re.compile(rb"\r\n(" + _any_of(names) + rb"):[ \t]*([^\r]*)")


def lines_of(names: Iterable[bytes]) -> re.Pattern[bytes]:
    """Matches the whole lines of these fields, each with the CRLF before it."""
    return re.compile(rb"\r\n" + _any_of(names) + rb":[^\r]*")


class _Silent:
    """llhttp's callbacks, all absent: it only judges."""

    on_url: None = None
    on_status: None = None
    on_header: None = None
    on_body: None = None
    on_message_begin: None = None
    on_headers_complete: None = None
    on_message_complete: None = None
    on_chunk_header: None = None
    on_chunk_complete: None = None


_SILENT = _Silent()


def check_fields(block: bytes) -> None:
    """Raise Malformed unless the block (lines ending CRLF, then an empty one) is strictly valid."""
    try:
        HttpRequestParser(_SILENT).feed_data(b"PUT / HTTP/1.1\r\n" + block)
    except HttpParserUpgrade:
        pass  # only says that the head asks for an upgrade
    except HttpParserError as error:
        raise Malformed(str(error)) from None


def understood(fields: re.Pattern[bytes], data: bytes, end: int) -> dict[bytes, bytes]:
    """Check the header block behind `end` (of the first line); the fields that mean something."""
    check_fields(data[end + 2 :])
    seen: dict[bytes, bytes] = {}
    lists: dict[bytes, list[bytes]] | None = None
    found: list[tuple[bytes, bytes]] = fields.findall(data, end)
    for name, value in found:
        name = _NAMES.get(name) or name.lower()
        if name not in seen:
            seen[name] = value.rstrip()
        elif name in _LISTS:  # joined once: a head may have fifty thousand of them
            lists = {} if lists is None else lists
            lists.setdefault(name, [seen[name]]).append(value.rstrip())
        elif name in _ONCE:
            raise Malformed(f"more than one {name.decode()}")
    if lists is not None:
        for name, values in lists.items():
            seen[name] = b", ".join(values)
    return seen


def tokens_of(connection: bytes) -> frozenset[bytes]:
    """The tokens of a Connection field. Raises Malformed: they take fifty times its memory."""
    if connection.count(b",") > _MAX_TOKENS:
        raise Malformed("too many tokens in Connection")
    connection = connection.lower()
    if connection == b"keep-alive":
        return _KEEP_ALIVE
    return frozenset([token.strip() for token in connection.split(b",")])


def without(data: bytes, tokens: frozenset[bytes]) -> bytes:
    """The head without the fields that Connection names, but never without its framing."""
    named = tokens - PLAIN_TOKENS - _ONCE
    first, *lines = data[:-4].split(b"\r\n")
    kept = (line for line in lines if line.partition(b":")[0].lower() not in named)
    return b"\r\n".join([first, *kept, b"", b""])


def transfer_coding(seen: dict[bytes, bytes], minor: int) -> bool:
    """Is the body chunked? Raises Malformed for every other coding."""
    coding = seen.get(b"transfer-encoding")
    if coding is None:
        return False
    if coding.lower() != b"chunked":
        raise Malformed(
            f"transfer coding {coding.decode('latin-1')} is not chunked", 501, b"Not Implemented"
        )
    if not minor:
        raise Malformed("transfer coding in an HTTP/1.0 message")
    return True
