"""Heads of HTTP/1 responses: read strictly, kept byte for byte, rewritten for the next hop."""

from __future__ import annotations

import re

from weir.proxy import contract
from weir.proxy.wire.fields import (
    HEAD_END,
    NO_TOKENS,
    PLAIN_TOKENS,
    Malformed,
    fields_of,
    lines_of,
    tokens_of,
    transfer_coding,
    understood,
    without,
)

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_REMEMBERED_BYTES = 1024
_REMEMBERED_HEADS = 64
_HOP = contract.HOP_BY_HOP
_RESPONSE_FIELDS = fields_of(_HOP | {b"content-length", b"date"})
_LINES_NOT_FOR_CLIENT = lines_of(_HOP)


class ResponseHead:
    """A response as the user container or a sink gave it.

    `length` is the body's length, None when it is chunked, -1 when the end of the connection ends
    it; the request's method decides, because HEAD has none.
    """

    __slots__ = (
        "_data",
        "_headers",
        "_rendered",
        "_rendered_for",
        "_tokens",
        "close",
        "length",
        "seen",
        "status",
        "upgrade",
    )

    def __init__(self, data: bytes, method: bytes) -> None:
        """Raises Malformed. `data` is one whole head with the empty line that ends it."""
        end = data.find(b"\r\n")
        self.status, minor = _STATUS_LINES[data[:end]]
        self._data = data
        self._headers: tuple[tuple[bytes, bytes], ...] | None = None
        self._rendered = b""
        self._rendered_for: tuple[int, bool, bool, bytes] | None = None
        self.seen = seen = understood(_RESPONSE_FIELDS, data, end)
        connection = seen.get(b"connection")
        self._tokens = tokens = NO_TOKENS if connection is None else tokens_of(connection)
        self.close = b"close" in tokens if minor else b"keep-alive" not in tokens
        self.upgrade: bytes | None = seen.get(b"upgrade") if b"upgrade" in tokens else None
        self.length: int | None
        status = self.status
        if method == b"HEAD" or status < 200 or status == 204 or status == 304:
            self.length = 0
        elif transfer_coding(seen, minor):
            self.length = None
        else:
            length = seen.get(b"content-length")
            self.length = int(length) if length else -1

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """All header fields, names in lower case, in the order they came."""
        if self._headers is None:
            pairs = []
            for line in self._data[:-4].split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                pairs.append((name.lower(), value.strip()))
            self._headers = tuple(pairs)
        return self._headers

    def for_client(self, minor: int, keep: bool, chunked: bool, date: bytes) -> bytes:
        """The head for a client of HTTP/1.`minor`, whose connection stays open or not.

        `date` is the line to use when the response brings none.
        """
        key = (minor, keep, chunked, date)
        if self._rendered_for != key:
            self._rendered = self._render(minor, keep, chunked, date)
            self._rendered_for = key
        return self._rendered

    def _render(self, minor: int, keep: bool, chunked: bool, date: bytes) -> bytes:
        added = [] if b"date" in self.seen else [date]
        if chunked:
            added.append(b"Transfer-Encoding: chunked")
            if b"trailer" in self.seen:
                added.append(b"Trailer: " + self.seen[b"trailer"])
        if not keep:
            if minor:
                added.append(b"Connection: close")
        elif not minor:
            added.append(b"Connection: keep-alive")
        return self._end_to_end(minor, added)

    def for_interim(self) -> bytes:
        """The head of a 1xx that is passed on."""
        return self._end_to_end(1, [])

    def for_switching(self) -> bytes:
        """The head of a 101, with the fields that make it one."""
        return self._end_to_end(1, [b"Connection: Upgrade", b"Upgrade: " + (self.upgrade or b"")])

    def _end_to_end(self, minor: int, added: list[bytes]) -> bytes:
        data = self._data
        if not minor:
            data = b"HTTP/1.0" + data[8:]
        elif data.startswith(b"HTTP/1.0"):
            data = b"HTTP/1.1" + data[8:]
        if not _HOP.isdisjoint(self.seen):
            data = _LINES_NOT_FOR_CLIENT.sub(b"", data)
            if not self._tokens <= PLAIN_TOKENS:
                data = without(data, self._tokens)
        if not added:
            return data
        return data[:-2] + b"\r\n".join(added) + HEAD_END


class ResponseHeads(dict[bytes, ResponseHead]):
    """The heads of one server, by their bytes.

    A server that answers many times within a second mostly sends the same head: Date has seconds.
    Not for responses to HEAD, whose body depends on more than the bytes.
    """

    def __missing__(self, data: bytes) -> ResponseHead:
        head = ResponseHead(data, b"")
        if len(data) <= _REMEMBERED_BYTES:
            if len(self) >= _REMEMBERED_HEADS:
                self.clear()
            self[data] = head
        return head


class _StatusLines(dict[bytes, tuple[int, int]]):
    """Status and minor version of a status line; a server has few of them, so they are kept."""

    def __missing__(self, line: bytes) -> tuple[int, int]:
        match = _STATUS_LINE.fullmatch(line)
        if match is None:
            raise Malformed("status line")
        parsed = int(match[2]), 1 if match[1] == b"1" else 0
        if len(self) < 256 and len(line) < 128:
            self[line] = parsed
        return parsed


_STATUS_LINES = _StatusLines()
