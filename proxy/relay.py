"""The relay: everything the queue-proxy does on a pod's data port, for one pod.

`Relay._serve` is the request path, in the order of contract section 3.1; an Exchange carries one
request from there to its end. Policies decide (breaker, deadlines, meter), the wire code reads and
frames; this module owns what follows from what.

Nothing on the path of an ordinary request starts a task, makes a future or arms a timer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

from weir.proxy import contract
from weir.proxy.contract import RevisionSettings
from weir.proxy.exchange import Client, Exchange, Head, Observer
from weir.proxy.exchange1 import Http1Exchange
from weir.proxy.policy.breaker import REFUSED, RUNNING, Breaker
from weir.proxy.policy.budget import Share
from weir.proxy.policy.deadlines import Timeouts
from weir.proxy.policy.histogram import Histogram, Latencies
from weir.proxy.policy.meter import Meter, Report
from weir.proxy.wire import answers
from weir.proxy.wire.clients import Clients
from weir.proxy.wire.dial import Dial
from weir.proxy.wire.head import RequestHead
from weir.proxy.wire.protocol import as_protocol
from weir.proxy.wire.server import ServerConnection
from weir.proxy.wire.upstream import Upstream
from weir.proxy.wire.waiting import Waiting
from weir.proxy.wire.watch import Watch

if TYPE_CHECKING:
    from weir.proxy.wire.h2.head import StreamHead
    from weir.proxy.wire.h2.sending import Ahead
    from weir.proxy.wire.h2.server import ClientConnection, ClientStream


class Readiness(Protocol):
    """What a health check asks; `weir.proxy.probes.Prober` in production."""

    async def ready(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class RelayCounters:
    """A snapshot. `statuses` counts final responses by class, 1xx (upgrades) to 5xx (and beyond).

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
    while the pod takes direct connections, `clock` is any monotonic clock in seconds. Clients'
    connections are charged to `share`.
    """

    def __init__(
        self,
        settings: RevisionSettings,
        *,
        dial: Dial,
        prober: Readiness,
        clock: Callable[[], float] = time.monotonic,
        offer: Callable[[], str | None] = lambda: None,
        observers: Sequence[Observer] = (),
        share: Share | None = None,
    ) -> None:
        limit = settings.container_concurrency
        self.settings = settings
        self._clock = clock
        self._user = Upstream(
            settings.user_host,
            settings.user_port,
            dial,
            limit or contract.IDLE_UPSTREAM_CONNECTIONS,
            clock,
        )
        if settings.http2:
            import weir.proxy.exchange2  # noqa: F401  now, and not under the first request
        self._prober = prober
        self._offer = offer
        self.observers = list(observers)
        self._timeouts = Timeouts.of(settings)
        self._no_timer_before = self._timeouts.shortest
        self._breaker = Breaker(limit) if limit else None
        self._meter = Meter(clock())
        self._running: Watch[Exchange] = Watch(clock)
        self._latency = Histogram()
        self._statuses = [0] * 10  # by the first digit
        self._aborted = 0
        self._probes = 0
        self.last_arrival = -inf
        """When the last request came that is no probe, of the relay's clock."""
        self._draining = False
        self._retired = False
        self._drained: asyncio.Future[None] | None = None
        self.clients: Clients[ServerConnection | ClientConnection] = Clients(share)
        self._checks: set[asyncio.Task[None]] = set()
        self._ahead: Ahead | None = None

    # --- the request path --------------------------------------------------------------------
    def _serve(
        self, client: ServerConnection, head: RequestHead, piece: bytes, ended: bool
    ) -> None:
        """One request, in the order of contract section 3.1."""
        if ended and b"http2-settings" in head.seen and self._switched(client, head, piece):
            return
        if self._answered(client, head):
            return
        exchange = Http1Exchange(self._user, client, head, piece, ended, self._timeouts, self._over)
        self._begin(exchange)
        exchange.request = head.for_user(client.peer, self._user.authority)  # 3.3, 3.5
        self._admit(exchange)

    def _speak_http2(self, transport: asyncio.Transport, data: bytes) -> None:
        """A client began with HTTP/2's preface: a connection of many requests takes over."""
        client = self._http2_client()
        transport.set_protocol(as_protocol(client))
        client.start(transport, data)
        if self._retired:
            client.retire()

    def _switched(self, client: ServerConnection, head: RequestHead, piece: bytes) -> bool:
        """`Upgrade: h2c` (contract section 3.9): the request becomes stream 1, if it is all here.

        A user container whose port is named h2c is asked in HTTP/2, another one in HTTP/1.1: nobody
        knows that it speaks HTTP/2 because a client would like to.
        """
        encoded = head.http2_settings
        if encoded is None or head.length is None:
            return False
        from base64 import b64decode

        from weir.proxy.wire.h2.endpoint import Fault
        from weir.proxy.wire.h2.head import MalformedBlock, StreamHead, of_http1

        try:
            changes = b64decode(encoded + b"=" * (-len(encoded) % 4), b"-_", validate=True)
            first = StreamHead(of_http1(head)) if self.settings.http2 else None
        except (ValueError, MalformedBlock):
            return False
        if len(changes) % 6:
            return False
        successor = self._http2_client()
        transport = client.hand_over(successor)
        try:
            stream = successor.start_upgraded(transport, changes)
            if first is None:
                self._serve_switched(stream, head, piece)
            else:
                self._serve_stream(stream, first, not piece)
                if piece:
                    stream.data(piece, True)
            if self._retired:
                successor.retire()
        except Fault as fault:
            successor.fail(fault)
        return True

    def _serve_switched(self, client: ClientStream, head: RequestHead, piece: bytes) -> None:
        from weir.proxy.exchange_switched import SwitchedExchange

        if self._answered(client, head):
            return
        head.keep_upgrade()
        exchange = SwitchedExchange(self._user, client, head, piece, self._timeouts, self._over)
        self._begin(exchange)
        exchange.request = head.for_user(client.peer, self._user.authority)
        self._admit(exchange)

    def _http2_client(self) -> ClientConnection:
        from weir.proxy.wire.h2.sending import Ahead
        from weir.proxy.wire.h2.server import ClientConnection
        from weir.proxy.wire.h2.user import UserLink

        if self._ahead is None:
            self._ahead = Ahead(self.clients.turns)
        link = UserLink(self._user.reach, self._ahead, self.clients.share)
        client = ClientConnection(self._serve_stream, self.clients.discard, link)
        link.serve(client)
        self.clients.add(client)
        return client

    def _serve_stream(self, client: ClientStream, head: StreamHead, ended: bool) -> None:
        from weir.proxy.exchange2 import StreamExchange

        if self._answered(client, head):
            return
        link = client.connection.link
        exchange = StreamExchange(
            link, client, head, ended, self._timeouts, self._clock, self._over
        )
        self._begin(exchange)
        exchange.request = head.for_user(client.peer, self._user.authority)
        self._admit(exchange)

    def _answered(self, client: Client, head: Head) -> bool:
        """Is it a request that goes no further (contract section 3.2)?"""
        seen = head.seen
        if head.target == b"*":
            client.answer(head, answers.reply(200))
            return True
        if seen.get(b"user-agent", b"").startswith(contract.HEALTH_CHECK_AGENTS):
            self._health_check(client, head)
            return True
        if seen.get(contract.NETWORK_PROBE) == contract.PROBE_NETWORK:
            self._network_probe(client, head)
            return True
        return False

    def _begin(self, exchange: Exchange) -> None:
        self.last_arrival = now = exchange.started
        self._running.add(exchange, now + self._no_timer_before)  # 3.7
        for observer in self.observers:
            observer.begun(exchange)

    def _admit(self, exchange: Exchange) -> None:
        """Count it, and let it go on, wait, or end."""
        seen = exchange.head.seen
        if contract.KUBELET_PROBE not in seen or not seen[contract.KUBELET_PROBE]:
            exchange.counted = True
            exchange.proxied = seen.get(contract.PROXY_REQUEST) == contract.PROXY_REQUEST_ACTIVATOR
            self._meter.arrive(exchange.started, exchange.proxied)  # 5.2
            if self._breaker is not None:  # 3.6
                exchange.admission = admission = self._breaker.admit(exchange.resume)
                if admission.place is not RUNNING:
                    if admission.place is REFUSED:
                        exchange.failure = contract.FAILURE_REFUSED
                        exchange.refuse(answers.error(503, contract.BODY_QUEUE_FULL))
                    return
        exchange.start()

    def _health_check(self, client: Client, head: Head) -> None:
        """Contract section 4.1, and the question of a Weir client (design section 2)."""
        self._probes += 1
        value = head.seen.get(contract.NETWORK_PROBE, b"")
        if self._draining:
            self._say(client, head, answers.error(503, contract.BODY_SHUTTING_DOWN))
        elif value == contract.PROBE_QUEUE:
            waiting = Waiting(client, head)
            task = asyncio.get_running_loop().create_task(self._check(waiting))
            self._checks.add(task)
            task.add_done_callback(self._checked)
        elif value == contract.PROBE_WEIR and head.seen[b"user-agent"].startswith(
            contract.ACTIVATOR_AGENT
        ):
            offer = self._offer()
            fields = [] if offer is None else [b"Weir-Direct: " + offer.encode()]
            self._say(client, head, answers.reply(200, contract.BODY_WEIR, *fields))
        else:
            self._say(client, head, answers.error(400, contract.BODY_UNEXPECTED_PROBE % value))

    async def _check(self, waiting: Waiting) -> None:
        started = self._clock()
        ready = await self._prober.ready()
        parts = answers.reply(200, contract.BODY_QUEUE) if ready else answers.reply(503)
        client, head = waiting.client, waiting.head
        if waiting.answer(parts):
            self._said(client, head, parts, self._clock() - started)

    def _checked(self, task: asyncio.Task[None]) -> None:
        self._checks.discard(task)
        if not task.cancelled():
            task.result()  # anything unexpected goes to the loop's exception handler

    def _network_probe(self, client: Client, head: Head) -> None:
        self._probes += 1
        value = head.seen.get(contract.NETWORK_HASH, b"")
        if self._draining:
            self._say(client, head, answers.error(503, contract.BODY_SHUTTING_DOWN))
        elif not value:
            self._say(client, head, answers.error(400, contract.BODY_PROBE_WITHOUT_HASH))
        else:
            self._say(client, head, answers.reply(200, b"", b"K-Network-Hash: " + value))

    def _say(self, client: Client, head: Head, parts: list[bytes]) -> None:
        client.answer(head, parts)
        self._said(client, head, parts, 0.0)

    def _said(self, client: Client, head: Head, parts: list[bytes], seconds: float) -> None:
        for observer in self.observers:
            observer.probed(client, head, int(parts[0][9:12]), len(parts[-1]), seconds)

    # --- for whoever runs the relay ------------------------------------------------------------
    def protocol(self) -> asyncio.Protocol:
        clients = self.clients
        client = ServerConnection(
            self._serve, clients.discard, self._speak_http2, turns=clients.turns
        )
        self.clients.add(client)
        return as_protocol(client)

    def counters(self) -> RelayCounters:
        meter = self._meter
        _, one, two, three, four, *beyond = self._statuses
        return RelayCounters(
            requests=meter.arrived,
            in_flight=meter.in_flight,
            integral=meter.integral(self._clock()),
            statuses=(one, two, three, four, sum(beyond)),
            aborted=self._aborted,
            probes=self._probes,
            waiting=self._breaker.waiting if self._breaker is not None else 0,
            connections=len(self.clients),
            latency=self._latency.snapshot(),
        )

    @property
    def in_line(self) -> int:
        """Requests in the breaker, running or waiting (contract section 7.1, queue depth)."""
        breaker = self._breaker
        return breaker.in_line if breaker is not None else 0

    def report(self) -> Report:
        """Close a reporting period of the autoscaler's (contract section 5.2)."""
        return self._meter.report(self._clock())

    def start_draining(self) -> None:
        """Probes fail from now on; traffic is served as before (contract section 3.2)."""
        self._draining = True

    def stop_draining(self) -> None:
        self._draining = False

    def in_flight(self, upgraded: bool) -> int:
        """Requests that have not ended: those that became tunnels, or all others."""
        return sum(exchange.upgraded is upgraded for exchange in self._running)

    def lasting(self, seconds: float) -> bool:
        """Is something in flight that has been for so long, or that has no end to be expected?"""
        before = self._clock() - seconds
        return any(each.upgraded or each.started < before for each in self._running)

    def close_idle(self) -> None:
        """Close the clients' connections that have no request now, and those to the user's.

        Clients of HTTP/2 that have some are asked for no more: ask again while there are any.
        """
        for client in self.clients:
            client.leave()
        self._user.close_idle()

    def close_used(self) -> bool:
        """Like `close_idle`, but spare those whose first request is due; whether there are such."""
        spared = False
        for client in self.clients:
            if isinstance(client, ServerConnection) and client.awaited:
                spared = True
            elif client.idle:
                client.close()
        return spared

    @property
    def connections(self) -> int:
        return len(self.clients)

    @property
    def pulse(self) -> tuple[int, int, int, int]:
        """Equal to an earlier one, with nothing in flight, when nothing happened since: requests,
        those in flight, connections, probes."""
        meter = self._meter
        return meter.arrived, meter.in_flight, len(self.clients), self._probes

    def owns(self, protocol: Any) -> bool:
        """Is it a connection of this pod's, to a client or to the user container?"""
        partner = getattr(protocol, "partner", None)
        mine = any(client is protocol or client is partner for client in self.clients)
        return mine or self._user.owns(protocol)

    def weigh(self) -> dict[ServerConnection | ClientConnection, int]:
        """Bytes of memory, about, for each client's connection and all that is done for it."""
        weights = {client: client.weigh() for client in self.clients}
        found = {client: weight for client, weight in weights.items() if weight}
        for exchange in self._running:
            client: Any = exchange.client
            connection = getattr(client, "connection", client)
            if connection in found:
                found[connection] += exchange.weigh()
        return found

    def hold(self, held: bool) -> None:
        """Read from nobody, for want of memory; or go on."""
        for client in self.clients:
            client.hold(held)
        self._user.hold(held)

    def retire(self) -> None:
        """Somebody else accepts: each connection takes one more request, whose answer says so."""
        self._retired = True
        for client in self.clients:
            client.retire()

    def resume(self) -> None:
        """Nobody else does after all; those that were told to go still do."""
        self._retired = False

    async def drained(self) -> None:
        """Return when no request is in flight; then close the clients' idle connections."""
        while len(self._running):
            if self._drained is None or self._drained.done():
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)
        self.close_idle()

    def abort(self) -> None:
        """End everything at once: exchanges, connections, dials. Safe to call twice."""
        for task in self._checks:
            task.cancel()
        for client in self.clients:
            client.abort()
        for exchange in self._running:
            exchange.client_lost()
        self._user.abort("the relay was stopped")
        self._running.close()

    def _over(self, exchange: Exchange) -> None:
        """An exchange has really ended, on both sides."""
        now = self._clock()
        self._running.discard(exchange)
        if exchange.counted:
            self._meter.depart(now, exchange.proxied)
            if exchange.status:
                self._statuses[exchange.status // 100] += 1
                self._latency.record(now - exchange.started)
            else:
                self._aborted += 1
        for observer in self.observers:
            observer.over(exchange, now)
        if exchange.admission is not None:
            exchange.admission.leave()  # the next waiter starts in here
        if self._drained is not None and not len(self._running) and not self._drained.done():
            self._drained.set_result(None)
