"""TLS on an accepted connection: a transport of plain bytes for whoever speaks HTTP on it.

Owns the handshake and its time limit, records, half-closing, and the answer to a client that speaks
plain HTTP here (contract section 3.12). Which certificate is shown is the context's business.

Not asyncio's own TLS: the first bytes decide before the handshake begins, no task and no future is
made for a connection, and none of them holds a read buffer while it is idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Iterable
from typing import Any, cast

from weir.proxy import contract
from weir.proxy.wire.aside import put_aside
from weir.proxy.wire.clients import SPARE_SECONDS, TLS_BYTES
from weir.proxy.wire.flow import MEMORY, TURN, Flow
from weir.proxy.wire.server import ServerConnection
from weir.proxy.wire.turns import Turns

_log = logging.getLogger(__name__)

_HANDSHAKE = 0x16  # the type of a TLS record that begins one
_HTTP = frozenset(
    b"GET /|HEAD |POST |PUT /|PATCH|DELET|OPTIO|CONNE|TRACE|PRI *".split(b"|"),
)
_READ_BYTES = 256 << 10
_PIECE_BYTES = 64 << 10
"""What goes through OpenSSL's buffers at once: they keep the size they once had."""
_HANDSHAKE_BYTES = 64 << 10
"""A handshake may have so much, about: chains of certificates are far below."""
_YOUNG_BYTES = TLS_BYTES + (4 * _HANDSHAKE_BYTES)
"""What one may take: OpenSSL makes room for a message as long as was announced, and what came of it
is there twice."""
LINGER_SECONDS = 0.5
"""How long a refused client may go on sending, so that it reads the refusal and not a reset."""


class SecureServer(asyncio.Protocol):
    """A client's connection below TLS; the protocol above it, of `make`, reads once that stands.

    It is made at once all the same, and told when it comes to nothing: whoever asks how many
    clients there are, or tells them to go, means those that still shake hands, too.

    `done` hears, once, that the handshake has come to an end, good or bad; it has `patience`
    seconds. Handshakes go on in `turns`: a thousand that come at once are a second of work.
    """

    __slots__ = (
        "_done",
        "_first",
        "_flow",
        "_incoming",
        "_most",
        "_object",
        "_outgoing",
        "_patience",
        "_protocol",
        "_refused",
        "_taken",
        "_timer",
        "_transport",
        "_turns",
        "_unwanted",
        "_upper",
        "context",
    )

    def __init__(
        self,
        context: ssl.SSLContext,
        make: Callable[[], asyncio.Protocol],
        done: Callable[[SecureServer], None],
        patience: float | None = None,
        turns: Turns | None = None,
    ) -> None:
        self._turns = Turns() if turns is None else turns
        self._patience = contract.READ_HEAD_SECONDS if patience is None else patience
        self.context = context
        self._protocol: asyncio.Protocol | None = make()  # until the one above it has it
        if isinstance(self._protocol, ServerConnection):
            self._protocol.below = self
        self._done = done
        self._taken = 0  # bytes of the handshake
        self._most = 0  # that waited for OpenSSL at a time: its buffer keeps that size
        self._first = b""
        self._refused = False
        self._unwanted = False
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._upper: SecureTransport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object: ssl.SSLObject | None = None

    def abort(self) -> None:
        """Accepting a connection and making it are two steps: it may come between them."""
        self._unwanted = True
        transport: asyncio.Transport | None = self._transport
        if transport is not None:
            transport.abort()

    def spare(self, now: float) -> bool:
        """Close, if the handshake goes on for longer than it should take. Whether it does."""
        timer = self._timer
        if self._refused or timer is None or now < timer.when() - self._patience + SPARE_SECONDS:
            return False
        self._transport.abort()
        return True

    def weigh(self) -> int:
        """Bytes of memory, about; 0 for one that is ending."""
        transport: asyncio.Transport | None = self._transport
        if transport is None or transport.is_closing():
            return 0
        if self._upper is None:
            return len(self._first) + (0 if self._object is None else _YOUNG_BYTES)
        return TLS_BYTES + self._most * 4 // 3

    def hold(self, held: bool) -> None:
        """Read no handshake, for want of memory; or go on."""
        transport: asyncio.Transport | None = self._transport
        if transport is None:
            return
        if held and self._upper is None:
            self._flow.hold(MEMORY)
        else:
            self._flow.release(MEMORY)

    # --- asyncio ---------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._flow = Flow(self._transport)
        if self._unwanted:
            self._transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._patience, self.abort)

    def data_received(self, data: bytes) -> None:
        if self._upper is not None and len(data) <= self._most:
            self._incoming.write(data)
            self._upper.pump()
        elif self._upper is not None:
            self._take(data)
        elif self._object is not None:
            self._wait(data)
        elif not self._refused:
            self._begin(self._first + data)

    def eof_received(self) -> bool:
        if self._upper is None:
            self._transport.close()
        else:
            self._incoming.write_eof()
            self._upper.pump()
        return True  # the transport is closed by us, or by whoever is above

    def connection_lost(self, error: Exception | None) -> None:
        self._settled()
        self._first = b""
        upper, self._upper = self._upper, None
        protocol, self._protocol = self._protocol, None
        if upper is not None:
            upper.lost(error)
        elif protocol is not None:
            protocol.connection_lost(error)

    def pause_writing(self) -> None:
        if self._upper is not None:
            self._upper.protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._upper is not None:
            self._upper.protocol.resume_writing()

    def _take(self, data: bytes) -> None:
        """Of the handshake, or more than ever before."""
        self._most = max(self._most, min(len(data), _PIECE_BYTES))
        for start in range(0, len(data), _PIECE_BYTES):
            self._incoming.write(data[start : start + _PIECE_BYTES])
            if self._upper is not None:
                self._upper.pump()
            elif self._object is not None and not self._transport.is_closing():
                self._taken += min(len(data) - start, _PIECE_BYTES)
                self._shake_hands(self._object)
        if self._incoming.pending > self._most:  # nobody wants to read now
            put_aside(self._incoming.pending - self._most)
            self._most = self._incoming.pending

    # --- the beginning -----------------------------------------------------------------------
    def _begin(self, data: bytes) -> None:
        if data[0] == _HANDSHAKE:
            self._wait(data)
        elif len(data) < 5:
            self._first = data
        else:
            self._refuse(data)

    def _wait(self, data: bytes) -> None:
        put_aside(len(data))
        self._first = data
        self._flow.hold(TURN)
        self._turns.wait(self)

    def go_on(self, turns: Turns) -> bool:
        """Its turn has come: take what the client said of its handshake."""
        turns.left = 0  # it takes a millisecond
        data, self._first = self._first, b""
        if not self._transport.is_closing():
            if self._object is None:
                put_aside(_YOUNG_BYTES)
                self._object = self.context.wrap_bio(self._incoming, self._outgoing, True)
            self._flow.release(TURN)
            self._take(data)
        return False

    def _refuse(self, data: bytes) -> None:
        """Say so to plain HTTP, nothing to anything else; then read on for a moment."""
        self._refused = True
        self._settled()
        if data[:5] not in _HTTP:
            self._transport.abort()
            return
        self._transport.write(contract.HTTP_TO_TLS)
        self._transport.write_eof()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(LINGER_SECONDS, self.abort)

    def _shake_hands(self, connection: ssl.SSLObject) -> None:
        try:
            connection.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            if self._taken > _HANDSHAKE_BYTES:
                self._transport.abort()
            return
        except ssl.SSLError as error:
            _log.debug("TLS handshake error: %s", error)
            self._flush()  # an alert, if there is one
            self._settled()
            self._transport.close()
            return
        self._flush()
        self._settled()
        self._flow.release(MEMORY)
        protocol, self._protocol = self._protocol, None
        assert protocol is not None
        upper = SecureTransport(self, self._transport, connection, self._outgoing, protocol)
        self._upper = upper
        upper.protocol.connection_made(upper)
        upper.pump()  # what came behind the handshake, maybe with it

    def _flush(self) -> None:
        if self._outgoing.pending and not self._transport.is_closing():
            self._transport.write(self._outgoing.read())

    def _settled(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._done is not _nothing:
            self._done(self)
            self._done = _nothing


def _nothing(connection: SecureServer) -> None:
    pass


class SecureTransport(asyncio.Transport):
    """What is written here goes out in records; what comes in is given to `protocol`."""

    __slots__ = (
        "_below",
        "_closing",
        "_ended",
        "_object",
        "_outgoing",
        "_paused",
        "_transport",
        "protocol",
    )

    def __init__(
        self,
        below: SecureServer,
        transport: asyncio.Transport,
        connection: ssl.SSLObject,
        outgoing: ssl.MemoryBIO,
        protocol: asyncio.Protocol,
    ) -> None:
        super().__init__()
        self._below = below
        self._transport = transport
        self._object = connection
        self._outgoing = outgoing
        self._paused = False
        self._closing = False
        self._ended = False
        self.protocol = protocol

    # --- for the protocol above ----------------------------------------------------------------
    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing:
            return
        for start in range(0, len(data), _PIECE_BYTES):
            try:
                self._object.write(data[start : start + _PIECE_BYTES])
            except ssl.SSLError as error:  # after write_eof, or the client broke the connection
                self._broken(error)
                return
            self._transport.write(self._outgoing.read())

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))  # one record instead of several

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Nothing more comes from us; what the client still sends is read."""
        if not self._closing and not self._ended:
            self._ended = True
            self._say_goodbye()
            self._transport.write_eof()

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._ended:
                self._say_goodbye()
            self._transport.close()

    def abort(self) -> None:
        self._closing = True
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def is_reading(self) -> bool:
        return not self._paused and not self.is_closing()

    def pause_reading(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
            asyncio.get_running_loop().call_soon(self.pump)  # records that are here already

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = cast(asyncio.Protocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "sslcontext":
            return self._below.context
        if name == "ssl_object":
            return self._object
        if name == "weight":
            return self._below.weigh()
        return self._transport.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._transport.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._transport.set_write_buffer_limits(high, low)

    # --- for the connection below ----------------------------------------------------------------
    def pump(self) -> None:
        """Give the protocol what can be read, as long as it wants it."""
        while not self._paused and not self.is_closing():
            try:
                data, ended = self._read()
            except ssl.SSLError as error:
                self._broken(error)
                return
            if self._outgoing.pending:  # a key update is answered
                self._transport.write(self._outgoing.read())
            if data:
                self.protocol.data_received(data)
            elif ended:
                if not self.protocol.eof_received():
                    self.close()
                return
            else:
                return

    def lost(self, error: Exception | None) -> None:
        self._closing = True
        protocol, self.protocol = self.protocol, cast(asyncio.Protocol, None)
        protocol.connection_lost(error)  # and nothing is left in a cycle of references

    def _read(self) -> tuple[bytes, bool]:
        """Everything that can be read now, at most a certain amount; and is it the end?"""
        pieces: list[bytes] = []
        size = 0
        ended = False
        try:
            while size < _READ_BYTES:
                piece = self._object.read(_READ_BYTES)
                if not piece:
                    ended = True
                    break
                pieces.append(piece)
                size += len(piece)
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):  # with or without a goodbye
            ended = True
        return b"".join(pieces) if len(pieces) != 1 else pieces[0], ended

    def _say_goodbye(self) -> None:
        with contextlib.suppress(ssl.SSLError):  # it wants to wait for the client's goodbye
            self._object.unwrap()
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())

    def _broken(self, error: ssl.SSLError) -> None:
        _log.debug("TLS error: %s", error)
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())
        self._closing = True
        self._transport.close()
