"""Everything that is served for one pod, as its queue-proxy would: all ports, probes and the drain.

Owns which service is on which port, the reporting period of the autoscaler, and the order of a
shutdown (contract sections 1.5, 5.1, 6). Where listeners and sockets come from, and what a signal
means, is the business of the process: a sidecar, or a worker of the node agent.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Enum
from math import floor, inf
from typing import TYPE_CHECKING, NamedTuple

from weir.proxy import contract, ports
from weir.proxy.flag import Flag
from weir.proxy.gate import Gate
from weir.proxy.policy import stat
from weir.proxy.policy.drain import Drain, Phase
from weir.proxy.policy.meter import Report
from weir.proxy.relay import Relay
from weir.proxy.wire.clients import Clients
from weir.proxy.wire.protocol import as_protocol
from weir.proxy.wire.server import ServerConnection, Service

if TYPE_CHECKING:
    from weir.proxy.tls import TlsPort

_POLL_SECONDS = 0.1
"""How often a shutdown looks whether it may go on."""
_TOLD_SECONDS = 0.1
"""So long a kept connection may wait for the request whose answer ends it."""

log = logging.getLogger("weir.pod")

OTHER_CONNECTIONS = 16
"""So many at a time on each port but the data port, however many there are on that."""
OTHER_HEAD = 64 << 10
"""Bytes of a head there, which are not weighed when memory is short."""


class Role(Enum):
    """What a listening socket is for."""

    DATA = "data"
    TLS = "tls"
    ADMIN = "admin"
    AUTOSCALER = "autoscaler"
    METRICS = "metrics"
    PROFILING = "profiling"


class DirectLoad(NamedTuple):
    """What reached the user container without the relay, in the last second before `at`.

    Average concurrency, requests a second, requests in flight; `at` is monotonic, in seconds.
    """

    average: float
    requests: float
    in_flight: int
    at: float


_NOTHING_DIRECT = DirectLoad(0.0, 0.0, 0, -inf)
_STALE_SECONDS = 3.0


class PodServer:
    """`serve` on listeners; `terminate` begins the drain, and `drained` returns after its end.

    `uptime_from` is the monotonic time at which the process counts as started. `render` makes the
    page of Role.METRICS, `secure` is for Role.TLS and `secure_metrics` for that page.
    `phase_changed` hears of the drain. Whoever knows of a direct path sets `direct_load`, again and
    again.
    """

    def __init__(
        self,
        relay: Relay,
        *,
        uptime_from: float,
        drain: Drain | None = None,
        upgraded_seconds: float = contract.UPGRADED_SECONDS,
        render: Callable[[], bytes] | None = None,
        profiling: Service | None = None,
        secure: TlsPort | None = None,
        secure_metrics: TlsPort | None = None,
        phase_changed: Callable[[Phase], None] = lambda _: None,
    ) -> None:
        self.relay = relay
        self.drain = drain or Drain(relay.settings.timeout)
        self.direct_load = _NOTHING_DIRECT
        self._phase_changed = phase_changed
        self._upgraded_seconds = upgraded_seconds
        self._uptime_from = uptime_from
        self._period: tuple[Report, DirectLoad, float] | None = None
        self._hook = ports.DrainHook(self._hooked)
        self._changed = Flag()
        self._others: list[Clients[ServerConnection]] = []
        self._tick: asyncio.TimerHandle | None = None
        self._watching: asyncio.Task[None] | None = None
        self._gates: dict[Role, Gate] = {
            Role.DATA: Gate(relay.protocol, relay.clients),
            Role.ADMIN: self._other(self._hook),
            Role.AUTOSCALER: self._other(ports.autoscaler(self._stat)),
        }
        if render is not None:
            page, patience = ports.prometheus(render), contract.READ_METRICS_HEAD_SECONDS
            self._gates[Role.METRICS] = self._other(page, patience, secure_metrics)
        if profiling is not None:
            patience = contract.READ_PROFILING_HEAD_SECONDS
            self._gates[Role.PROFILING] = self._other(profiling, patience)
        if secure is not None:
            self._gates[Role.TLS] = Gate(relay.protocol, relay.clients, secure)

    async def serve(self, role: Role, listeners: Iterable[socket.socket]) -> None:
        """Accept on listening, non-blocking sockets, which are owned from now on."""
        loop = asyncio.get_running_loop()
        for listener in listeners:
            await self._gates[role].open(listener)
        if role is Role.AUTOSCALER and self._tick is None:
            # on whole seconds: one wake-up for all the pods of a worker
            self._next_tick(floor(loop.time()) + contract.STAT_PERIOD_SECONDS)

    @property
    def closings(self) -> int:
        """How often connections had to wait, since the pod had too many."""
        return sum(
            self._gates[role].closings for role in (Role.DATA, Role.TLS) if role in self._gates
        )

    def gate(self, role: Role) -> Gate:
        return self._gates[role]

    def terminate(self) -> None:
        """SIGTERM: probes fail at once, traffic goes on (contract section 6)."""
        self.drain.terminate(time.monotonic())
        self._draining()

    async def drained(self) -> None:
        """Return when the drain has ended and nothing is accepted or in flight any more."""
        while self.drain.phase is not Phase.DRAINED:
            await self._changed.wait()
            self._changed.clear()
        self.stop_accepting()
        await self.ended()

    async def ended(self) -> None:
        """Return when nothing is in flight any more; tunnels have a minute after all others."""
        while self.relay.in_flight(upgraded=False):
            await self._idle_moment()
        until = time.monotonic() + self._upgraded_seconds
        while (left := self.relay.in_flight(upgraded=True)) and time.monotonic() < until:
            await self._idle_moment()
        if left:
            log.warning("%d upgraded connections are cut: they did not end in time", left)
        self.relay.close_idle()

    async def quiet(self, seconds: float) -> bool:
        """Whether nothing is in flight any more within this time; then all connections are closed.

        One that was just accepted has until then to send its request. One that is kept is told to
        go by its next answer; if it has nothing to ask for a moment, it is closed.
        """
        relay = self.relay
        relay.retire()
        told = time.monotonic() + _TOLD_SECONDS
        until = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            left = relay.close_used() if now >= told else relay.connections > 0
            busy = relay.in_flight(upgraded=False) or relay.in_flight(upgraded=True)
            late = now >= until
            if busy and late:
                relay.resume()
                return False
            if not busy and (late or not left):
                relay.close_idle()
                return True
            await asyncio.sleep(_POLL_SECONDS / 10)

    def stop_accepting(self) -> None:
        for role in (Role.DATA, Role.TLS):
            if role in self._gates:
                self._gates[role].close()

    def stop_listening(self) -> None:
        """On all ports. Connections and those who wait for the drain's end stay."""
        for gate in self._gates.values():
            gate.close()

    def close(self) -> None:
        """End everything at once. Safe to call twice."""
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        if self._watching is not None:
            self._watching.cancel()
        self.stop_listening()
        for clients in self._others:
            for client in clients:
                client.close()
        self.relay.abort()

    async def _idle_moment(self) -> None:
        self.relay.close_idle()
        await asyncio.sleep(_POLL_SECONDS)

    # --- the drain -----------------------------------------------------------------------------
    def _hooked(self) -> None:
        log.info("the kubelet's drain hook was called")
        self.drain.hook(time.monotonic())
        self._draining()

    def _draining(self) -> None:
        if self.drain.phase is Phase.DRAINING:
            self.relay.start_draining()
            self._phase_changed(Phase.DRAINING)
            if self._watching is not None:
                self._watching.cancel()  # what is due may have changed
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """Until the drain is over, one way or the other."""
        relay = self.relay
        while True:
            now = time.monotonic()
            in_flight = relay.in_flight(upgraded=False) + self._direct(now).in_flight
            phase = self.drain.look(now, relay.last_arrival, in_flight)
            if phase is not Phase.DRAINING:
                break
            due = self.drain.due(relay.last_arrival)
            await asyncio.sleep(max(due - now, _POLL_SECONDS) if due < inf else _POLL_SECONDS)
        if phase is Phase.SERVING:
            log.info("no SIGTERM: only the user container restarts, the drain is cancelled")
            relay.stop_draining()
            self._phase_changed(phase)
        else:
            self._hook.open = True
        self._hook.release()
        self._changed.set()

    # --- the other ports -----------------------------------------------------------------------
    def _other(
        self, service: Service, patience: float | None = None, secure: TlsPort | None = None
    ) -> Gate:
        clients: Clients[ServerConnection] = Clients(most=OTHER_CONNECTIONS)
        self._others.append(clients)

        def protocol() -> asyncio.Protocol:
            client = ServerConnection(
                service,
                clients.discard,
                patience=patience,
                most_head=OTHER_HEAD,
                turns=clients.turns,
            )
            clients.add(client)
            return as_protocol(client)

        return Gate(protocol, clients, secure)

    def _direct(self, now: float) -> DirectLoad:
        """Of a supervisor that says nothing any more nothing is known."""
        return self.direct_load if now - self.direct_load.at < _STALE_SECONDS else _NOTHING_DIRECT

    def _next_tick(self, at: float) -> None:
        self._tick = asyncio.get_running_loop().call_at(at, self._period_ends, at)

    def _period_ends(self, at: float) -> None:
        now = time.monotonic()
        self._period = self.relay.report(), self._direct(now), now
        loop = asyncio.get_running_loop()
        # a period that was missed (a stopped process) is not made up for
        self._next_tick(max(at + contract.STAT_PERIOD_SECONDS, loop.time()))

    def _stat(self) -> bytes:
        """Of the period that ended last; encoded when it is asked for, which few pods are."""
        pod = self.relay.settings.pod
        if self._period is None:
            return stat.encode(pod)
        report, direct, at = self._period
        both = replace(
            report,
            average=report.average + direct.average,
            count=report.count + round(direct.requests * contract.STAT_PERIOD_SECONDS),
        )
        return stat.encode(pod, both, at - self._uptime_from)
