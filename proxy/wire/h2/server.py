"""An HTTP/2 connection that a client opened: its streams are handed to the Service one by one.

Owns what a client may do (numbers, limits, lengths of bodies), and the end of the connection. What
is answered is the business of the Service and of the exchange that it sets on the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from struct import iter_unpack
from typing import Any, Protocol

from weir.proxy import contract
from weir.proxy.wire import answers
from weir.proxy.wire.clients import SPARE_SECONDS
from weir.proxy.wire.connection import plain_address
from weir.proxy.wire.h2 import frames
from weir.proxy.wire.h2.endpoint import Endpoint, Fault
from weir.proxy.wire.h2.head import MalformedBlock, StreamHead, trailers
from weir.proxy.wire.h2.hpack import Block, encode
from weir.proxy.wire.h2.sending import STREAM_WINDOW, StreamBase
from weir.proxy.wire.head import RequestHead
from weir.proxy.wire.server import LINGER_SECONDS

MAX_STREAMS = 250
_RESETS = 500
_RESETS_PER_SECOND = 10.0
"""How many streams may a client give up before they were answered, at once and for long."""
_LAST_STREAM = (1 << 31) - 1
_SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"


class Exchange(Protocol):
    """A proxied request on a stream. `status` is 0 until its response began."""

    status: int

    def request_more(self, piece: bytes, ended: bool) -> None: ...

    def request_trailers(self, block: bytes) -> None: ...

    def client_lost(self) -> None: ...

    def response_sent(self) -> None:
        """The last byte of the response was written."""


Service = Callable[["ClientStream", StreamHead, bool], None]
"""Takes a request: its head, and whether it has no body."""


class ClientStream(StreamBase["ClientConnection"]):
    """One request. `exchange` is told when the client leaves, `proxied` gets the body as well."""

    __slots__ = ("_left", "exchange", "proxied")

    def __init__(self, connection: ClientConnection, number: int, length: int | None) -> None:
        super().__init__(connection, number, connection.initial_window)
        self.exchange: Any = None
        self.proxied: Exchange | None = None
        self._left = length

    @property
    def peer(self) -> bytes:
        return self.connection.peer

    @property
    def peer_port(self) -> int:
        return self.connection.peer_port

    @property
    def tls(self) -> bool:
        return self.connection.tls

    def answer(self, head: StreamHead | RequestHead, parts: list[bytes]) -> None:
        """A whole response of our own (`wire.answers`) to a request that goes no further."""
        self.exchange = self.proxied = None
        first, *lines, body = parts
        fields = [(b":status", first[9:12])]
        for line in lines:
            name, _, value = line.partition(b": ")
            fields.append((name.lower(), value))
        connection = self.connection
        ended = not body or head.method == b"HEAD"
        connection.send_headers(self, encode(fields), ended)
        if not ended:
            connection.send_data(self, body, True, None)

    # --- what the client sent --------------------------------------------------------------
    def data(self, piece: bytes, ended: bool) -> None:
        if self._left is not None:
            self._left -= len(piece)
            if self._left < 0 or (ended and self._left):
                self.malformed()
                self.connection.credit(self, len(piece))
                return
        if self.proxied is not None:
            self.proxied.request_more(piece, ended)
        else:
            self.connection.credit(self, len(piece))

    def trailed(self, block: bytes) -> None:
        if self._left:
            self.malformed()
        elif self.proxied is not None:
            self.proxied.request_trailers(block)

    def malformed(self) -> None:
        """What came is no request: nobody answers it."""
        self.connection.streams.setdefault(self.id, self)
        self.connection.end_stream(self, frames.PROTOCOL_ERROR)
        self.lost("")

    def reset(self, code: int) -> None:
        # to give up a response that came is how a watch ends; else it is work for nothing
        answered = self.proxied is not None and self.proxied.status
        self.lost("")
        if not answered:
            self.connection.overstep()

    def lost(self, why: str) -> None:
        exchange, self.exchange = self.exchange, None
        self.proxied = None
        if exchange is not None:
            exchange.client_lost()

    def sent_all(self) -> None:
        if self.open_in:  # the answer came before the end of the request: nobody reads the rest
            self.connection.end_stream(self, frames.NO_ERROR)
        self.connection.ended_well()
        proxied, self.proxied = self.proxied, None
        self.exchange = None
        if proxied is not None:
            proxied.response_sent()


class ClientConnection(Endpoint[ClientStream]):
    """`start` it with the bytes that the client has sent so far, its preface first."""

    __slots__ = (
        "_gone",
        "_greeted",
        "_last",
        "_leaving",
        "_resets",
        "_resets_at",
        "_served",
        "_service",
        "_timer",
        "link",
        "peer",
        "peer_port",
        "tls",
    )

    def __init__(
        self, service: Service, gone: Callable[[ClientConnection], None], link: Any
    ) -> None:
        super().__init__(link.pool)
        self._service = service
        self._gone = gone
        self._last = 0
        self._leaving = 0  # steps of `leave` that were taken
        self._served = _LAST_STREAM  # no stream beyond
        self._resets = 0.0
        self._resets_at = 0.0
        self._greeted = False
        self._timer: asyncio.TimerHandle | None = None
        self.link = link
        """The way to the user container for the streams of this connection."""
        self.peer = b""
        self.peer_port = 0
        self.tls = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Never: it takes over connections that are made."""

    def start(self, transport: asyncio.Transport, data: bytes) -> None:
        """Prior knowledge: `data` begins with the preface."""
        self._begin(transport, b"")
        self.data_received(data)

    def start_upgraded(self, transport: asyncio.Transport, settings: bytes) -> ClientStream:
        """A whole HTTP/1.1 request asked for it: the stream to answer it on. Raises Fault."""
        self._begin(transport, _SWITCHING)
        for name, value in iter_unpack(">HI", settings):
            self._setting(name, value)
        self._last = 1
        self.streams[1] = stream = ClientStream(self, 1, None)
        stream.open_in = False
        return stream

    def _begin(self, transport: asyncio.Transport, first: bytes) -> None:
        name = transport.get_extra_info("peername")
        self.peer = plain_address(name)
        self.peer_port = name[1] if name else 0
        self.tls = transport.get_extra_info("sslcontext") is not None
        self._timer = asyncio.get_running_loop().call_later(
            contract.READ_HEAD_SECONDS, transport.abort
        )
        ours = {
            frames.SET_MAX_STREAMS: MAX_STREAMS,
            frames.SET_INITIAL_WINDOW: STREAM_WINDOW,
            frames.SET_MAX_FIELDS: contract.MAX_HEAD_BYTES,
        }
        self.begin(transport, first + frames.settings(ours))

    @property
    def idle(self) -> bool:
        return not self.streams

    def close(self) -> None:
        """No more streams; what was written still goes out."""
        if not self.closing:
            self.closing = True
            self.send(frames.goaway(self.last_peer_stream(), frames.NO_ERROR))
            self.transport.close()

    def spare(self, now: float) -> bool:
        """Close, if it has no streams and the client has had time to open one."""
        if self.streams or self.closing or self.transport.get_write_buffer_size():
            return False
        timer = self._timer
        if timer is not None and now < timer.when() - contract.READ_HEAD_SECONDS + SPARE_SECONDS:
            return False
        self.close()
        return True

    def weigh(self) -> int:
        """Of both connections: the client's, and the one to the user container."""
        own: int = super().weigh()
        if not own:
            return 0
        theirs: int = self.link.weigh()
        secure: int = self.transport.get_extra_info("weight", 0)
        return own + theirs + secure

    def hold(self, held: bool) -> None:
        super().hold(held)
        self.link.hold(held)

    def cut(self) -> None:
        """At once, as if the client had."""
        self.transport.abort()

    def leave(self) -> None:
        """Asked again and again: let what runs end, then close (RFC 9113, section 6.8).

        First the client is only asked to open no more streams, since some may be on their way; the
        next time it is told which was the last.
        """
        if self.idle:
            self.close()
        elif self._leaving < 2 and not self.closing:
            if self._leaving:
                self._served = self._last
            self._leaving += 1
            self.send(frames.goaway(self._served, frames.NO_ERROR))

    def retire(self) -> None:
        """Ask for no more streams; those that are on their way are served."""
        if not self._leaving and not self.closing:
            self._leaving = 1
            self.send(frames.goaway(self._served, frames.NO_ERROR))

    def abort(self) -> None:
        self.transport.abort()

    def hang_up(self) -> None:
        """Read on for a moment: closing with unread bytes would reset, and nobody reads why."""
        if not self.transport.is_closing():
            self.transport.write_eof()
            if self._timer is not None:
                self._timer.cancel()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(LINGER_SECONDS, self.transport.abort)

    def ended_well(self) -> None:
        """A stream ran to its end: so much the better for the client's account."""
        if self._resets:
            self._resets = max(self._resets - 1, 0.0)

    # --- asyncio ---------------------------------------------------------------------------
    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        if not self._greeted:
            data = self._rest + data
            self._rest = b""
            if len(data) < len(frames.PREFACE) and frames.PREFACE.startswith(data):
                self._rest = data
                return
            if not data.startswith(frames.PREFACE):
                self.fail(Fault(frames.PROTOCOL_ERROR, "that is not HTTP/2's preface"))
                return
            self._greeted = True
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            data = data[len(frames.PREFACE) :]
        super().data_received(data)

    def eof_received(self) -> None:
        self.end("")  # and by returning None: close

    def connection_lost(self, error: Exception | None) -> None:
        self.closing = True
        self._rest = b""
        if self._timer is not None:
            self._timer.cancel()
        self.end("")
        self.link.close()
        self._gone(self)

    # --- what the client sent --------------------------------------------------------------
    def headers_received(self, number: int, block: Block | None, ended: bool) -> None:
        stream = self.streams.get(number)
        if stream is not None:
            self._trailers(stream, block, ended)
            return
        if not number & 1:
            raise Fault(frames.PROTOCOL_ERROR, "an even stream of a client")
        if number <= self._last:
            return  # of a stream that is over on our side
        self._last = number
        if number > self._served:
            self.send(frames.reset(number, frames.REFUSED_STREAM))
            return
        if len(self.streams) >= MAX_STREAMS:
            self.overstep()
            self.send(frames.reset(number, frames.REFUSED_STREAM))
            return
        if block is None:
            self._refuse(number, ended)
            return
        try:
            head = StreamHead(block)
        except MalformedBlock:
            self.overstep()
            self.send(frames.reset(number, frames.PROTOCOL_ERROR))
            return
        stream = ClientStream(self, number, head.length)
        self.streams[number] = stream
        if ended:
            stream.open_in = False
            if head.length:
                stream.malformed()
                return
            head.length = 0
        self._service(stream, head, ended)

    def _trailers(self, stream: ClientStream, block: Block | None, ended: bool) -> None:
        if not stream.open_in:
            raise Fault(frames.STREAM_CLOSED, "HEADERS after the end of a stream")
        try:
            if block is None or not ended:
                raise MalformedBlock("trailers")
            trailing = trailers(block)
        except MalformedBlock:
            stream.malformed()
            return
        stream.open_in = False
        if not stream.open_out:
            self.streams.pop(stream.id, None)
        stream.trailed(trailing)

    def _refuse(self, number: int, ended: bool) -> None:
        """A head that is larger than allowed (contract section 3.12)."""
        stream = ClientStream(self, number, None)
        stream.open_in = not ended
        self.streams[number] = stream
        fields = [(b":status", b"431"), *_length_of_nothing()]
        self.send_headers(stream, encode(fields), True)

    def overstep(self) -> None:
        now = asyncio.get_running_loop().time()
        forgiven = (now - self._resets_at) * _RESETS_PER_SECOND
        self._resets_at = now
        self._resets = max(self._resets - forgiven, 0.0) + 1
        if self._resets > _RESETS:
            raise Fault(frames.ENHANCE_YOUR_CALM, "too many streams that were reset")

    def goaway_received(self, last: int) -> None:
        pass  # the client opens no more, and closes when it has its answers

    def not_open(self, number: int) -> None:
        if number > self._last or not number & 1:
            raise Fault(frames.PROTOCOL_ERROR, "a frame of a stream that was never opened")

    def last_peer_stream(self) -> int:
        return min(self._last, self._served)


def _length_of_nothing() -> list[tuple[bytes, bytes]]:
    name, _, value = answers.date_line().partition(b": ")
    return [(name.lower(), value), (b"content-length", b"0")]
