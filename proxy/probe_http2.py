"""A client that makes one HTTP/2 call on a connection of its own, by prior knowledge.

Owns the few frames that takes and reads responses of an encoder that was told to keep no table
(RFC 9113, RFC 7541). It is for probes: small, never concurrent, and it believes nothing. What is
asked and which answers are good is the business of `probe_http` and `probe_grpc`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import cast

from weir.proxy import contract
from weir.proxy.wire.connection import TransportError

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _CONTINUATION = 0, 1, 3, 4, 6, 7, 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_MAX_FRAME = 16384  # what we leave the peer's frames at, and ours
_MAX_BLOCK = 64 << 10
# no table for what we are sent, nothing pushed
_OUR_SETTINGS = struct.pack("!HIHI", 0x1, 0, 0x2, 0)
_NOT_SENT = contract.HOP_BY_HOP | {b"host", b"user-agent"}
_STATUSES = (200, 204, 206, 304, 400, 404, 500)  # entries 8 to 14 of the static table
_STATIC_ENTRIES = 61

# RFC 7541's Huffman code is canonical, so the lengths say it all: A is 5 bits, Z is 30
_LENGTHS = (
    "ISXXXXXXXTZXXZXXXXXXXXZXXXXXXXXXBFFHIBDGFFDGDBBBAAABBBBBBBCDKBHF"
    "IBCCCCCCCCCCCCCCCCCCCCCCDCDIOIJBKABABABBBACCBBBABCBAABCCCCCKGJIX"
    "PRPPRRRSRSSSSSTSTTRSTSSSSQRSRSSTRQPRRSSQSRRTQRSSQQRQSRSSPRRRSRRS"
    "VVPORSRUVVVWWVTUOQVWWVWTQQVVXWWWPTPQRQQSRRUUTTVSVWVVWWWWWXWWWWWV"
)


class Response:
    """What came back. `headers` are those of the response, `trailers` those behind its body."""

    __slots__ = ("body", "headers", "status", "trailers")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.trailers: dict[bytes, bytes] = {}
        self.body = b""


async def get(
    sock: socket.socket, authority: str, target: str, headers: tuple[tuple[str, str], ...]
) -> int:
    """The status of a GET. The socket is connected, and closed at the end.

    Raises TransportError, also when the peer speaks no HTTP/2.
    """
    fields = [
        (":method", "GET"),
        (":scheme", "http"),
        (":authority", authority),
        (":path", target),
        ("user-agent", contract.PROBE_AGENT.decode()),
        *(
            (name.lower(), value)
            for name, value in headers
            if name.lower().encode() not in _NOT_SENT
        ),
    ]
    if not any(name == "accept-encoding" for name, _ in fields):
        fields.append(("accept-encoding", "gzip"))
    return (await call(sock, fields, None, whole=False)).status


async def call(
    sock: socket.socket, fields: list[tuple[str, str]], body: bytes | None, *, whole: bool
) -> Response:
    """One request and its response: `whole`, or as soon as its status is known.

    The socket is connected, and closed at the end. Raises TransportError.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Response] = loop.create_future()
    try:
        _, protocol = await loop.create_connection(
            lambda: _Call(_request(fields, body), whole, done), sock=sock
        )
    except BaseException:
        sock.close()
        raise
    try:
        return await done
    finally:
        protocol.leave()


def _request(fields: list[tuple[str, str]], body: bytes | None) -> bytes:
    block = b"".join(
        b"\0" + _string(name.encode()) + _string(value.encode()) for name, value in fields
    )
    end = _END_STREAM if body is None else 0
    first, *more = [block[i : i + _MAX_FRAME] for i in range(0, len(block), _MAX_FRAME)]
    frames = [_frame(_HEADERS, end | (0 if more else _END_HEADERS), 1, first)]
    for i, piece in enumerate(more, 1):
        frames.append(_frame(_CONTINUATION, _END_HEADERS if i == len(more) else 0, 1, piece))
    if body is not None:
        frames.append(_frame(_DATA, _END_STREAM, 1, body))
    return _PREFACE + _frame(_SETTINGS, 0, 0, _OUR_SETTINGS) + b"".join(frames)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack("!BHBBI", len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + (
        payload
    )


def _string(text: bytes) -> bytes:
    """A string literal, never Huffman-coded."""
    length = len(text)
    if length < 127:
        return bytes((length,)) + text
    octets = [127]
    length -= 127
    while length >= 128:
        octets.append(length % 128 + 128)
        length //= 128
    return bytes((*octets, length)) + text


class _Call(asyncio.Protocol):
    """Stream 1 of a connection, and what the connection itself needs meanwhile."""

    def __init__(self, request: bytes, whole: bool, done: asyncio.Future[Response]) -> None:
        self._request = request
        self._whole = whole
        self._done = done
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._rest = b""
        self._settled = False  # the peer's settings have come, so it does speak HTTP/2
        self._block: bytearray | None = None
        self._ends = False
        self._response = Response()

    def leave(self) -> None:
        """Nobody waits any more: close, in an orderly way if the answer has come."""
        if not self._done.done() or self._done.cancelled() or self._done.exception():
            self._transport.abort()
        elif not self._transport.is_closing():
            self._transport.write(_frame(_GOAWAY, 0, 0, bytes(8)))
            self._transport.close()

    # --- asyncio ---------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        at = 0
        try:
            while len(data) - at >= 9 and not self._done.done():
                high, low, kind, flags, stream = struct.unpack_from("!BHBBI", data, at)
                length = high << 16 | low
                if (not self._settled and kind != _SETTINGS) or length > _MAX_FRAME:
                    raise TransportError("the answer is no HTTP/2", sent=True)
                if len(data) - at - 9 < length:
                    break
                at += 9 + length
                self._settled = True
                self._take(kind, flags, stream & 0x7FFFFFFF, data[at - length : at])
        except (IndexError, struct.error):
            self._fail("malformed HTTP/2")
        except TransportError as error:
            if not self._done.done():
                self._done.set_exception(error)
        self._rest = data[at:]

    def eof_received(self) -> None:
        self._fail("EOF")

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(str(error) if error else "EOF")

    # --- frames ------------------------------------------------------------------------------
    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block is not None and kind != _CONTINUATION:
            raise TransportError("a header block is interrupted", sent=True)
        if kind == _SETTINGS:
            if not flags & _ACK:
                self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING:
            if not flags & _ACK:
                self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _GOAWAY:
            last, code = struct.unpack_from("!II", payload)
            if last & 0x7FFFFFFF < 1:
                raise TransportError(f"GOAWAY, error {code}", sent=True)
        elif stream == 1:
            self._take_of_stream(kind, flags, payload)

    def _take_of_stream(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == _RESET:
            raise TransportError(
                f"stream reset, error {int.from_bytes(payload[:4], 'big')}", sent=True
            )
        if kind in (_DATA, _HEADERS) and flags & _PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        if kind == _DATA:
            self._response.body += payload
            if len(self._response.body) > _MAX_BLOCK:
                raise TransportError("too much of a response", sent=True)
            if flags & _END_STREAM:
                self._over()
        elif kind == _HEADERS:
            self._ends = bool(flags & _END_STREAM)
            self._block = bytearray(payload[5:] if flags & _PRIORITY else payload)
        elif kind == _CONTINUATION:
            if self._block is None:
                raise TransportError("a CONTINUATION of nothing", sent=True)
            self._block += payload
        if kind in (_HEADERS, _CONTINUATION) and self._block is not None:
            if len(self._block) > _MAX_BLOCK:
                raise TransportError("too many headers", sent=True)
            if flags & _END_HEADERS:
                block, self._block = bytes(self._block), None
                self._fields(dict(_Block(block).fields()))

    def _fields(self, fields: dict[bytes, bytes]) -> None:
        response = self._response
        if response.status:
            response.trailers = fields
        else:
            status = fields.get(b":status", b"")
            if not status.isdigit() or len(status) != 3:
                raise TransportError("a response without status", sent=True)
            if int(status) < 200:
                return  # interim
            response.status = int(status)
            response.headers = fields
        if self._ends:
            self._over()
        elif not self._whole:
            self._done.set_result(response)

    def _over(self) -> None:
        if not self._response.status:
            raise TransportError("a response without status", sent=True)
        self._done.set_result(self._response)

    def _fail(self, why: str) -> None:
        if not self._done.done():
            self._done.set_exception(TransportError(why, sent=True))


class _Block:
    """A header block from an encoder without a dynamic table."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def fields(self) -> list[tuple[bytes, bytes]]:
        """Raises TransportError or IndexError. Names of the static table other than :status, which
        tell a probe nothing, are left out."""
        fields = []
        while self._at < len(self._data):
            first = self._data[self._at]
            if first & 0x80:
                index = self._integer(7)
                if 8 <= index <= 14:
                    fields.append((b":status", b"%d" % _STATUSES[index - 8]))
                elif not 0 < index <= _STATIC_ENTRIES:
                    raise TransportError("an entry of the table that was refused", sent=True)
                continue
            if first & 0xE0 == 0x20:  # the table's size
                self._integer(5)
                continue
            index = self._integer(6 if first & 0x40 else 4)
            if index > _STATIC_ENTRIES:
                raise TransportError("a name of the table that was refused", sent=True)
            name = self._text() if not index else b":status" if 8 <= index <= 14 else b""
            value = self._text()
            if name:
                fields.append((name, value))
        return fields

    def _integer(self, bits: int) -> int:
        limit = (1 << bits) - 1
        value = self._data[self._at] & limit
        self._at += 1
        if value < limit:
            return value
        for shift in range(0, 28, 7):
            octet = self._data[self._at]
            self._at += 1
            value += (octet & 0x7F) << shift
            if octet < 0x80:
                return value
        raise TransportError("an integer without end", sent=True)

    def _text(self) -> bytes:
        coded = bool(self._data[self._at] & 0x80)
        length = self._integer(7)
        text = self._data[self._at : self._at + length]
        self._at += length
        if len(text) != length:
            raise TransportError("a string without end", sent=True)
        return _plain(text) if coded else text


_codes: dict[tuple[int, int], int] = {}


def _plain(coded: bytes) -> bytes:
    """What a Huffman-coded string says."""
    if not _codes:
        code = length = 0
        for bits, symbol in sorted((ord(letter) - 60, i) for i, letter in enumerate(_LENGTHS)):
            code <<= bits - length
            length = bits
            _codes[bits, code] = symbol
            code += 1
    text = bytearray()
    code = bits = 0
    for octet in coded:
        for shift in range(7, -1, -1):
            code = code << 1 | octet >> shift & 1
            bits += 1
            found = _codes.get((bits, code))
            if found is not None:
                text.append(found)
                code = bits = 0
            elif bits > 30:
                raise TransportError("a Huffman code that does not exist", sent=True)
    if bits > 7 or code != (1 << bits) - 1:
        raise TransportError("a Huffman code that does not end", sent=True)
    return bytes(text)
