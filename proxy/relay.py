"""The relay: everything the queue-proxy does on a pod's data port, for one pod.

`Relay._serve` is the request path, in the order of contract section 3.1; an Exchange carries one
request from there to its end. Policies decide (breaker, deadlines, meter), the wire code reads and
frames; this module owns what follows from what.

Nothing on the path of an ordinary request starts a task, makes a future or arms a timer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from weir.proxy import contract
from weir.proxy.contract import RevisionSettings
from weir.proxy.exchange import Exchange
from weir.proxy.policy.breaker import Breaker, Place
from weir.proxy.policy.deadlines import Timeouts
from weir.proxy.policy.histogram import Histogram, Latencies
from weir.proxy.policy.meter import Meter, Report
from weir.proxy.wire import answers
from weir.proxy.wire.dial import Dial
from weir.proxy.wire.head import RequestHead
from weir.proxy.wire.server import ServerConnection
from weir.proxy.wire.upstream import Upstream
from weir.proxy.wire.watch import Watch


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
        self._clock = clock
        self._user = Upstream(
            settings.user_host,
            settings.user_port,
            dial,
            limit or contract.IDLE_UPSTREAM_CONNECTIONS,
            clock,
        )
        self._prober = prober
        self._offer = offer
        self._timeouts = Timeouts.of(settings)
        self._no_timer_before = self._timeouts.shortest
        self._breaker = Breaker(limit) if limit else None
        self._meter = Meter(clock())
        self._running: Watch[Exchange] = Watch(clock)
        self._latency = Histogram()
        self._statuses = [0, 0, 0, 0, 0]
        self._aborted = 0
        self._probes = 0
        self._draining = False
        self._drained: asyncio.Future[None] | None = None
        self._clients: set[ServerConnection] = set()
        self._checks: set[asyncio.Task[None]] = set()

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
        exchange = Exchange(self._user, client, head, piece, ended, self._timeouts, self._over)
        now = exchange.started
        self._running.add(exchange, now + self._no_timer_before)  # 3.7
        exchange.request = head.for_user(client.peer, self._user.authority)  # 3.3, 3.5
        if contract.KUBELET_PROBE not in seen or not seen[contract.KUBELET_PROBE]:
            exchange.counted = True
            exchange.proxied = seen.get(contract.PROXY_REQUEST) == contract.PROXY_REQUEST_ACTIVATOR
            self._meter.arrive(now, exchange.proxied)  # 5.2
            if self._breaker is not None:  # 3.6
                exchange.admission = admission = self._breaker.admit(exchange.start)
                if admission.place is Place.REFUSED:
                    exchange.refuse(answers.error(503, contract.BODY_QUEUE_FULL))
                    return
                if admission.place is Place.WAITING:
                    return
        exchange.start()

    def _health_check(self, client: ServerConnection, head: RequestHead) -> None:
        """Contract section 4.1, and the question of a Weir client (design section 2)."""
        self._probes += 1
        value = head.seen.get(contract.NETWORK_PROBE, b"")
        if self._draining:
            _answer(client, head, answers.error(503, contract.BODY_SHUTTING_DOWN))
        elif value == contract.PROBE_QUEUE:
            client.exchange = check = HealthCheck(client, head)
            task = asyncio.get_running_loop().create_task(self._check(check))
            self._checks.add(task)
            task.add_done_callback(self._checked)
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

    def _checked(self, task: asyncio.Task[None]) -> None:
        self._checks.discard(task)
        if not task.cancelled():
            task.result()  # anything unexpected goes to the loop's exception handler

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
            integral=meter.integral(self._clock()),
            statuses=(one, two, three, four, five),
            aborted=self._aborted,
            probes=self._probes,
            waiting=self._breaker.waiting if self._breaker is not None else 0,
            connections=len(self._clients),
            latency=self._latency.snapshot(),
        )

    def report(self) -> Report:
        """Close a reporting period of the autoscaler's (contract section 5.2)."""
        return self._meter.report(self._clock())

    def start_draining(self) -> None:
        """Probes fail from now on; traffic is served as before (contract section 3.2)."""
        self._draining = True

    async def drained(self) -> None:
        """Return when no request is in flight; then close the clients' idle connections."""
        while len(self._running):
            if self._drained is None or self._drained.done():
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)
        for client in list(self._clients):
            if client.idle:
                client.close()
        self._user.close_idle()

    def abort(self) -> None:
        """End everything at once: exchanges, connections, dials. Safe to call twice."""
        for task in self._checks:
            task.cancel()
        for client in list(self._clients):
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
                self._statuses[min(exchange.status // 100, 5) - 1] += 1
                self._latency.record(now - exchange.started)
            else:
                self._aborted += 1
        if exchange.admission is not None:
            exchange.admission.leave()  # the next waiter starts in here
        if self._drained is not None and not len(self._running) and not self._drained.done():
            self._drained.set_result(None)


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
