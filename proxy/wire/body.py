"""Bodies of HTTP/1 messages: where one ends, and how it is framed for the next hop.

Each reader takes bytes as they come and gives back payload; sans-I/O, so any split of a stream
gives the same result. Chunk extensions are dropped, as every hop may.
"""

from __future__ import annotations

import re
from typing import Protocol

from weir.proxy import contract
from weir.proxy.wire.fields import Malformed, check_fields

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_MAX_SIZE_LINE = 4096
_MAX_TRAILERS = 4096
"""As Go's: nothing of a connection is weighed that is so little."""
_NEVER_IN_TRAILERS = contract.HOP_BY_HOP | {b"host", b"content-length", contract.ORIGINAL_HOST}


class BodyReader(Protocol):
    """`feed` gives payload and, once the body has ended, the bytes behind it (None before)."""

    trailers: list[bytes]
    endless: bool

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]: ...


class LengthBody:
    """Content-Length bytes."""

    __slots__ = ("left", "trailers")
    endless = False

    def __init__(self, length: int) -> None:
        self.left = length
        self.trailers: list[bytes] = []

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        size = len(data)
        left = self.left
        if size < left:
            self.left = left - size
            return data, None
        self.left = 0
        if size == left:
            return data, b""
        return data[:left], data[left:]


class EndlessBody:
    """Everything until the connection ends; whoever sees that end decides whether it was one."""

    __slots__ = ("trailers",)
    endless = True

    def __init__(self) -> None:
        self.trailers: list[bytes] = []

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        return data, None


class ChunkedBody:
    """The chunked transfer coding, read strictly: CRLF only, sizes of at most 15 digits.

    After the end, `trailers` holds the lines that the next hop may see. Raises Malformed.
    """

    __slots__ = ("_left", "_rest", "trailers")
    endless = False

    _TRAILERS = -1  # the last chunk was read, its trailer section was not

    def __init__(self) -> None:
        self._rest = b""
        self._left = 0  # of the current chunk and the CRLF behind it
        self.trailers: list[bytes] = []

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        payload: list[bytes] = []
        at = 0
        while True:
            if self._left == self._TRAILERS:
                end = self._trailers_end(data, at)
                if end < 0:
                    self._rest = data[at:]
                    return b"".join(payload), None
                return b"".join(payload), data[end:]
            at = self._chunk(data, at, payload) if self._left else self._size(data, at)
            if at < 0:
                return b"".join(payload) if len(payload) != 1 else payload[0], None

    def _size(self, data: bytes, at: int) -> int:
        end = data.find(b"\r\n", at)
        if end < 0:
            self._rest = data[at:]
            if len(self._rest) > _MAX_SIZE_LINE or b"\n" in self._rest:
                raise Malformed("chunk size line")
            return -1
        match = _SIZE_LINE.fullmatch(data, at, end)
        if match is None or end - at > _MAX_SIZE_LINE:
            raise Malformed("chunk size line")
        size = int(match[1], 16)
        self._left = size + 2 if size else self._TRAILERS
        return end + 2

    def _chunk(self, data: bytes, at: int, payload: list[bytes]) -> int:
        """Take what there is of the chunk; its CRLF may be cut anywhere."""
        left = self._left
        have = len(data) - at
        if left > 2 and have:
            piece = data[at : at + min(have, left - 2)]
            payload.append(piece)
            at += len(piece)
            have -= len(piece)
            left -= len(piece)
        self._left = left
        if left > 2 or not have:
            return -1
        if data[at : at + left] != b"\r\n"[2 - left : 2 - left + have]:
            raise Malformed("no CRLF behind a chunk")
        if have < left:
            self._left = left - have
            return -1
        self._left = 0
        return at + left

    def _trailers_end(self, data: bytes, at: int) -> int:
        """Index behind the trailer section, or -1 when it is not whole."""
        if data.startswith(b"\r\n", at):
            return at + 2
        end = data.find(b"\r\n\r\n", at)
        if end < 0:
            if len(data) - at > _MAX_TRAILERS:
                raise Malformed("trailer section too long")
            return -1
        block = data[at : end + 4]
        check_fields(block)
        for line in block[:-4].split(b"\r\n"):
            if line.partition(b":")[0].lower() not in _NEVER_IN_TRAILERS:
                self.trailers.append(line)
        return end + 4


def reader(length: int | None) -> BodyReader:
    """The reader for a head's `length`: a number, None for chunked, -1 for endless."""
    if length is None:
        return ChunkedBody()
    return EndlessBody() if length < 0 else LengthBody(length)


def chunk(payload: bytes) -> list[bytes]:
    """One chunk, as buffers for `writelines`; nothing for an empty payload, which would end it."""
    return [b"%x\r\n" % len(payload), payload, b"\r\n"] if payload else []


def last_chunk(trailers: list[bytes]) -> bytes:
    if not trailers:
        return b"0\r\n\r\n"
    return b"\r\n".join([b"0", *trailers, b"\r\n"])
