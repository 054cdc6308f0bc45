"""A proxied HTTP/1.1 request whose client goes on in HTTP/2 while it runs (`Upgrade: h2c`).

Owns what passes between the user container, which is asked in HTTP/1.1 like for any other client
of its revision, and stream 1 of the client's connection (contract section 3.9). One request on a
connection is like this, so it opens a connection of its own and never takes a stale one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from weir.proxy import contract
from weir.proxy.exchange import HEAD_COPIES, Exchange, ExchangeBase
from weir.proxy.policy.deadlines import Timeouts
from weir.proxy.wire import answers
from weir.proxy.wire.connection import Connection, TransportError
from weir.proxy.wire.flow import OTHER_SIDE, Flow
from weir.proxy.wire.h2 import frames
from weir.proxy.wire.h2.hpack import Field, encode
from weir.proxy.wire.h2.sending import Sender, Stream
from weir.proxy.wire.h2.server import ClientStream
from weir.proxy.wire.head import RequestHead
from weir.proxy.wire.response import ResponseHead
from weir.proxy.wire.upstream import Upstream

_HELD_BYTES = 256 << 10
"""What may wait for the client's windows; the user container is held above it."""


class SwitchedExchange(ExchangeBase[ClientStream, RequestHead]):
    """`request` is the head for the user container, to be set before `start`."""

    __slots__ = (
        "_body",
        "_connection",
        "_dialling",
        "_sized",
        "_unsent",
        "_user",
        "request",
    )

    request: bytes

    def __init__(
        self,
        user: Upstream,
        client: ClientStream,
        head: RequestHead,
        body: bytes,
        timeouts: Timeouts,
        over: Callable[[Exchange], None],
    ) -> None:
        super().__init__(client, head, timeouts, user.clock, over)
        client.exchange = client.proxied = self
        self.received = len(body)
        self._user = user
        self._body = body
        self._dialling: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._unsent: _Unsent | None = None
        self._sized = False  # the response told its length

    # --- towards the user container ------------------------------------------------------------
    def start(self) -> None:
        self._dialling = self._user.dial(self)

    def reached(self, connection: Connection) -> None:
        self._dialling = None
        if self.left:
            self._user.put(connection, self.clock())
            return
        self._connection = connection
        self._unsent = _Unsent(connection.flow)
        connection.ask(self, self.head.method, self.request + self._body)

    def unreachable(self, why: str) -> None:
        self._dialling = None
        if not self.left:
            self._fail(contract.FAILURE_DIAL, why)

    def request_more(self, piece: bytes, ended: bool) -> None:
        raise AssertionError("the request ended before its client switched")

    def request_trailers(self, block: bytes) -> None:
        raise AssertionError("the request ended before its client switched")

    def request_hold(self) -> None:
        """All of the request was there to begin with."""

    def request_release(self) -> None:
        pass

    # --- towards the client --------------------------------------------------------------------
    def response_informed(self, head: ResponseHead) -> None:
        if head.status != 100:  # who sent all of the request needs no invitation
            self.client.connection.send_headers(
                self.client, _block(head, head.for_interim()), False
            )

    def response_begun(self, head: ResponseHead, piece: bytes, ended: bool) -> None:
        self.status = self.user_status = head.status
        self._sized = b"content-length" in head.seen
        date = b"" if b"date" in head.seen else answers.date_line()
        block = _block(head, head.for_client(1, True, False, date))
        if head.length is None and b"trailer" in head.seen:
            block += encode([(b"trailer", head.seen[b"trailer"])])
        bodyless = ended and not piece and not self._trailers()
        self.client.connection.send_headers(self.client, block, bodyless)
        if not bodyless:
            self._pass_on(piece, ended)
        if ended:
            self._completed()
        else:
            self.answered = now = self.clock()
            self.deadlines.wrote(now)

    def response_more(self, piece: bytes, ended: bool) -> None:
        self._pass_on(piece, ended)
        if ended:
            self._completed()
        else:
            self.deadlines.wrote(self.clock())

    def _pass_on(self, piece: bytes, ended: bool) -> None:
        self.sent += len(piece)
        trailing = self._trailers() if ended else []
        connection, unsent = self.client.connection, self._unsent
        source: Stream | None = None
        if unsent is not None:
            unsent.size += len(piece)
            source = unsent.stream
        if piece or not trailing:
            connection.send_data(self.client, piece, ended and not trailing, source)
        if trailing:
            connection.send_trailers(self.client, encode(trailing))

    def _trailers(self) -> list[Field]:
        return _fields(self._connection.trailers) if self._connection is not None else []

    def _completed(self) -> None:
        """The user container has said all; the client may still have to take it."""
        connection, self._connection = self._connection, None
        unsent, self._unsent = self._unsent, None
        if unsent is not None:
            unsent.forget()
        if connection is not None:
            if connection.reusable:
                self._user.put(connection, self.clock())
            else:
                connection.close()

    def response_sent(self) -> None:
        self._leave()

    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        self._fail(contract.FAILURE_LOST, "can't switch protocols on a stream of HTTP/2")

    def response_tunnelled(self, data: bytes) -> None:
        raise AssertionError("nothing is tunnelled on a stream")

    def response_lost(self, error: TransportError) -> None:
        """The user container went away (contract section 3.12)."""
        self._connection = None
        if self.status:
            self._cut_short(frames.INTERNAL_ERROR)
        else:
            self._fail(contract.FAILURE_LOST, str(error))

    # --- the end -------------------------------------------------------------------------------
    def refuse(self, parts: list[bytes]) -> None:
        """Answer the client ourselves; whatever the user container still does is cut off."""
        self.status = int(parts[0][9:12])
        self.sent = 0 if self.head.method == b"HEAD" else len(parts[-1])
        self._cut()
        self.client.answer(self.head, parts)
        self._leave()

    def _cut_short(self, code: int) -> None:
        """A response that has begun can't be completed (contract section 3.12)."""
        self.failure = self.failure or contract.FAILURE_LOST
        client = self.client
        client.exchange = client.proxied = None
        client.connection.end_stream(client, code)
        self._leave()

    def expire(self, now: float) -> None:
        """A timer fired (contract section 3.7): 504, or as much of it as can still be said."""
        if self.deadlines.fired(now) is None:
            return
        self.failure = contract.FAILURE_TIMEOUT
        client = self.client
        if not self.status:
            self.refuse(answers.reply(504, contract.BODY_REQUEST_TIMEOUT))
            return
        self._cut()
        if self._sized or client.queue is not None:
            self._cut_short(frames.PROTOCOL_ERROR)
            return
        client.exchange = client.proxied = None
        client.connection.send_data(client, contract.BODY_REQUEST_TIMEOUT, True, None)
        self._leave()

    def client_lost(self) -> None:
        self.failure = contract.FAILURE_CLIENT
        self.status = 0
        self._cut()
        self._leave()

    def weigh(self) -> int:
        connection, unsent = self._connection, self._unsent
        rest = 0 if connection is None else connection.weigh()
        own = HEAD_COPIES * len(self.request) + len(self._body)
        return own + rest + (0 if unsent is None else unsent.size)

    def _cut(self) -> None:
        """Tear down the user container's side, wherever the request is."""
        dialling, self._dialling = self._dialling, None
        if dialling is not None:
            dialling.cancel()
        connection, self._connection = self._connection, None
        unsent, self._unsent = self._unsent, None
        if unsent is not None:
            unsent.forget()
        if connection is not None:
            connection.forget()


class _Unsent(Sender[Stream]):
    """What waits for the client's windows: takes credit in the place of a connection of HTTP/2."""

    __slots__ = ("_flow", "size", "stream")

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self._flow: Flow | None = flow
        self.stream = Stream(self, 0, 0)
        self.size = 0

    def credit_ahead(self, stream: Stream, size: int) -> None:
        if self._flow is not None and self.size > _HELD_BYTES:
            self._flow.hold(OTHER_SIDE)

    def credit(self, stream: Stream, size: int) -> None:
        self.size -= size
        if self._flow is not None and self.size <= _HELD_BYTES:
            self._flow.release(OTHER_SIDE)

    def forget(self) -> None:
        """The connection is somebody else's from now on."""
        if self._flow is not None:
            self._flow.release(OTHER_SIDE)
            self._flow = None


def _fields(lines: list[bytes]) -> list[Field]:
    pairs = (line.partition(b":") for line in lines)
    return [(name.lower(), value.strip(b" \t")) for name, _, value in pairs]


def _block(head: ResponseHead, rendered: bytes) -> bytes:
    """A head that was rendered for a client of HTTP/1.1, for one of HTTP/2."""
    lines = rendered[:-4].split(b"\r\n")[1:]
    return encode([(b":status", b"%d" % head.status), *_fields(lines)])
