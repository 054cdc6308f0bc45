"""A proxied HTTP/1 request: what passes between its client and the user container.

Owns bodies, interim responses, upgrades, and what becomes of the one side when the other fails
(contract sections 3.7, 3.8, 3.10 to 3.12).

Both connections call the Exchange; it starts no task and arms no timer unless the user container
has to be dialled, or keeps a client waiting that asked to be told to continue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from weir.proxy import contract
from weir.proxy.exchange import HEAD_COPIES, Exchange, ExchangeBase
from weir.proxy.policy.deadlines import Timeouts
from weir.proxy.wire import answers
from weir.proxy.wire.aside import put_aside
from weir.proxy.wire.body import chunk, last_chunk
from weir.proxy.wire.connection import Connection, TransportError
from weir.proxy.wire.flow import BACKLOG, OTHER_SIDE
from weir.proxy.wire.head import RequestHead
from weir.proxy.wire.response import ResponseHead
from weir.proxy.wire.server import BACKLOG_BYTES, ServerConnection
from weir.proxy.wire.upstream import Upstream

_JOINED_BYTES = 16 << 10
"""Up to this size head and body are copied into one buffer; above, two buffers cost less."""
_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE"})


class Http1Exchange(ExchangeBase[ServerConnection, RequestHead]):
    """`request` is the head for the user container, to be set before `start`."""

    __slots__ = (
        "_chunked",
        "_connection",
        "_continue",
        "_dialling",
        "_ended",
        "_keep",
        "_pending",
        "_pending_size",
        "_replayable",
        "_retried",
        "_user",
        "request",
    )

    request: bytes

    def __init__(
        self,
        user: Upstream,
        client: ServerConnection,
        head: RequestHead,
        piece: bytes,
        ended: bool,
        timeouts: Timeouts,
        over: Callable[[Exchange], None],
    ) -> None:
        ExchangeBase.__init__(self, client, head, timeouts, user.clock, over)
        client.exchange = self
        self._user = user
        if head.length is None:
            self._pending = self._encoded(piece, ended)
        else:
            self._pending = [piece] if piece else []
        self.received = self._pending_size = len(piece)
        self._ended = ended
        self._keep = not head.close
        self._connection: Connection | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._continue: asyncio.TimerHandle | None = None
        self._chunked = False  # how the client gets the body
        self._replayable = False
        self._retried = False

    # --- towards the user container ------------------------------------------------------------
    def start(self) -> None:
        """Its turn has come: take an idle connection, or dial."""
        head = self.head
        replayable = head.length == 0 and head.method in _IDEMPOTENT and head.upgrade is None
        self._replayable = replayable
        connection = self._user.take(careful=not replayable)
        if connection is None:
            self._dialling = self._user.dial(self)
        else:
            self._send(connection)

    def reached(self, connection: Connection) -> None:
        self._dialling = None
        if self.left:
            self._user.put(connection, self.clock())
        else:
            self._send(connection)

    def unreachable(self, why: str) -> None:
        self._dialling = None
        if not self.left:
            self._fail(contract.FAILURE_DIAL, why)

    def _send(self, connection: Connection) -> None:
        self._connection = connection
        client = self.client
        request = self.request
        if self._pending:
            request = b"".join((request, *self._pending))
            self._pending.clear()
            client.flow.release(BACKLOG)
        connection.ask(self, self.head.method, request)
        if client.full:
            connection.flow.hold(OTHER_SIDE)
        if not self._ended and self._unasked():
            loop = asyncio.get_running_loop()
            self._continue = loop.call_later(contract.CONTINUE_SECONDS, self._continue_now)

    def _encoded(self, piece: bytes, ended: bool) -> list[bytes]:
        """Buffers of a piece of the request's body, framed as the request's head says."""
        if self.head.length is not None:
            return [piece] if piece else []
        buffers = chunk(piece)
        if ended:
            buffers.append(last_chunk(self.client.trailers))
        return buffers

    def request_more(self, piece: bytes, ended: bool) -> None:
        self._ended = ended
        self.received += len(piece)
        self._pending_size += len(piece)
        buffers = self._encoded(piece, ended)
        if self._connection is not None:
            self._connection.send(buffers)
        else:
            self._pending += buffers
            put_aside(len(piece))
            if self._pending_size > BACKLOG_BYTES:
                self.client.flow.hold(BACKLOG)

    def request_hold(self) -> None:
        self.client.flow.hold(OTHER_SIDE)

    def request_release(self) -> None:
        self.client.flow.release(OTHER_SIDE)

    # --- 100-continue (contract section 3.8) ---------------------------------------------------
    def _expects(self) -> bool:
        """Not for HTTP/1.0, which knows no interim responses (RFC 9110, 10.1.1)."""
        head = self.head
        return head.minor == 1 and head.seen.get(b"expect", b"").lower() == b"100-continue"

    def _unasked(self) -> bool:
        """The client may still be waiting to be asked for its body, so nobody knows if it comes."""
        return not self._pending_size and self._expects()

    def _continue_now(self) -> None:
        """The user container did not say 100 in time; the client shall send its body anyway."""
        self._continue = None
        if not self.status and not self._pending_size:
            self._pending_size = 1  # so it was asked for
            self.client.inform(answers.CONTINUE)

    # --- towards the client --------------------------------------------------------------------
    def response_informed(self, head: ResponseHead) -> None:
        if head.status == 100:
            if not self._expects():
                return
            self._pending_size = max(self._pending_size, 1)
        if self.head.minor:
            self.client.inform(head.for_interim())

    def response_begun(self, head: ResponseHead, piece: bytes, ended: bool) -> None:
        """The final response (contract section 3.11), with its true status also after a 1xx."""
        minor, length = self.head.minor, head.length
        self.status = self.user_status = head.status
        self.sent = len(piece)
        if length is None or length < 0:
            if minor:
                self._chunked = True
            else:
                self._keep = False  # HTTP/1.0 knows the end of the connection only
        if not self._ended and self._unasked():
            self._keep = False
        date = b"" if b"date" in head.seen else answers.date_line()
        data = head.for_client(minor, self._keep, self._chunked, date)
        if self._chunked:
            self.client.writelines([data, *self._framed(piece, ended)])
        elif len(piece) > _JOINED_BYTES:
            self.client.writelines((data, piece))
        else:
            self.client.write(data + piece)
        if ended:
            self._complete()
        else:
            self.answered = now = self.clock()
            self.deadlines.wrote(now)

    def response_more(self, piece: bytes, ended: bool) -> None:
        self.sent += len(piece)
        if self._chunked:
            self.client.writelines(self._framed(piece, ended))
        elif piece:
            self.client.write(piece)
        if ended:
            self._complete()
        else:
            self.deadlines.wrote(self.clock())

    def _framed(self, piece: bytes, ended: bool) -> list[bytes]:
        buffers = chunk(piece)
        if ended:
            connection = self._connection
            buffers.append(last_chunk(connection.trailers if connection is not None else []))
        return buffers

    def response_hold(self) -> None:
        if self._connection is not None:
            self._connection.flow.hold(OTHER_SIDE)

    def response_release(self) -> None:
        if self._connection is not None:
            self._connection.flow.release(OTHER_SIDE)

    def refuse(self, parts: list[bytes]) -> None:
        """Answer the client ourselves; whatever the user container still does is cut off."""
        head = self.head
        self.status = int(parts[0][9:12])
        self.sent = 0 if head.method == b"HEAD" else len(parts[-1])
        if not self._ended and self._unasked():
            self._keep = False
        self.client.write(answers.framed(parts, head.minor, not self._keep, head.method == b"HEAD"))
        self._cut()
        self.client.finish(self._keep)  # last, because the client's next request starts in it

    def response_lost(self, error: TransportError) -> None:
        """The user container went away (contract section 3.12)."""
        connection = self._connection
        self._connection = None
        if self.upgraded:
            self.client.close()
            self._leave()
            return
        self.failure = contract.FAILURE_LOST
        if self.status:  # too late for another status: cut the response short
            if self._chunked or self._keep or self.head.minor:
                self.client.close()
            else:
                self.client.abort()  # without framing, an orderly end would look like the end
            self._leave()
        elif connection is not None and self._stale(connection):
            self.failure = ""
            self._retried = True
            self._dialling = self._user.dial(self)
        else:
            self._fail(contract.FAILURE_LOST, str(error))

    def _stale(self, connection: Connection) -> bool:
        """Did an idle connection die under the request, and may it be sent once more?"""
        return (
            connection.used > 1
            and not connection.answered
            and not self._retried
            and self._replayable
        )

    # --- upgrades (contract section 3.10) ------------------------------------------------------
    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        wanted = self.head.upgrade
        got = head.upgrade or b""
        if wanted is None or got.lower() != wanted.lower():
            text = "backend tried to switch protocol %r when %r was requested"
            text %= (got.decode("latin-1"), (wanted or b"").decode("latin-1"))
            self._fail(contract.FAILURE_LOST, text.replace("'", '"'))
            return
        self.upgraded = True
        self.status = self.user_status = 101
        self.client.write(head.for_switching() + rest)
        early = self.client.tunnel()
        if early and self._connection is not None:
            self._connection.send([early])

    def response_tunnelled(self, data: bytes) -> None:
        self.client.write(data)

    def client_tunnelled(self, data: bytes) -> None:
        if self._connection is not None:
            self._connection.send([data])

    # --- the end -------------------------------------------------------------------------------
    def expire(self, now: float) -> None:
        """A timer fired (contract section 3.7): 504, or as much of it as can still be said."""
        if self.deadlines.fired(now) is None:
            return
        self.failure = contract.FAILURE_TIMEOUT
        text = contract.BODY_REQUEST_TIMEOUT
        client = self.client
        if self.upgraded:
            client.close()
        elif not self.status:
            self.refuse(answers.reply(504, text))
            return
        elif client.full:
            client.abort()  # nobody reads: nothing can be said any more
        elif self._chunked:
            client.writelines([*chunk(text), last_chunk([])])
            self._cut()
            client.finish(self._keep)
            return
        else:
            if not self.head.minor and not self._keep:
                client.write(text)
            client.close()
        self._cut()

    def client_lost(self) -> None:
        """The client left: so does its request, wherever it is."""
        self.failure = contract.FAILURE_CLIENT
        if self.upgraded and self._connection is not None:
            self._connection.close()
            self._connection = None
        else:
            self.status = 0
        self._cut()

    def weigh(self) -> int:
        connection = self._connection
        rest = self._pending_size if connection is None else connection.weigh()
        return HEAD_COPIES * len(self.request) + rest

    def _complete(self) -> None:
        """The response has ended by itself; its connection may serve the next one."""
        connection, self._connection = self._connection, None
        assert connection is not None
        if connection.flow.held:
            connection.flow.release(OTHER_SIDE)
        if connection.reusable and self._ended:
            self._user.put(connection, self.clock())
        else:
            connection.close()
        self._leave()
        self.client.finish(self._keep)

    def _cut(self) -> None:
        """Tear down the user container's side, wherever the request is, and end."""
        dialling, self._dialling = self._dialling, None
        if dialling is not None:
            dialling.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.forget()
        self._leave()

    def _leave(self) -> None:
        if self._continue is not None:
            self._continue.cancel()
        if not self.left:  # as in Exchange: this is on the path of every request
            self.left = True
            self._over(self)
