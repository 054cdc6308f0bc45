"""The relay: everything the queue-proxy does on a pod's data port, for one pod.

`Relay._serve` is the request path, in the order of contract section 3.1; an Exchange carries one
request from there to its end. Policies decide (breaker, deadlines, meter), the wire code reads and
frames; this module owns what follows from what.

Nothing on the path of an ordinary request starts a task, makes a future or arms a timer: both
connections call the Exchange, and a message is one write.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Protocol

from weir.proxy import contract
from weir.proxy.contract import RevisionSettings
from weir.proxy.policy.breaker import Admission, Breaker, Place
from weir.proxy.policy.deadlines import Deadlines, Timeouts
from weir.proxy.policy.histogram import Histogram, Latencies
from weir.proxy.policy.meter import Meter, Report
from weir.proxy.wire import answers
from weir.proxy.wire.body import chunk, last_chunk
from weir.proxy.wire.connection import Connection, TransportError
from weir.proxy.wire.dial import Dial, connect_patiently
from weir.proxy.wire.flow import BACKLOG, OTHER_SIDE
from weir.proxy.wire.head import RequestHead, ResponseHead
from weir.proxy.wire.pool import IdlePool
from weir.proxy.wire.server import BACKLOG_BYTES, ServerConnection
from weir.proxy.wire.watch import Watch

_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE"})


class Readiness(Protocol):
    """What a health check asks; `weir.proxy.probes.Prober` in production."""

    async def ready(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class RelayCounters:
    """A snapshot. `statuses` counts final responses by class, 1xx (upgrades) to 5xx.

    `integral` is request-seconds since the start: over any span, difference / length is the mean
    concurrency. `aborted` requests ended without a final status: the client left.
    """

    requests: int
    in_flight: int
    integral: float
    statuses: tuple[int, int, int, int, int]
    aborted: int
    probes: int
    waiting: int
    connections: int
    latency: Latencies

    def quantile(self, q: float) -> float:
        """Seconds from arrival to the end of the response."""
        return self.latency.quantile(q)


class Relay:
    """One pod's data port. `protocol` is the factory for `loop.create_server`.

    `dial` makes sockets where the user container listens, `offer` gives the value of Weir-Direct
    while the pod takes direct connections, `clock` is any monotonic clock in seconds.
    """

    def __init__(
        self,
        settings: RevisionSettings,
        *,
        dial: Dial,
        prober: Readiness,
        clock: Callable[[], float] = time.monotonic,
        offer: Callable[[], str | None] = lambda: None,
    ) -> None:
        limit = settings.container_concurrency
        self.settings = settings
        self.clock = clock
        self.authority = f"{settings.user_host}:{settings.user_port}".encode()
        self.pool = IdlePool(
            limit or contract.IDLE_UPSTREAM_CONNECTIONS, contract.IDLE_UPSTREAM_SECONDS, clock
        )
        self._dial = dial
        self._prober = prober
        self._offer = offer
        self._timeouts = Timeouts.of(settings)
        self._breaker = Breaker(limit) if limit else None
        self._meter = Meter(clock())
        self._watch = Watch(clock)
        self._latency = Histogram()
        self._statuses = [0, 0, 0, 0, 0]
        self._aborted = 0
        self._probes = 0
        self._draining = False
        self._drained: asyncio.Future[None] | None = None
        self._exchanges: set[Exchange] = set()
        self._clients: set[ServerConnection] = set()
        self._upstreams: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    # --- the request path --------------------------------------------------------------------
    def _serve(
        self, client: ServerConnection, head: RequestHead, piece: bytes, ended: bool
    ) -> None:
        """One request, in the order of contract section 3.1."""
        seen = head.seen
        if head.target == b"*":
            _answer(client, head, answers.reply(200))
            return
        if seen.get(b"user-agent", b"").startswith(contract.HEALTH_CHECK_AGENTS):  # 3.2
            self._health_check(client, head)
            return
        if seen.get(contract.NETWORK_PROBE) == contract.PROBE_NETWORK:
            self._network_probe(client, head)
            return
        exchange = Exchange(self, client, head, piece, ended)
        self._exchanges.add(exchange)
        exchange.deadlines = Deadlines(self._timeouts, exchange.started)  # 3.7
        self._watch.add(exchange)
        exchange.request = head.for_user(client.peer, self.authority)  # 3.3, 3.5
        if not seen.get(contract.KUBELET_PROBE):
            exchange.counted = True
            exchange.proxied = seen.get(contract.PROXY_REQUEST) == contract.PROXY_REQUEST_ACTIVATOR
            self._meter.arrive(exchange.started, exchange.proxied)  # 5.2
            if self._breaker is not None:  # 3.6
                exchange.admission = admission = self._breaker.admit(exchange.run)
                if admission.place is Place.REFUSED:
                    exchange.refuse(answers.error(503, contract.BODY_QUEUE_FULL))
                    return
                if admission.place is Place.WAITING:
                    return
        exchange.run()

    def _health_check(self, client: ServerConnection, head: RequestHead) -> None:
        """Contract section 4.1, and the question of a Weir client (design section 2)."""
        self._probes += 1
        value = head.seen.get(contract.NETWORK_PROBE, b"")
        if self._draining:
            _answer(client, head, answers.error(503, contract.BODY_SHUTTING_DOWN))
        elif value == contract.PROBE_QUEUE:
            client.exchange = check = HealthCheck(client, head)
            self.own(self._check(check))
        elif value == contract.PROBE_WEIR and head.seen[b"user-agent"].startswith(
            contract.ACTIVATOR_AGENT
        ):
            offer = self._offer()
            fields = [] if offer is None else [b"Weir-Direct: " + offer.encode()]
            _answer(client, head, answers.reply(200, contract.BODY_WEIR, *fields))
        else:
            _answer(client, head, answers.error(400, contract.BODY_UNEXPECTED_PROBE % value))

    async def _check(self, check: HealthCheck) -> None:
        ready = await self._prober.ready()
        check.answer(answers.reply(200, contract.BODY_QUEUE) if ready else answers.reply(503))

    def _network_probe(self, client: ServerConnection, head: RequestHead) -> None:
        self._probes += 1
        value = head.seen.get(contract.NETWORK_HASH, b"")
        if self._draining:
            _answer(client, head, answers.error(503, contract.BODY_SHUTTING_DOWN))
        elif not value:
            _answer(client, head, answers.error(400, contract.BODY_PROBE_WITHOUT_HASH))
        else:
            _answer(client, head, answers.reply(200, b"", b"K-Network-Hash: " + value))

    # --- for whoever runs the relay ------------------------------------------------------------
    def protocol(self) -> asyncio.Protocol:
        client = ServerConnection(self._serve, self._clients.discard)
        self._clients.add(client)
        return client

    def counters(self) -> RelayCounters:
        meter = self._meter
        one, two, three, four, five = self._statuses
        return RelayCounters(
            requests=meter.arrived,
            in_flight=meter.in_flight,
            integral=meter.integral(self.clock()),
            statuses=(one, two, three, four, five),
            aborted=self._aborted,
            probes=self._probes,
            waiting=self._breaker.waiting if self._breaker is not None else 0,
            connections=len(self._clients),
            latency=self._latency.snapshot(),
        )

    def report(self) -> Report:
        """Close a reporting period of the autoscaler's (contract section 5.2)."""
        return self._meter.report(self.clock())

    def start_draining(self) -> None:
        """Probes fail from now on; traffic is served as before (contract section 3.2)."""
        self._draining = True

    async def drained(self) -> None:
        """Return when no request is in flight; then close the clients' idle connections."""
        while self._exchanges:
            if self._drained is None or self._drained.done():
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)
        for client in list(self._clients):
            if client.idle:
                client.close()
        self.pool.close()

    def abort(self) -> None:
        """End everything at once: exchanges, connections, dials. Safe to call twice."""
        for task in self._tasks:
            task.cancel()
        for client in list(self._clients):
            client.abort()
        for exchange in list(self._exchanges):
            exchange.client_lost()
        for upstream in list(self._upstreams):
            upstream.end("the relay was stopped")
        self.pool.close()
        self._watch.close()

    # --- for exchanges ---------------------------------------------------------------------
    def open(self, exchange: Exchange) -> asyncio.Task[None]:
        """Dial the user container for an exchange; it is told by `reached` or `unreachable`."""
        return self.own(self._open(exchange))

    async def _open(self, exchange: Exchange) -> None:
        host, port = self.settings.user_host, self.settings.user_port
        loop = asyncio.get_running_loop()
        try:
            sock = await connect_patiently(self._dial, host, port)
            _, upstream = await loop.create_connection(lambda: Connection(self._gone), sock=sock)
        except OSError as error:
            exchange.unreachable(str(error))
        else:
            self._upstreams.add(upstream)
            exchange.reached(upstream)

    def _gone(self, upstream: Connection) -> None:
        self._upstreams.discard(upstream)
        self.pool.drop(upstream)

    def over(self, exchange: Exchange, status: int) -> None:
        """An exchange has really ended, on both sides. `status` 0: without a response."""
        now = self.clock()
        self._exchanges.discard(exchange)
        self._watch.discard(exchange)
        if exchange.counted:
            self._meter.depart(now, exchange.proxied)
        if status:
            self._statuses[status // 100 - 1] += 1
            self._latency.record(now - exchange.started)
        else:
            self._aborted += 1
        if exchange.admission is not None:
            exchange.admission.leave()  # the next waiter runs in here
        if self._drained is not None and not self._exchanges and not self._drained.done():
            self._drained.set_result(None)

    def own(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()  # anything unexpected goes to the loop's exception handler


def _answer(client: ServerConnection, head: RequestHead, parts: list[bytes]) -> None:
    """A whole response of our own to a request that goes no further."""
    client.write(answers.framed(parts, head.minor, head.close, head.method == b"HEAD"))
    client.finish(not head.close)


class HealthCheck:
    """A client that waits for the prober's verdict; it may leave before."""

    __slots__ = ("_client", "_head")

    def __init__(self, client: ServerConnection, head: RequestHead) -> None:
        self._client: ServerConnection | None = client
        self._head = head

    def answer(self, parts: list[bytes]) -> None:
        client, self._client = self._client, None
        if client is not None:
            _answer(client, self._head, parts)

    def client_lost(self) -> None:
        self._client = None

    def request_more(self, piece: bytes, ended: bool) -> None:
        pass  # a probe's body says nothing

    def client_tunnelled(self, data: bytes) -> None:
        pass  # cannot happen: nobody switched

    def response_hold(self) -> None:
        pass

    def response_release(self) -> None:
        pass


class Exchange:
    """One proxied request, between its client and the user container.

    It ends once, in `_leave`, and only when neither side has any more of it: that is when the
    breaker's slot is free again (contract section 3.6).
    """

    __slots__ = (
        "_chunked",
        "_client",
        "_continue",
        "_dialling",
        "_ended",
        "_head",
        "_keep",
        "_left",
        "_pending",
        "_pending_size",
        "_relay",
        "_retried",
        "_status",
        "_switched",
        "_upstream",
        "admission",
        "counted",
        "deadlines",
        "proxied",
        "request",
        "started",
    )

    deadlines: Deadlines
    request: bytes

    def __init__(
        self, relay: Relay, client: ServerConnection, head: RequestHead, piece: bytes, ended: bool
    ) -> None:
        client.exchange = self
        self._relay = relay
        self._client = client
        self._head = head
        self._pending = self._encoded(piece, ended)
        self._pending_size = len(piece)
        self._ended = ended
        self._upstream: Connection | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._continue: asyncio.TimerHandle | None = None
        self._retried = False
        self._left = False
        self._switched = False
        self._chunked = False
        self._keep = not head.close
        self._status = 0
        self.admission: Admission | None = None
        self.counted = False
        self.proxied = False
        self.started = relay.clock()

    # --- towards the user container ------------------------------------------------------------
    def run(self) -> None:
        """Its turn has come: take an idle connection, or dial."""
        upstream = self._relay.pool.take(careful=not self._replayable())
        if upstream is None:
            self._dialling = self._relay.open(self)
        else:
            self._send(upstream)

    def reached(self, upstream: Connection) -> None:
        self._dialling = None
        if self._left:
            self._relay.pool.put(upstream)
        else:
            self._send(upstream)

    def unreachable(self, why: str) -> None:
        self._dialling = None
        if not self._left:
            self._fail(why)

    def _send(self, upstream: Connection) -> None:
        self._upstream = upstream
        pending, self._pending = self._pending, []
        request = b"".join([self.request, *pending]) if pending else self.request
        upstream.ask(self, self._head.method, request)
        client = self._client
        client.release(BACKLOG)
        if client.full:
            upstream.hold(OTHER_SIDE)
        if not self._ended and not self._pending_size and self._expects():
            loop = asyncio.get_running_loop()
            self._continue = loop.call_later(contract.CONTINUE_SECONDS, self._continue_now)

    def _replayable(self) -> bool:
        head = self._head
        return head.length == 0 and head.method in _IDEMPOTENT and head.upgrade is None

    def _encoded(self, piece: bytes, ended: bool) -> list[bytes]:
        """Buffers of a piece of the request's body, framed as the request's head says."""
        if self._head.length is not None:
            return [piece] if piece else []
        buffers = chunk(piece)
        if ended:
            buffers.append(last_chunk(self._client.trailers))
        return buffers

    def request_more(self, piece: bytes, ended: bool) -> None:
        self._ended = ended
        self._pending_size += len(piece)
        buffers = self._encoded(piece, ended)
        if self._upstream is not None:
            self._upstream.send(buffers)
        else:
            self._pending += buffers
            if self._pending_size > BACKLOG_BYTES:
                self._client.hold(BACKLOG)

    def request_hold(self) -> None:
        self._client.hold(OTHER_SIDE)

    def request_release(self) -> None:
        self._client.release(OTHER_SIDE)

    # --- 100-continue (contract section 3.8) ---------------------------------------------------
    def _expects(self) -> bool:
        return self._head.seen.get(b"expect", b"").lower() == b"100-continue"

    def _continue_now(self) -> None:
        """The user container did not say 100 in time; the client shall send its body anyway."""
        self._continue = None
        if not self._status and not self._pending_size:
            self._pending_size = 1  # so it was asked for
            self._client.inform(answers.CONTINUE)

    # --- towards the client --------------------------------------------------------------------
    def response_informed(self, head: ResponseHead) -> None:
        if head.status == 100:
            if not self._expects():
                return
            self._pending_size = max(self._pending_size, 1)
        if self._head.minor:
            self._client.inform(head.for_client(1, [], b"", False))

    def response_begun(self, head: ResponseHead, piece: bytes, ended: bool) -> None:
        """The final response (contract section 3.11), with its true status also after a 1xx."""
        minor, length = self._head.minor, head.length
        self._status = head.status
        self.deadlines.wrote(self._relay.clock())
        if length is None or length < 0:
            if minor:
                self._chunked = True
            else:
                self._keep = False  # HTTP/1.0 knows the end of the connection only
        if not self._ended and not self._pending_size and self._expects():
            self._keep = False  # nobody knows whether the client sends the body now
        added = []
        if minor:
            if not self._keep:
                added.append(b"Connection: close")
        elif self._keep:
            added.append(b"Connection: keep-alive")
        data = head.for_client(minor, added, answers.date_line(), self._chunked)
        if self._chunked:
            self._client.writelines([data, *self._framed(piece, ended)])
        elif piece:
            self._client.writelines((data, piece))
        else:
            self._client.write(data)
        if ended:
            self._complete()

    def response_more(self, piece: bytes, ended: bool) -> None:
        self.deadlines.wrote(self._relay.clock())
        if self._chunked:
            self._client.writelines(self._framed(piece, ended))
        elif piece:
            self._client.write(piece)
        if ended:
            self._complete()

    def _framed(self, piece: bytes, ended: bool) -> list[bytes]:
        buffers = chunk(piece)
        if ended:
            upstream = self._upstream
            buffers.append(last_chunk(upstream.trailers if upstream is not None else []))
        return buffers

    def response_hold(self) -> None:
        if self._upstream is not None:
            self._upstream.hold(OTHER_SIDE)

    def response_release(self) -> None:
        if self._upstream is not None:
            self._upstream.release(OTHER_SIDE)

    def refuse(self, parts: list[bytes]) -> None:
        """Answer the client ourselves; whatever the user container still does is cut off."""
        head = self._head
        self._status = int(parts[0][9:12])
        if not self._ended and self._expects() and not self._pending_size:
            self._keep = False
        self._client.write(
            answers.framed(parts, head.minor, not self._keep, head.method == b"HEAD")
        )
        self._client.finish(self._keep)
        self._cut()

    def _fail(self, why: str) -> None:
        self.refuse(answers.error(502, why.encode() + b"\n"))

    def response_lost(self, error: TransportError) -> None:
        """The user container went away (contract section 3.12)."""
        upstream = self._upstream
        self._upstream = None
        if self._switched:
            self._client.close()
            self._leave()
        elif self._status:  # too late for another status: cut the response short
            if self._chunked or self._keep or self._head.minor:
                self._client.close()
            else:
                self._client.abort()  # without framing, an orderly end would look like the end
            self._leave()
        elif upstream is not None and self._stale(upstream):
            self._retried = True
            self._dialling = self._relay.open(self)
        else:
            self._fail(str(error))

    def _stale(self, upstream: Connection) -> bool:
        """Did an idle connection die under the request, and may it be sent once more?"""
        return (
            upstream.used > 1 and not upstream.answered and not self._retried and self._replayable()
        )

    # --- upgrades (contract section 3.10) ------------------------------------------------------
    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        wanted = self._head.upgrade
        got = head.upgrade or b""
        if wanted is None or got.lower() != wanted.lower():
            text = "backend tried to switch protocol %r when %r was requested"
            text %= (got.decode("latin-1"), (wanted or b"").decode("latin-1"))
            self._fail(text.replace("'", '"'))
            return
        self._switched = True
        self._status = 101
        lines = [b"Connection: Upgrade", b"Upgrade: " + got]
        self._client.write(head.for_client(1, lines, b"", False) + rest)
        early = self._client.tunnel()
        if early and self._upstream is not None:
            self._upstream.send([early])

    def response_tunnelled(self, data: bytes) -> None:
        self._client.write(data)

    def client_tunnelled(self, data: bytes) -> None:
        if self._upstream is not None:
            self._upstream.send([data])

    # --- the end -------------------------------------------------------------------------------
    def due(self) -> float:
        return self.deadlines.next()

    def expire(self, now: float) -> None:
        """A timer fired (contract section 3.7): 504, or as much of it as can still be said."""
        if self.deadlines.fired(now) is None:
            return
        text = contract.BODY_REQUEST_TIMEOUT
        client = self._client
        if self._switched:
            client.close()
        elif not self._status:
            self.refuse(answers.reply(504, text))
            return
        elif client.full:
            client.abort()  # nobody reads: nothing can be said any more
        elif self._chunked:
            client.writelines([*chunk(text), last_chunk([])])
            client.finish(self._keep)
        else:
            if not self._head.minor and not self._keep:
                client.write(text)
            client.close()
        self._cut()

    def client_lost(self) -> None:
        """The client left: so does its request, wherever it is."""
        if self._switched and self._upstream is not None:
            self._upstream.close()
            self._upstream = None
        else:
            self._status = 0
        self._cut()

    def _complete(self) -> None:
        """The response has ended by itself; the upstream connection may serve the next one."""
        upstream, self._upstream = self._upstream, None
        assert upstream is not None
        upstream.release(OTHER_SIDE)
        if upstream.reusable and self._ended:
            self._relay.pool.put(upstream)
        else:
            upstream.close()
        self._leave()
        self._client.finish(self._keep)

    def _cut(self) -> None:
        """Tear down the user container's side, wherever the request is, and end."""
        dialling, self._dialling = self._dialling, None
        if dialling is not None:
            dialling.cancel()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.forget()
        self._leave()

    def _leave(self) -> None:
        if self._left:
            return
        self._left = True
        if self._continue is not None:
            self._continue.cancel()
        self._relay.over(self, self._status)
