"""One HTTP/1 connection that a client opened: requests are read one at a time, in order.

Owns reading (heads, bodies, pipelining, limits, slow or broken clients), what follows a response
(keep, drain, close), and back-pressure towards the client. What is answered is the business of the
Service and, while a request is open, of its Exchange.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

from weir.proxy import contract
from weir.proxy.wire import answers
from weir.proxy.wire.aside import LARGE_BYTES, put_aside
from weir.proxy.wire.body import BodyReader, LengthBody, reader
from weir.proxy.wire.clients import CLIENT_BYTES, SPARE_SECONDS
from weir.proxy.wire.connection import plain_address
from weir.proxy.wire.fields import HEAD_END, Malformed
from weir.proxy.wire.flow import BACKLOG, MEMORY, OTHER_SIDE, TURN, Flow
from weir.proxy.wire.head import RequestHead, check_start
from weir.proxy.wire.protocol import Handler, as_protocol
from weir.proxy.wire.turns import SLICE, Turns

BACKLOG_BYTES = 64 << 10
"""Bytes of later requests that are read while one is open; then reading is held."""
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\n"
"""How a client begins that knows of HTTP/2 (RFC 9113, 3.4), as far as it reads like a head."""
LARGE_READ = 16 << 10
"""Bytes that are taken at once without asking what it costs; a millisecond or two at most."""
_BULK_BYTES = 4096
"""So much that is only passed on costs as much as a frame."""
LINGER_SECONDS = 0.5
"""How long a refused client may go on sending, so that it reads the refusal and not a reset."""


class Exchange(Protocol):
    """A request that was handed over and is not answered yet."""

    def request_more(self, piece: bytes, ended: bool) -> None: ...

    def client_tunnelled(self, data: bytes) -> None: ...

    def client_lost(self) -> None:
        """The client is gone: nothing that is written reaches it any more."""

    def response_hold(self) -> None:
        """The client does not take the response as fast as it is written."""

    def response_release(self) -> None: ...


Http2 = Callable[[asyncio.Transport, bytes], None]
"""Takes the transport of a client that speaks HTTP/2 from the first byte, and what it sent."""

Service = Callable[["ServerConnection", RequestHead, bytes, bool], None]
"""Takes a request: its head, as much of the body as came with it, and whether that was all.

It sets the connection's `exchange`, unless it answers and calls `finish` before it returns.
"""


class ServerConnection:
    """`write` a response, then `finish` it; the next request is not read before."""

    __slots__ = (
        "_advancing",
        "_allowance",
        "_behind",
        "_body",
        "_cut",
        "_gone",
        "_http2",
        "_late",
        "_lingering",
        "_made",
        "_most_head",
        "_open",
        "_patience",
        "_rest",
        "_service",
        "_successor",
        "_timer",
        "_transport",
        "_tunnel",
        "_turns",
        "_unwanted",
        "below",
        "exchange",
        "flow",
        "full",
        "peer",
        "peer_port",
        "tls",
        "trailers",
        "written",
    )

    def __init__(
        self,
        service: Service,
        gone: Callable[[ServerConnection], None],
        http2: Http2 | None = None,
        patience: float | None = None,
        most_head: int = contract.MAX_HEAD_BYTES,
        turns: Turns | None = None,
    ) -> None:
        """`patience`: seconds for a head to come, if not those of the data port; `most_head`: its
        bytes. `turns` are those of the pod."""
        self._service = service
        self._gone = gone
        self._http2 = http2
        self._patience = contract.READ_HEAD_SECONDS if patience is None else patience
        self._successor: Handler | None = None
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._most_head = most_head
        self._turns = Turns() if turns is None else turns
        self._late = False  # it stands in line, with what it read before
        self._behind = b""
        self._made = False
        self._cut = False
        self._unwanted = False  # closed before it was made: accepting and making are two steps
        self._body: BodyReader | None = None
        self._rest = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._open = False  # a request was handed over and is not finished
        self._advancing = False
        self._lingering = False
        self._tunnel = False
        self._allowance = 0
        self.exchange: Exchange | None = None
        self.below: Any = None
        """A SecureServer, for a connection with TLS: it is there before this one is made."""
        self.full = False
        self.peer = b""
        self.peer_port = 0
        self.tls = False
        self.trailers: list[bytes] = []
        self.written = False
        """Something of the final response to the open request was written."""

    # --- for the exchange ------------------------------------------------------------------
    def answer(self, head: RequestHead, parts: list[bytes]) -> None:
        """A whole response of our own to a request that goes no further."""
        self.write(answers.framed(parts, head.minor, head.close, head.method == b"HEAD"))
        self.finish(not head.close)

    def hand_over(self, successor: Handler) -> asyncio.Transport:
        """The transport, for another protocol from here on."""
        self._successor = successor
        self._transport.set_protocol(as_protocol(successor))
        self._gone(self)
        return self._transport

    def write(self, data: bytes) -> None:
        self.written = True
        self._transport.write(data)

    def writelines(self, buffers: Iterable[bytes]) -> None:
        self.written = True
        self._transport.writelines(buffers)

    def inform(self, data: bytes) -> None:
        """An interim response; the final one is still to come."""
        self._transport.write(data)

    def tunnel(self) -> bytes:
        """From now on bytes go to `client_tunnelled`; returns those that came early."""
        self._tunnel = True
        self.flow.release(BACKLOG)
        early = bytes(self._rest)
        self._rest.clear()
        return early

    def finish(self, keep: bool) -> None:
        """The response is complete: on to the next request, or close."""
        self.exchange = None
        self._open = False
        if not keep:
            if self._body is None and not self._rest:
                self._transport.close()
            else:
                self._linger()
            return
        if self.flow.held:
            self.flow.release(OTHER_SIDE | BACKLOG)
        if self._body is not None:
            self._allowance = contract.DRAINED_BODY_BYTES
        elif self._rest and not self._advancing:
            self._next()

    def close(self) -> None:
        """Flush and close; for a response that could not be completed."""
        self.exchange = None
        if self._made:
            self._transport.close()
        else:
            self._unwanted = True

    def spare(self, now: float) -> bool:
        """Close, unless something is asked, or was since this was asked the last time."""
        if self._open or not self._made or self._lingering or self._body is not None or self._late:
            return False
        if self._transport.is_closing() or self._transport.get_write_buffer_size():
            return False
        timer = self._timer
        if timer is None:
            if self.written:  # by the last answer, or one since
                self.written = False
                return False
        elif now < timer.when() - self._patience + SPARE_SECONDS:  # a head is due
            return False
        if self._rest:
            self._transport.abort()
        else:
            self._transport.close()
        return True

    def weigh(self) -> int:
        """Bytes of memory, about, without those of an exchange; 0 for one that is ending."""
        if self._cut:
            return 0
        waiting = self._transport.get_write_buffer_size() if self._made else 0
        if self.below is not None:
            waiting += self.below.weigh()
        return CLIENT_BYTES + len(self._rest) + len(self._behind) + waiting

    def hold(self, held: bool) -> None:
        """Read nothing, for want of memory; or go on."""
        if self._made:
            if held:
                self.flow.hold(MEMORY)
            else:
                self.flow.release(MEMORY)
        elif self.below is not None:
            self.below.hold(held)

    def cut(self) -> None:
        """At once, as if the client had."""
        self._cut = True
        if self._made:
            self._rest.clear()
            self._behind = b""
            self._transport.abort()
        elif self.below is not None:
            self.below.abort()

    def leave(self) -> None:
        """Close if no request is there."""
        if self.idle:
            self.close()

    def retire(self) -> None:
        """The answer to the next request says that it is the last one."""
        service = self._service

        def last(client: ServerConnection, head: RequestHead, piece: bytes, ended: bool) -> None:
            head.close = True
            service(client, head, piece, ended)

        self._service = last

    def abort(self) -> None:
        self.exchange = None
        if self._made:
            self._transport.abort()
        else:
            self._unwanted = True

    @property
    def idle(self) -> bool:
        return not self._open and not self._rest and self._body is None and not self._late

    @property
    def awaited(self) -> bool:
        """Its first request is to be expected: whoever connects has something to say."""
        return not self._made or (self._timer is not None and not self._open)

    # --- asyncio ---------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._made = True
        self.flow = Flow(self._transport)
        name = transport.get_extra_info("peername")
        self.peer = plain_address(name)
        self.peer_port = name[1] if name else 0
        self.tls = transport.get_extra_info("sslcontext") is not None
        self._expect_head()
        if self._unwanted:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if len(data) > LARGE_READ or self._late:
            self._in_turn(data)
        else:
            self._received(data)

    def _in_turn(self, data: bytes) -> None:
        """What takes long is not done while other pods wait."""
        self._behind = self._behind + data if self._behind else data
        if self._late:
            return
        if not self._turns.line:
            left = self._turns.look() - self._cost(data)
            if left >= 0:
                self._turns.left = left
                self._behind = b""
                self._received(data)
                return
        self._late = True
        put_aside(len(data))
        self.flow.hold(TURN)
        self._turns.wait(self)

    def _cost(self, data: bytes) -> int:
        """In frames of HTTP/2: it is lines that cost, of heads and of chunks, and bytes less."""
        body = self._body
        if self._tunnel or (isinstance(body, LengthBody) and body.left >= len(data)):
            return len(data) // _BULK_BYTES
        return len(data) // 512 + data.count(b"\n") // 2

    def go_on(self, turns: Turns) -> bool:
        """Its turn has come. Is there still more?"""
        data, cost = self._behind, self._cost(self._behind)
        if cost > SLICE:
            data, self._behind = data[:LARGE_READ], data[LARGE_READ:]
            cost = self._cost(data)
        else:
            self._behind = b""
        turns.left -= cost
        if not self._transport.is_closing():
            self._received(data)
        self._late = bool(self._behind)
        if not self._late:
            self.flow.release(TURN)
        return self._late

    def _overtaken(self, data: bytes) -> bytes:
        """With all that was read: another one goes on with it, and says when to read."""
        self.flow.release(TURN)
        behind, self._behind = self._behind, b""
        return data + behind if behind else data

    def _received(self, data: bytes) -> None:
        if self._tunnel:
            if self.exchange is not None:
                self.exchange.client_tunnelled(data)
        elif not self._lingering:
            self._advance(data)

    def eof_received(self) -> None:
        self._lose()  # and by returning None: close

    def connection_lost(self, error: Exception | None) -> None:
        self._lose()
        self._cancel_timer()
        self._rest.clear()
        self._behind = b""
        self._gone(self)

    def pause_writing(self) -> None:
        self.full = True
        put_aside(self._transport.get_write_buffer_size())
        if self.exchange is not None:
            self.exchange.response_hold()

    def resume_writing(self) -> None:
        self.full = False
        if self.exchange is not None:
            self.exchange.response_release()
        elif not self._open and not self._advancing and not self._tunnel and not self._lingering:
            self.flow.release(BACKLOG)
            self._next()

    # --- reading ---------------------------------------------------------------------------
    def _advance(self, data: bytes) -> None:
        """Take from `data` whatever its turn has come for, and keep the rest."""
        self._advancing = True
        try:
            while data and not self._transport.is_closing() and not self._lingering:
                if self._body is not None:
                    data = self._more(self._body, data)
                elif self._successor is not None:
                    self._successor.data_received(self._overtaken(data))
                    return
                elif self._open or self.full:  # who reads no answers gets no more of them
                    self._rest += data
                    put_aside(len(data))
                    if len(self._rest) > BACKLOG_BYTES:
                        self.flow.hold(BACKLOG)
                    return
                else:
                    data = self._head(data)
        except Malformed as error:
            self._refuse(error)
        finally:
            self._advancing = False

    def _next(self) -> None:
        data = bytes(self._rest)
        self._rest.clear()
        self._advance(data)

    def _head(self, data: bytes) -> bytes:
        """Hand over a request if its head is complete; return what lies behind."""
        seen = 0
        if self._rest:
            seen = max(len(self._rest) - 3, 0)
            self._rest += data
            if self._rest.find(HEAD_END, seen) < 0:
                self._unfinished(self._rest, len(data))
                return b""
            data = bytes(self._rest)
            self._rest.clear()
        end = data.find(HEAD_END, seen)
        if end < 0:
            self._rest += data
            self._unfinished(self._rest, len(data))
            return b""
        if data.startswith(b"\r\n"):  # an empty line before the request (RFC 9112, 2.2)
            return data[2:]
        if self._timer is not None:
            self._cancel_timer()
            if self._http2 is not None and data.startswith(HTTP2_PREFACE):
                self._gone(self)
                self._http2(self._transport, self._overtaken(data))
                return b""
        end += 4
        if end > LARGE_BYTES:
            put_aside(end)
        if end > self._most_head:
            raise Malformed("head", 431, b"Request Header Fields Too Large")
        piece = rest = b""
        if end == len(data):
            head = RequestHead(data)
        else:
            head = RequestHead(data[:end])
            rest = data[end:]
        length = head.length
        if length is not None and length <= len(rest):  # all here: no reader needed
            ended = True
            if length:
                piece = rest[:length]
                rest = rest[length:]
        else:
            ended, piece, rest = self._body_begins(reader(length), rest)
        self._open = True
        self.written = False
        self._service(self, head, piece, ended)
        return rest

    def _body_begins(self, body: BodyReader, data: bytes) -> tuple[bool, bytes, bytes]:
        piece, rest = body.feed(data) if data else (b"", None)
        if rest is None:
            self._body = body
            return False, piece, b""
        self.trailers = body.trailers
        return True, piece, rest

    def _more(self, body: BodyReader, data: bytes) -> bytes:
        piece, rest = body.feed(data)
        if rest is not None:
            self._body = None
            self.trailers = body.trailers
        if self._open:
            if self.exchange is not None:
                self.exchange.request_more(piece, rest is not None)
        else:
            self._allowance -= len(data)
            if self._allowance < 0:
                self._linger()
        return rest or b""

    def _unfinished(self, start: bytearray, more: int) -> None:
        put_aside(more)
        if len(start) > self._most_head:
            raise Malformed("head", 431, b"Request Header Fields Too Large")
        if self._http2 is None or not HTTP2_PREFACE.startswith(start):
            check_start(start)
        if self._timer is None:
            self._expect_head()

    # --- clients that are slow, broken or gone ------------------------------------------------
    def _expect_head(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._patience, self._too_slow)

    def _too_slow(self) -> None:
        self._timer = None
        self._transport.abort()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: Malformed) -> None:
        """Answer what broke HTTP, unless the answer to the request has begun, and close."""
        written = self._open and self.written
        self._lose()
        if written:
            self._transport.abort()
        else:
            self._transport.write(answers.refusal(error.status, error.reason))
            self._linger()

    def _linger(self) -> None:
        """Send our end, and read on for a moment: closing with unread bytes would reset."""
        self._lingering = True
        self._body = None
        self._rest.clear()
        self.flow.release(OTHER_SIDE | BACKLOG)
        if not self._transport.is_closing():
            self._transport.write_eof()
            self._cancel_timer()
            loop = asyncio.get_running_loop()
            until = loop.time() + contract.READ_HEAD_SECONDS
            self._timer = loop.call_later(LINGER_SECONDS, self._lingered, until)

    def _lingered(self, until: float) -> None:
        """The moment is over, unless a slow client still has an answer to read."""
        loop = asyncio.get_running_loop()
        if self._transport.get_write_buffer_size() and loop.time() < until:
            self._timer = loop.call_later(LINGER_SECONDS, self._lingered, until)
        else:
            self._too_slow()

    def _lose(self) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_lost()
