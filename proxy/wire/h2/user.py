"""The way of one client's streams to the user container: HTTP/2 with prior knowledge.

One connection for each connection of a client, opened with its first request that goes on and
closed with it. Numbers are our own, because not every stream of the client gets here, and some get
here late. What a response is good for is the exchange's business.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, cast

from weir.proxy.policy.budget import Share
from weir.proxy.wire.h2 import frames
from weir.proxy.wire.h2.endpoint import Endpoint, Fault
from weir.proxy.wire.h2.hpack import Block
from weir.proxy.wire.h2.sending import STREAM_WINDOW, Ahead, StreamBase
from weir.proxy.wire.protocol import as_protocol
from weir.proxy.wire.server import LINGER_SECONDS

_LAST_STREAM = (1 << 31) - 1
_SHUTTING_DOWN = "http2: the user container is shutting down"
_NOT_HTTP2 = "http2: failed reading the frame payload: the user container does not speak HTTP/2"


class Asker(Protocol):
    """The owner of a request that goes to the user container."""

    def opened(self, stream: UserStream) -> None:
        """There is a stream for it; its head is to be sent now."""

    def unreachable(self, why: str) -> None: ...

    def response_headers(self, block: Block | None, ended: bool) -> None:
        """A whole block: an interim or final head, or trailers. None: too large."""

    def response_data(self, piece: bytes, ended: bool) -> None: ...

    def response_reset(self, code: int) -> None: ...

    def response_lost(self, why: str, untouched: bool) -> None:
        """No (further) response; `untouched`: the user container never looked at the request."""


class UserStream(StreamBase["UserConnection"]):
    __slots__ = ("asker",)

    def __init__(self, connection: UserConnection, number: int, asker: Asker) -> None:
        super().__init__(connection, number, connection.initial_window)
        self.asker: Asker | None = asker

    def data(self, piece: bytes, ended: bool) -> None:
        if self.asker is not None:
            self.asker.response_data(piece, ended)
        else:
            self.connection.credit(self, len(piece))

    def reset(self, code: int) -> None:
        asker, self.asker = self.asker, None
        if asker is not None:
            asker.response_reset(code)
        self.connection.link.next()

    def lost(self, why: str) -> None:
        asker, self.asker = self.asker, None
        if asker is not None:
            asker.response_lost(why, self.id > self.connection.disowned_above)

    def sent_all(self) -> None:
        pass

    def drop(self, code: int) -> None:
        """Nobody wants the rest."""
        self.asker = None
        self.connection.end_stream(self, code)
        self.connection.link.next()


class UserConnection(Endpoint[UserStream]):
    """A connection that we opened. `used` counts its streams."""

    __slots__ = ("_next", "disowned_above", "ended", "heard", "link", "used")

    def __init__(self, link: UserLink) -> None:
        super().__init__(link.pool)
        self.link = link
        self.disowned_above = _LAST_STREAM
        self.used = 0
        self.heard = False
        self.ended = ""
        """Why no streams are to come here any more, if so."""
        self._next = 1

    @property
    def has_room(self) -> bool:
        return len(self.streams) < self.max_streams

    def open(self, asker: Asker) -> None:
        stream = UserStream(self, self._next, asker)
        self._next += 2
        self.used += 1
        self.streams[stream.id] = stream
        asker.opened(stream)

    # --- asyncio ---------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        ours = {frames.SET_ENABLE_PUSH: 0, frames.SET_INITIAL_WINDOW: STREAM_WINDOW}
        self.begin(cast(asyncio.Transport, transport), frames.PREFACE + frames.settings(ours))

    def eof_received(self) -> None:
        self.end("EOF")

    def connection_lost(self, error: Exception | None) -> None:
        self.catch_up()
        self._rest = b""
        if isinstance(error, ConnectionResetError):
            self.end("read: connection reset by peer")
        else:
            self.end(str(error) if error is not None else "EOF")

    def end(self, why: str) -> None:
        """All streams are lost, and no new ones come here."""
        self.closing = True
        self.ended = why or "EOF"
        self.link.left(self)
        super().end(why)

    # --- what the user container sent --------------------------------------------------------
    def headers_received(self, number: int, block: Block | None, ended: bool) -> None:
        stream = self.streams.get(number)
        if stream is None:
            self.not_open(number)
            return
        if not stream.open_in:
            raise Fault(frames.STREAM_CLOSED, "HEADERS after the end of a stream")
        if ended:
            stream.open_in = False
            if not stream.open_out:
                del self.streams[number]
        if stream.asker is not None:
            stream.asker.response_headers(block, ended)

    def settings_received(self) -> None:
        self.heard = True
        self.link.next()

    def goaway_received(self, last: int) -> None:
        """It answers what it has begun; what it has not may be asked again elsewhere."""
        self.disowned_above = min(self.disowned_above, last)
        self.ended = _SHUTTING_DOWN
        self.link.left(self)
        for stream in [stream for number, stream in self.streams.items() if number > last]:
            self.end_stream(stream, None)
            stream.lost(_SHUTTING_DOWN)
        self.link.next()

    def not_open(self, number: int) -> None:
        if number >= self._next or not number & 1:
            raise Fault(frames.PROTOCOL_ERROR, "a frame of a stream that was never opened")

    def strange(self, start: bytes) -> None:
        if not self.heard:
            raise Fault(frames.PROTOCOL_ERROR, _NOT_HTTP2.removeprefix("http2: "))


class UserLink:
    """`ask` for a stream; the asker is told when there is one. `connect` makes a TCP socket.

    A connection that takes no more streams lasts as long as those that it has; what there is of
    them beyond the one that each client may have is charged to `share`. Without room the oldest of
    them ends.
    """

    __slots__ = (
        "_client",
        "_connect",
        "_connection",
        "_connections",
        "_dialling",
        "_share",
        "_waiting",
        "pool",
    )

    def __init__(
        self,
        connect: Callable[[], Awaitable[socket.socket]],
        pool: Ahead | None = None,
        share: Share | None = None,
    ) -> None:
        self.pool = pool
        self._share = share
        self._connect = connect
        self._client: Endpoint[Any] | None = None
        self._connection: UserConnection | None = None
        self._connections: dict[UserConnection, None] = {}
        self._dialling: asyncio.Task[None] | None = None
        self._waiting: dict[Asker, None] = {}

    def serve(self, client: Endpoint[Any]) -> None:
        """Whose streams these are."""
        self._client = client

    def ask(self, asker: Asker) -> None:
        connection = self._connection
        if connection is not None and not self._waiting and connection.has_room:
            connection.open(asker)
            return
        self._waiting[asker] = None
        if connection is None and self._dialling is None:
            self._dialling = asyncio.get_running_loop().create_task(self._dial())

    def forget(self, asker: Asker) -> None:
        self._waiting.pop(asker, None)

    def next(self) -> None:
        """A stream may have become free."""
        while self._waiting and self._connection is not None and self._connection.has_room:
            asker = next(iter(self._waiting))
            del self._waiting[asker]
            self._connection.open(asker)

    def left(self, connection: UserConnection) -> None:
        """No new streams on this one."""
        if connection.closing and connection in self._connections:
            del self._connections[connection]
            if self._connections and self._share is not None:
                self._share.give()
        if self._connection is connection:
            self._connection = None
            if self._client is not None and self._client.partner is connection:
                self._client.partner = None
            if self._waiting and self._dialling is None:
                self._dialling = asyncio.get_running_loop().create_task(self._dial())

    def hold(self, held: bool) -> None:
        for connection in self._connections:
            connection.hold(held)

    def weigh(self) -> int:
        return sum(connection.weigh() for connection in self._connections)

    def close(self) -> None:
        """The client is gone."""
        self._waiting.clear()
        self._client = None
        if self._dialling is not None:
            self._dialling.cancel()
        for connection in list(self._connections):
            connection.closing = True
            connection.transport.close()
            if connection.transport.get_write_buffer_size():  # to one that does not read, maybe
                loop = asyncio.get_running_loop()
                loop.call_later(LINGER_SECONDS, connection.transport.abort)

    async def _dial(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock = await self._connect()
            connection = UserConnection(self)
            await loop.create_connection(lambda: as_protocol(connection), sock=sock)
        except OSError as error:
            waiting, self._waiting = self._waiting, {}
            self._dialling = None
            for asker in waiting:
                asker.unreachable(str(error))
            return
        self._dialling = None
        if connection.ended:  # before it was of any use: they may try once more
            connection.transport.close()
            waiting, self._waiting = self._waiting, {}
            for asker in waiting:
                asker.response_lost(connection.ended, connection.ended != _NOT_HTTP2)
            return
        self._connections[connection] = None
        if len(self._connections) > 1 and self._share is not None:
            self._share.take()
            if not self._share.room:
                oldest = next(iter(self._connections))
                oldest.end(_SHUTTING_DOWN)
                oldest.transport.abort()
        self._connection = connection
        if self._client is not None:
            connection.partner = self._client
            self._client.partner = connection
        self.next()
