"""A proxied HTTP/2 request: what passes between a client's stream and the user container's.

Owns interim responses, bodies, trailers, resets, and what becomes of the one side when the other
fails (contract sections 3.7 to 3.9, 3.11, 3.12).
"""

from __future__ import annotations

from collections.abc import Callable

from weir.proxy import contract
from weir.proxy.exchange import FIELD_BYTES, HEAD_COPIES, Exchange, ExchangeBase
from weir.proxy.policy.deadlines import Timeouts
from weir.proxy.wire import answers
from weir.proxy.wire.aside import put_aside
from weir.proxy.wire.h2 import frames
from weir.proxy.wire.h2.head import MalformedBlock, ResponseFields, StreamHead, trailers
from weir.proxy.wire.h2.hpack import Block, encode
from weir.proxy.wire.h2.sending import join
from weir.proxy.wire.h2.server import ClientStream
from weir.proxy.wire.h2.user import UserLink, UserStream

_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE"})


class StreamExchange(ExchangeBase[ClientStream, StreamHead]):
    """`request` is the header block for the user container, to be set before `start`."""

    __slots__ = (
        "_complete",
        "_ended",
        "_link",
        "_pending",
        "_retried",
        "_sized",
        "_trailers",
        "_user",
        "request",
    )

    request: bytes

    def __init__(
        self,
        link: UserLink,
        client: ClientStream,
        head: StreamHead,
        ended: bool,
        timeouts: Timeouts,
        clock: Callable[[], float],
        over: Callable[[Exchange], None],
    ) -> None:
        super().__init__(client, head, timeouts, clock, over)
        client.exchange = client.proxied = self
        self._link = link
        self._user: UserStream | None = None
        self._ended = ended
        self._pending: list[tuple[bytes, bool]] = []
        self._trailers: bytes | None = None
        self._retried = False
        self._complete = False  # the user container said all of its response
        self._sized = False  # the response told its length

    # --- towards the user container ------------------------------------------------------------
    def start(self) -> None:
        """Its turn has come: take a stream, or wait for one."""
        self._link.ask(self)

    def opened(self, stream: UserStream) -> None:
        self._user = stream
        connection = stream.connection
        pending, self._pending = self._pending, []
        bodyless = self._ended and not pending and self._trailers is None
        connection.send_headers(stream, self.request, bodyless)
        for piece, ended in pending:
            connection.send_data(stream, piece, ended, self.client)
        if self._trailers is not None:
            connection.send_trailers(stream, self._trailers)

    def unreachable(self, why: str) -> None:
        self._fail(contract.FAILURE_DIAL, why)

    def request_more(self, piece: bytes, ended: bool) -> None:
        self.received += len(piece)
        self._ended = ended
        if self._user is not None:
            self._user.connection.send_data(self._user, piece, ended, self.client)
        elif self._complete:  # nobody waits for it any more
            self.client.connection.credit(self.client, len(piece))
        else:  # no credit for the stream: its window bounds this
            put_aside(len(piece))
            self.client.connection.credit_ahead(self.client, len(piece))
            if not join(self._pending, piece, ended):
                self._pending.append((piece, ended))

    def request_trailers(self, block: bytes) -> None:
        self._ended = True
        if self._user is not None:
            self._user.connection.send_trailers(self._user, block)
        else:
            self._trailers = block
            put_aside(len(block))

    # --- towards the client --------------------------------------------------------------------
    def response_headers(self, block: Block | None, ended: bool) -> None:
        try:
            if block is None:
                raise MalformedBlock("it is too large")
            if self.status:
                self._response_trailers(block, ended)
                return
            head = ResponseFields.of(block)
            if head.status < 200 and ended:
                raise MalformedBlock("an interim response ended the stream")
        except MalformedBlock as error:
            self._broken(f"http2: malformed header block: {error}")
            return
        connection = self.client.connection
        if head.status < 200:
            connection.send_headers(self.client, head.block, False)
            return
        self.status = self.user_status = head.status
        self._sized = head.length is not None
        self._complete = ended
        data = head.block if head.dated else head.block + _date()
        if not ended:
            self.answered = now = self.clock()
            self.deadlines.wrote(now)
        connection.send_headers(self.client, data, ended)

    def _response_trailers(self, block: Block, ended: bool) -> None:
        if not ended:
            raise MalformedBlock("a second head")
        trailing = trailers(block)
        self._complete = True
        self.client.connection.send_trailers(self.client, trailing)

    def response_data(self, piece: bytes, ended: bool) -> None:
        user = self._user
        if not self.status:
            if user is not None:
                user.connection.credit(user, len(piece))
            self._broken("http2: data before the head of a response")
            return
        self.sent += len(piece)
        self._complete = ended
        if not ended:
            self.deadlines.wrote(self.clock())
        self.client.connection.send_data(self.client, piece, ended, user)

    def response_sent(self) -> None:
        """The client has all of it: so it is over on both sides."""
        user, self._user = self._user, None
        if user is not None:
            if user.open_out:  # the request has not ended, and nobody waits for that any more
                user.drop(frames.NO_ERROR)
            else:
                user.asker = None
                self._link.next()
        self._leave()

    def response_reset(self, code: int) -> None:
        """The user container gave the stream up: or just the rest of the request."""
        self._user = None
        if self._complete:
            return  # the client still gets all of it
        if self.status:
            self._cut_short(code if code != frames.NO_ERROR else frames.INTERNAL_ERROR)
        elif code == frames.REFUSED_STREAM and self._may_retry():
            self._retry()
        else:
            self._fail(contract.FAILURE_LOST, f"stream error: RST_STREAM with code {code}")

    def response_lost(self, why: str, untouched: bool) -> None:
        user, self._user = self._user, None
        if self._complete:
            return
        stale = user is not None and user.connection.used > 1 and self.head.method in _IDEMPOTENT
        if self.status:
            self._cut_short(frames.INTERNAL_ERROR)
        elif (untouched or stale) and self._may_retry():
            self._retry()
        else:
            self._fail(contract.FAILURE_LOST, why)

    def _may_retry(self) -> bool:
        return not self._retried and self._ended and not self.received and self._trailers is None

    def _retry(self) -> None:
        self._retried = True
        self._link.ask(self)

    # --- the end -------------------------------------------------------------------------------
    def refuse(self, parts: list[bytes]) -> None:
        """Answer the client ourselves; whatever the user container still does is cut off."""
        self.status = int(parts[0][9:12])
        self.sent = 0 if self.head.method == b"HEAD" else len(parts[-1])
        self._drop(frames.CANCEL)
        self.client.answer(self.head, parts)
        self._leave()

    def _broken(self, why: str) -> None:
        """The user container does not speak HTTP."""
        if self.status:
            self._drop(frames.PROTOCOL_ERROR)
            self._cut_short(frames.INTERNAL_ERROR)
        else:
            self._fail(contract.FAILURE_LOST, why)

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
        text = contract.BODY_REQUEST_TIMEOUT
        client = self.client
        if not self.status:
            self.refuse(answers.reply(504, text))
            return
        self._drop(frames.CANCEL)
        if self._sized or client.queue is not None or not client.open_out:
            self._cut_short(frames.PROTOCOL_ERROR)
            return
        client.exchange = client.proxied = None
        client.connection.send_data(client, text, True, None)
        self._leave()

    def client_lost(self) -> None:
        self.failure = contract.FAILURE_CLIENT
        self.status = 0
        self._drop(frames.CANCEL)
        self._leave()

    def weigh(self) -> int:
        head = HEAD_COPIES * len(self.request) + FIELD_BYTES * len(self.head.fields())
        trailing = 0 if self._trailers is None else len(self._trailers)
        return head + trailing + sum(len(piece) for piece, _ in self._pending)

    def _drop(self, code: int) -> None:
        """Tear down the user container's side, wherever the request is."""
        self._link.forget(self)
        for piece, _ in self._pending:
            self.client.connection.credit(self.client, len(piece))
        self._pending.clear()
        user, self._user = self._user, None
        if user is not None:
            user.drop(code)


def _date() -> bytes:
    name, _, value = answers.date_line().partition(b": ")
    return encode([(name.lower(), value)])
