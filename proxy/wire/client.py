"""An HTTP/1.1 client for one address, made for many small requests.

A request is one write and one future: no task, no timer of its own. At most `limit` connections;
while all are busy, requests wait first in, first out. Responses are read whole, up to a limit.

Guarantees no delivery: nothing is ever sent twice, and a TransportError says whether the peer may
have seen the request (`sent`), so that the caller can decide what a repetition would mean.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weir.proxy import contract
from weir.proxy.policy.deadlines import Deadlines, Timeouts
from weir.proxy.wire.connection import Connection, TransportError
from weir.proxy.wire.dial import Dial, DialError, connect_once, dial_here
from weir.proxy.wire.pool import IdlePool
from weir.proxy.wire.protocol import as_protocol
from weir.proxy.wire.response import ResponseHead, ResponseHeads
from weir.proxy.wire.watch import Watch

if TYPE_CHECKING:
    import ssl

__all__ = ["Call", "HttpClient", "Response", "TransportError"]


@dataclass(frozen=True, slots=True)
class Response:
    """Names of headers in lower case, in the order they came."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header, or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


class Call:
    """One request from `request()` to its future; the Asker of its connection."""

    __slots__ = (
        "_body_limit",
        "_connection",
        "_deadlines",
        "_due",
        "_head",
        "_over",
        "_pieces",
        "_size",
        "body",
        "future",
        "head",
        "otherwise",
    )

    def __init__(
        self, head: bytes, body: bytes, due: float, future: asyncio.Future[Response]
    ) -> None:
        self.head = head
        self.body = body
        self.future = future
        self.otherwise: bytes | None = None
        """The head to use when this one could not be sent and another path is tried."""
        self._due = due
        self._deadlines: Deadlines | None = None
        self._connection: Connection | None = None
        self._over: Callable[[Call, Connection | None], None] = _nothing
        self._body_limit = 0
        self._head: ResponseHead | None = None
        self._pieces: list[bytes] = []
        self._size = 0

    # --- deadlines (Timed) -----------------------------------------------------------------
    def due(self) -> float:
        if self._deadlines is None:
            return self._due
        return min(self._due, self._deadlines.next())

    def expire(self, now: float) -> None:
        if self._deadlines is not None and self._deadlines.fired(now):
            headers = ((b"content-type", contract.TEXT_PLAIN),)
            self._settle(Response(504, headers, contract.BODY_REQUEST_TIMEOUT))
            self._finish()
        elif now >= self._due:
            self.fail(TransportError("no answer in time", sent=self._connection is not None))

    # --- the client's side -----------------------------------------------------------------
    def wait(self, over: Callable[[Call, Connection | None], None]) -> None:
        """It waits for a connection; `over` is called if it ends before it got one."""
        self._over = over

    def start(
        self,
        connection: Connection,
        over: Callable[[Call, Connection | None], None],
        body_limit: int,
        deadlines: Deadlines | None,
    ) -> None:
        """Send it; `over` is called once, with the connection if that may be used again."""
        self._connection = connection
        self._over = over
        self._body_limit = body_limit
        self._deadlines = deadlines
        head, body = self.head, self.body
        method = head[: head.index(b" ")]
        connection.ask(self, method, b"%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body))

    def fail(self, error: TransportError) -> None:
        if not self.future.done():
            self.future.set_exception(error)
        self._finish()

    # --- the connection's side (Asker) -----------------------------------------------------
    def response_informed(self, head: ResponseHead) -> None:
        pass

    def response_begun(self, head: ResponseHead, piece: bytes, ended: bool) -> None:
        if ended and len(piece) <= self._body_limit:
            self._settle(Response(head.status, head.headers(), piece))
            self._finish(ended)
            return
        self._head = head
        self.response_more(piece, ended)

    def response_more(self, piece: bytes, ended: bool) -> None:
        if self._deadlines is not None:
            self._deadlines.wrote(time.monotonic())
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size > self._body_limit:
            limit = self._body_limit
            self.fail(TransportError(f"response body is longer than {limit} bytes", sent=True))
        elif ended:
            assert self._head is not None
            body = b"".join(self._pieces)
            self._settle(Response(self._head.status, self._head.headers(), body))
            self._finish(True)

    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        self.fail(TransportError("the peer switched protocols unasked", sent=True))

    def response_tunnelled(self, data: bytes) -> None:
        pass  # cannot happen: response_switched has ended the call

    def response_lost(self, error: TransportError) -> None:
        self.fail(error)

    def request_hold(self) -> None:
        pass  # the request was handed over whole

    def request_release(self) -> None:
        pass

    def _settle(self, response: Response) -> None:
        if not self.future.done():
            self.future.set_result(response)

    def _finish(self, ended: bool = False) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and not ended:
            connection.forget()
        over, self._over = self._over, _nothing
        over(self, connection if ended else None)


def _nothing(call: Call, connection: Connection | None) -> None:
    pass


class HttpClient:
    """Keep-alive connections to one host and port. Must be used and closed in one event loop.

    `timeouts`: the peer has no proxy that enforces the revision's timers, so do it here; what they
    end is answered by a 504 of our own. `unsent` is called instead of failing a call that found
    nobody listening, so not one byte of it has left.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        limit: int = 64,
        connect_timeout: float = 5.0,
        idle: float = contract.IDLE_UPSTREAM_SECONDS,
        body_limit: int = 1 << 20,
        timeouts: Timeouts | None = None,
        unsent: Callable[[Call, TransportError], None] | None = None,
        dial: Dial = dial_here,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self._limit = limit
        self._connect_timeout = connect_timeout
        self._body_limit = body_limit
        self._timeouts = timeouts
        self._unsent = unsent
        self._dial = dial
        self._tls = tls
        self._pool = IdlePool(limit, idle, time.monotonic)
        self._known = ResponseHeads()
        self._watch: Watch[Call] = Watch(time.monotonic)
        self._waiting: deque[Call] = deque()
        self._open: set[Connection] = set()
        self._dials: set[asyncio.Task[None]] = set()
        self.opened = 0
        self._closed = False
        self._retired = False
        self._all_gone: asyncio.Future[None] | None = None

    def request(self, head: bytes, body: bytes, timeout: float) -> asyncio.Future[Response]:
        """Send it when its turn comes. The future ends in a Response or a TransportError.

        `head`: request line and header lines (with Host), each ending CRLF; Content-Length and the
        empty line are added here. `timeout` in seconds, waiting for a connection included.
        Cancelling the future stops nothing that was sent: the response is read and dropped.
        """
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self.submit(Call(head, body, time.monotonic() + timeout, future))
        return future

    def submit(self, call: Call) -> None:
        """As `request`, for a call that already has its future and its deadline."""
        if self._closed:
            call.fail(TransportError("the client is closed", sent=False))
            return
        if not self._waiting:
            connection = self._pool.take(careful=True)
            if connection is not None:
                self._start(call, connection)
                return
        call.wait(self._over)
        self._waiting.append(call)
        self._watch.add(call, call.due())
        self._dial_for_waiting()

    async def close(self) -> None:
        """Fail what waits or runs, close every connection, return when they are closed."""
        self._closed = True
        while self._waiting:
            self._waiting.popleft().fail(TransportError("the client was closed", sent=False))
        for task in self._dials:
            task.cancel()
        if self._dials:
            await asyncio.wait(self._dials)
        self._pool.close()
        self._watch.close()
        for connection in list(self._open):
            connection.end("the client was closed")
        if self._open:
            self._all_gone = asyncio.get_running_loop().create_future()
            await self._all_gone

    async def retire(self) -> None:
        """Let what runs end, pass what waits to `unsent`, open nothing any more, then close."""
        self._retired = True
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            self._watch.discard(call)
            if not call.future.done() and self._unsent is not None:
                self._unsent(call, TransportError("the path was given up", sent=False))
        self._pool.close()
        try:
            while self._open:
                self._all_gone = asyncio.get_running_loop().create_future()
                await self._all_gone
        finally:
            await self.close()

    def local_address(self) -> bytes | None:
        """Our address as the peer sees it; None while no connection is open."""
        for connection in self._open:
            return connection.local_address()
        return None

    # --- inside ----------------------------------------------------------------------------
    def _start(self, call: Call, connection: Connection) -> None:
        timeouts = self._timeouts
        deadlines = Deadlines(timeouts, time.monotonic()) if timeouts is not None else None
        call.start(connection, self._over, self._body_limit, deadlines)
        self._watch.add(call, call.due())

    def _over(self, call: Call, connection: Connection | None) -> None:
        self._watch.discard(call)
        if connection is not None:
            self._use(connection)

    def _use(self, connection: Connection) -> None:
        """A connection is free: for the longest waiting call, else for later."""
        if not connection.reusable or self._closed or self._retired:
            connection.close()
            return
        while self._waiting:
            call = self._waiting.popleft()
            if call.future.done():  # cancelled, or out of time
                self._watch.discard(call)
                continue
            self._start(call, connection)
            return
        self._pool.put(connection, time.monotonic())

    def _gone(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._pool.drop(connection)
        if self._waiting and not self._closed:
            self._dial_for_waiting()
        if self._all_gone is not None and not self._open and not self._all_gone.done():
            self._all_gone.set_result(None)

    def _dial_for_waiting(self) -> None:
        dials = len(self._dials)
        if dials < len(self._waiting) and len(self._open) + dials < self._limit:
            task = asyncio.get_running_loop().create_task(self._open_one())
            self._dials.add(task)
            task.add_done_callback(self._dialled)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dials.discard(task)
        if not task.cancelled():
            task.result()  # what _open_one did not expect goes to the loop's exception handler
        if self._waiting and not self._closed:
            self._dial_for_waiting()

    async def _open_one(self) -> None:
        """Open one connection and give it to whoever waits longest; or fail that one."""
        loop = asyncio.get_running_loop()
        try:
            sock = await connect_once(self._dial, self.host, self.port, self._connect_timeout)
            connection = Connection(self._gone, self._known)
            protocol = as_protocol(connection)
            if self._tls is None:
                await loop.create_connection(lambda: protocol, sock=sock)
            else:
                await loop.create_connection(
                    lambda: protocol,
                    sock=sock,
                    ssl=self._tls,
                    server_hostname=self.host,
                    ssl_handshake_timeout=self._connect_timeout,
                )
        except TimeoutError:
            where = f"{self.host}:{self.port}"
            self._unreached(TransportError(f"dial tcp {where}: i/o timeout", sent=False))
        except OSError as error:
            refused = isinstance(error, DialError) and error.refused
            self._unreached(TransportError(str(error), sent=False, refused=refused))
        else:
            self.opened += 1
            self._open.add(connection)
            self._use(connection)

    def _unreached(self, error: TransportError) -> None:
        while self._waiting:
            call = self._waiting.popleft()
            self._watch.discard(call)
            if call.future.done():
                continue
            if self._unsent is not None:
                self._unsent(call, error)
            else:
                call.fail(error)
            return
