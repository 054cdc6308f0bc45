"""One HTTP/1.1 connection that we opened: requests go out, responses are read.

Owns the reading of responses (heads, 1xx, bodies, where they end), and knows whether the
connection may be used again. Who asked, and what a response is good for, is the Asker's business.
Nothing here starts a task or makes a future.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

from weir.proxy import contract
from weir.proxy.wire.aside import put_aside
from weir.proxy.wire.body import BodyReader, reader
from weir.proxy.wire.clients import CLIENT_BYTES
from weir.proxy.wire.fields import HEAD_END, Malformed
from weir.proxy.wire.flow import Flow
from weir.proxy.wire.response import ResponseHead, ResponseHeads


class TransportError(Exception):
    """No answer: refused, reset, out of time or malformed.

    `sent` tells whether bytes of the request may have reached the peer, so whether sending it
    again may do its work twice. `refused` tells that nobody listens there.
    """

    def __init__(self, text: str, *, sent: bool, refused: bool = False) -> None:
        super().__init__(text)
        self.sent = sent
        self.refused = refused


class Asker(Protocol):
    """The owner of the request that is on a connection."""

    def response_informed(self, head: ResponseHead) -> None:
        """A 1xx other than 101 came; the response is still to come."""

    def response_begun(self, head: ResponseHead, piece: bytes, ended: bool) -> None:
        """The head, with as much of the body as came with it; `ended`: that was all."""

    def response_more(self, piece: bytes, ended: bool) -> None:
        """More of the body. At the end the connection's `trailers` are known."""

    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        """101: the connection is a tunnel now, and `rest` came first."""

    def response_tunnelled(self, data: bytes) -> None: ...

    def response_lost(self, error: TransportError) -> None:
        """No (further) response. A tunnel ends like this as well."""

    def request_hold(self) -> None:
        """The peer does not take the request as fast as it is sent."""

    def request_release(self) -> None: ...


def plain_address(name: tuple[Any, ...] | None) -> bytes:
    """A socket name's IP address as HTTP headers carry it: no zone, no IPv4-mapped form."""
    if not name:
        return b""
    address: str = name[0].partition("%")[0]
    return address.removeprefix("::ffff:").encode() if "." in address else address.encode()


class Connection:
    """`ask` one request at a time; after the response has ended, `reusable` says if another may go.

    `used` counts the requests so far; a connection with none can't be stale. `known` are heads that
    the same server sent before.
    """

    __slots__ = (
        "_asker",
        "_body",
        "_gone",
        "_known",
        "_method",
        "_poll",
        "_rest",
        "_tunnel",
        "answered",
        "flow",
        "idle_since",
        "reusable",
        "trailers",
        "transport",
        "used",
    )

    def __init__(
        self, gone: Callable[[Connection], None], known: ResponseHeads | None = None
    ) -> None:
        self._gone = gone
        self._known = ResponseHeads() if known is None else known
        self._asker: Asker | None = None
        self._body: BodyReader | None = None
        self._method = b""
        self._rest = bytearray()
        self._tunnel = False
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.trailers: list[bytes] = []
        self.answered = False
        self.reusable = True
        self.idle_since = 0.0
        self.used = 0

    # --- for the asker ---------------------------------------------------------------------
    def ask(self, asker: Asker, method: bytes, data: bytes) -> None:
        """Send a request's head, perhaps with its body; the answer goes to `asker`."""
        self._asker = asker
        self._method = method
        self.answered = False
        self.used += 1
        self.transport.write(data)

    def send(self, buffers: Iterable[bytes]) -> None:
        """More of the request's body, or of a tunnel."""
        self.transport.writelines(buffers)

    def local_address(self) -> bytes:
        """The IP address of our end."""
        name = self.transport.get_extra_info("sockname")
        return plain_address(name)

    def weigh(self) -> int:
        """Bytes of memory, about."""
        return CLIENT_BYTES + len(self._rest) + self.transport.get_write_buffer_size()

    def stale(self) -> bool:
        """Has the peer closed, or said something unasked? Asks the kernel."""
        return self.transport.is_closing() or bool(self._poll.poll(0))

    def forget(self) -> None:
        """Drop the asker and the connection with it: nobody wants the rest of the exchange."""
        self._asker = None
        self.reusable = False
        self.transport.abort()

    def close(self) -> None:
        """No more of this connection, but what was written still goes out."""
        self._asker = None
        self.reusable = False
        self.transport.close()

    def end(self, why: str) -> None:
        """Abort; an exchange that runs is lost, for the reason given."""
        self._lose(why)

    # --- asyncio ---------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.flow = Flow(self.transport)
        self._poll = select.poll()
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        asker = self._asker
        if asker is None:
            self.forget()  # a server that speaks unasked can't be trusted with another request
        elif self._tunnel:
            asker.response_tunnelled(data)
        else:
            self.answered = True
            try:
                if self._body is not None:
                    self._more(asker, self._body, data)
                else:
                    self._heads(asker, data)
            except Malformed as error:
                self._lose(f"malformed HTTP response: {error}")

    def eof_received(self) -> None:
        self._ended("EOF")

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        if isinstance(error, ConnectionResetError):
            self._lose("read: connection reset by peer")
        elif error is not None:
            self._lose(str(error))
        else:
            self._ended("EOF")
        self._gone(self)

    def pause_writing(self) -> None:
        put_aside(self.transport.get_write_buffer_size())
        if self._asker is not None:
            self._asker.request_hold()

    def resume_writing(self) -> None:
        if self._asker is not None:
            self._asker.request_release()

    # --- reading ---------------------------------------------------------------------------
    def _heads(self, asker: Asker, data: bytes) -> None:
        """Interim heads, then the final one; called again while a head is incomplete."""
        seen = 0
        if self._rest:
            seen = max(len(self._rest) - 3, 0)
            self._rest += data
            if self._rest.find(HEAD_END, seen) < 0:
                self._limit(len(data))
                return
            data = bytes(self._rest)
            self._rest.clear()
        while True:
            end = data.find(HEAD_END, seen)
            if end < 0:
                self._rest += data
                self._limit(len(data))
                return
            end += 4
            block = data if end == len(data) else data[:end]
            head = self._known[block] if self._method != b"HEAD" else ResponseHead(block, b"HEAD")
            rest = data[end:]
            status = head.status
            if status >= 200:
                self._final(asker, head, rest)
                return
            if status == 101:
                self._tunnel = True
                self.reusable = False
                asker.response_switched(head, rest)
                return
            asker.response_informed(head)
            if self._asker is not asker:
                return
            data = rest
            seen = 0
            if not data:
                return

    def _limit(self, more: int) -> None:
        put_aside(more)
        if len(self._rest) > contract.MAX_HEAD_BYTES:
            raise Malformed("response head too long")

    def _final(self, asker: Asker, head: ResponseHead, data: bytes) -> None:
        if head.close:
            self.reusable = False
        length = head.length
        if length is not None and 0 <= length <= len(data):  # all here: no reader needed
            if length < len(data):
                self.reusable = False  # bytes behind the response
                data = data[:length]
            self._asker = None
            asker.response_begun(head, data, True)
            return
        body = self._body = reader(length)
        piece, rest = body.feed(data) if data else (b"", None)
        if rest is not None:
            self._end(body, rest)
        asker.response_begun(head, piece, rest is not None)

    def _more(self, asker: Asker, body: BodyReader, data: bytes) -> None:
        piece, rest = body.feed(data)
        if rest is not None:
            self._end(body, rest)
            asker.response_more(piece, True)
        elif piece:
            asker.response_more(piece, False)

    def _end(self, body: BodyReader, rest: bytes) -> None:
        self._body = None
        self._asker = None
        self.trailers = body.trailers
        if rest:
            self.reusable = False

    def _ended(self, why: str) -> None:
        """The peer closed in an orderly way: that ends an endless body, and is too early else."""
        body, asker = self._body, self._asker
        if asker is not None and body is not None and body.endless:
            self.reusable = False
            self._end(body, b"")
            asker.response_more(b"", True)
        else:
            self._lose(f"unexpected {why}" if body is not None else why)

    def _lose(self, why: str) -> None:
        asker, self._asker = self._asker, None
        self._body = None
        self.reusable = False
        if asker is not None:
            asker.response_lost(TransportError(why, sent=True))
        self.transport.abort()
