"""One pod in a relay worker: its relay, its ports, its prober, its stock of sockets.

Owns what the worker does for a pod that it is given, and what it tells the supervisor of it. A pod
that was borrowed from its hold is served on all ports of a queue-proxy, by the same PodServer as in
the sidecar.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from array import array
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weir.proxy import contract
from weir.proxy.certificates import Pair, in_memory, rewrite
from weir.proxy.control import Channel
from weir.proxy.environment import SidecarSettings
from weir.proxy.flag import Flag
from weir.proxy.observe.observability import observers_for
from weir.proxy.observe.podpage import PodPage
from weir.proxy.podlog import context_of
from weir.proxy.podserver import DirectLoad, PodServer, Role
from weir.proxy.policy.budget import Share
from weir.proxy.policy.drain import Phase
from weir.proxy.policy.histogram import FOLD
from weir.proxy.probes import Prober
from weir.proxy.relay import Relay, RelayCounters
from weir.proxy.tls import TlsFault, TlsPort
from weir.proxy.tls_settings import TlsSettings

log = logging.getLogger("weir.worker")

SOCKETS_LOW = 16  # below this many spare sockets of a pod the worker asks for more
SOCKETS_BATCH = 32
PROBE_PERIOD_SECONDS = 10.0  # kubelet's default readiness period
LOOK_SECONDS = 30.0
"""Between two looks of ours at a pod that the kubelet asks about: its verdicts are ours, too."""
LINGER_SECONDS = 5.0
"""How long clients may go on using a connection after the pod went to another agent."""
POLL_SECONDS = 0.05
HOLD_SECONDS = 0.02
PIECE = 5000
"""Characters, which JSON may make twelve bytes each of; see control.MAX_SAID."""


class Tenant:
    """One pod in this worker. The sockets of a `foreign` pod, in another netns, come by channel."""

    def __init__(
        self,
        name: str,
        settings: contract.RevisionSettings | SidecarSettings,
        foreign: bool,
        channel: Channel,
        listeners: list[tuple[Role, socket.socket]],
        share: Share,
        age: float = 0.0,
        pair: Pair | None = None,
    ) -> None:
        """`settings` are a sidecar's for a borrowed pod, which is `age` seconds old; `pair` is for
        its TLS port."""
        revision = settings.revision if isinstance(settings, SidecarSettings) else settings
        self.name = name
        self.context = context_of(name.rpartition("/")[0])
        """In which everything is to be done for it."""
        self._share = share
        self.borrowed = isinstance(settings, SidecarSettings)
        self.offer: str | None = None
        self.ready = False
        self._reported: tuple[int, ...] = ()
        self._cut = 0
        self._foreign = foreign
        self._channel = channel
        self._unopened = listeners
        self._stock = array("i")  # descriptors: most of them are never used
        self._asked = False
        self._stocked = Flag()
        self._alone = False  # no supervisor, and so no more sockets
        self._waiting: list[asyncio.Future[socket.socket]] = []
        periods = [probe.period for probe in revision.probes if probe.period]
        own = min(periods, default=PROBE_PERIOD_SECONDS)
        self._period = LOOK_SECONDS if self.borrowed else own
        self._lost = Flag()  # no longer ready
        self._tls: TlsPort | None = None
        self._files: list[Path] = []
        self._prober = Prober(revision, self._dial, told=self._verdict)
        self.relay = Relay(
            revision,
            dial=self._dial,
            prober=self._prober,
            offer=lambda: self.offer,
            share=share,
        )
        self.page: PodPage | None = None
        if isinstance(settings, SidecarSettings):
            seen = observers_for(settings, in_line=lambda: self.relay.in_line)
            self.relay.observers += seen.observers
            if seen.render is not None:
                self.page = PodPage(seen, self._shown)
            if pair is not None:
                self.context.run(self._secure, settings.tls, pair)
        self._server = PodServer(
            self.relay,
            uptime_from=time.monotonic() - age,
            render=None if self.page is None else self.page.render,
            secure=self._tls,
            phase_changed=self._phase_changed,
        )

    @property
    def patience(self) -> float:
        """Seconds in which what is in flight has ended, if there is no supervisor any more."""
        if not self.borrowed:  # nobody serves it then
            return contract.UPGRADED_SECONDS
        return self.relay.settings.timeout + contract.UPGRADED_SECONDS

    async def serve(self) -> None:
        """Accept on the listeners and watch the user container's readiness, until cancelled."""
        try:
            if self._foreign:  # who can't reach the user container does not accept for it
                self._ask()
                await self._stocked.wait()
            while self._unopened:
                await self._accept(*self._unopened.pop(0))
            while True:
                await self._watch()
        finally:
            self._server.close()
            if self._tls is not None:
                self._tls.close()
            for file in self._files:
                os.close(int(file.name))
            self._close_unopened()
            self._share.close()
            for spare in self._stock:
                os.close(spare)

    async def _accept(self, role: Role, listener: socket.socket) -> None:
        if role is Role.TLS and self._tls is None:  # said already
            listener.close()
            return
        try:
            await self._server.serve(role, [listener])
        except OSError as error:  # fenced already: the lease is over, and we'll be told
            log.warning("%s port: %s", role.value, error.strerror)
            listener.close()

    def renew(self, certificate: str, key: str) -> None:
        """Another pair for the TLS port; one that can't be used leaves the one before in place."""
        for file, text in zip(self._files, (certificate, key), strict=False):
            rewrite(file, text)
        if self._tls is not None:
            self._tls.reload()

    async def terminate(self) -> None:
        """Drain as a queue-proxy does after SIGTERM, and say when that is over."""
        self._server.terminate()
        await self._server.drained()
        self._channel.send({"op": "drained", "pod": self.name})

    async def leave(self) -> None:
        """Close the listeners, say so, and return when what is in flight has ended.

        The caller bounds the time.
        """
        if not self.borrowed:
            self.relay.start_draining()
        self._server.stop_listening()
        self._close_unopened()  # it may have to go before it has begun
        self._channel.send({"op": "closed", "pod": self.name})
        if self.borrowed:
            await self._part()
        await self.relay.drained()

    def _close_unopened(self) -> None:
        for _, listener in self._unopened:
            listener.close()
        self._unopened.clear()

    async def _part(self) -> None:
        """Another one accepts now: let clients find that out between two requests."""
        self.relay.retire()
        until = time.monotonic() + LINGER_SECONDS
        while self.relay.connections and time.monotonic() < until:
            await asyncio.sleep(POLL_SECONDS)
        await self._server.ended()
        until = time.monotonic() + contract.UPGRADED_SECONDS
        while self.relay.connections and not self.relay.in_flight(upgraded=True):
            if time.monotonic() >= until:  # a client that does not take what it was sent
                break
            self.relay.close_idle()
            await asyncio.sleep(POLL_SECONDS)
        self.relay.abort()

    def direct(self, load: list[float], counted: dict[str, Any] | None) -> None:
        """What the kernel counted in the last second: average, requests, in flight; and so far,
        for a pod with metrics."""
        if self.page is not None and counted is not None:
            self.page.direct.told = counted
        average, requests, in_flight = load
        now = time.monotonic()
        self._server.direct_load = DirectLoad(average, requests, int(in_flight), now)
        if requests:
            self.relay.last_arrival = now

    def stock(self, sockets: list[int]) -> None:
        """Descriptors of sockets, from the supervisor; waiting dials are served first. None at all:
        it has none."""
        self._asked = False
        self._stocked.set()
        if not sockets:
            error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            while self._waiting:
                future = self._waiting.pop(0)
                if not future.done():
                    future.set_exception(error)
        self._stock.extend(sockets)
        while self._waiting and self._stock:
            future = self._waiting.pop(0)
            if not future.done():
                future.set_result(opened(self._stock.pop()))
        if self._waiting:
            self._ask()

    def alone(self) -> None:
        """The supervisor is gone: what is in flight has the sockets that are here."""
        self._alone = True
        self.stock([])

    def shed(self, weights: dict[Any, int], level: int) -> None:
        """Cut the heaviest of these connections, until no more than `level` bytes are left.

        Nothing is read for a moment: what they had is free only after the event loop's next turn.
        """
        left, number = sum(weights.values()), 0
        for client in sorted(weights, key=lambda each: weights[each], reverse=True):
            if left <= level:
                break
            client.cut()
            left -= weights[client]
            number += 1
        self._cut += number
        log.warning(
            "%d connections are cut: what waits in them is more than the pod's share", number
        )
        self.relay.hold(True)
        asyncio.get_running_loop().call_later(HOLD_SECONDS, self.relay.hold, False)

    def report(self) -> None:
        """Tell the counters, if anything happened since the last time."""
        pulse = self.relay.pulse
        if pulse[1] or pulse != self._reported:
            self._reported = pulse
            counters = self.relay.counters()
            told = {
                **numbers(counters),
                "latency": FOLD.of(counters.latency.counts),
                "cut": self._cut,
                "full": self._server.closings,
            }
            self._channel.send({"op": "report", "pod": self.name, "counters": told})

    def _shown(self, text: str) -> None:
        """Tell what is about to be shown, in pieces that one message may have."""
        for start in range(0, max(len(text), 1), PIECE):
            last = start + PIECE >= len(text)
            piece = text[start : start + PIECE]
            self._channel.send({"op": "shown", "pod": self.name, "piece": piece, "last": last})

    def _secure(self, settings: TlsSettings, pair: Pair) -> None:
        self._files = [in_memory(text) for text in pair]
        certificate, key = map(str, self._files)
        try:
            self._tls = TlsPort(settings, files=(certificate, key))
        except TlsFault as error:
            log.error("no TLS is served: %s", error)  # noqa: TRY400

    def _phase_changed(self, phase: Phase) -> None:
        draining = phase is not Phase.SERVING
        self._channel.send({"op": "draining", "pod": self.name, "draining": draining})

    def _ask(self) -> None:
        if not self._asked:
            self._asked = True
            self._channel.send({"op": "need", "pod": self.name, "count": SOCKETS_BATCH})

    async def _dial(self) -> socket.socket | None:
        if not self._foreign:
            return None
        if len(self._stock) <= SOCKETS_LOW:
            self._ask()
        if self._stock:
            return opened(self._stock.pop())
        if self._alone:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        future: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return await future

    async def _watch(self) -> None:
        if await self._prober.ready():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._period):
                    await self._lost.wait()
        else:  # an unready container has been polled for seconds by the prober itself
            await self._prober.nap(POLL_SECONDS)

    def look(self) -> None:
        """It may have become ready just now."""
        self._prober.hurry()

    def _verdict(self, ready: bool) -> None:
        if ready == self.ready:
            return
        self.ready = ready
        if ready:
            self._lost.clear()
        else:
            self._lost.set()
        self._channel.send({"op": "ready", "pod": self.name, "ready": ready})


def opened(descriptor: int) -> socket.socket:
    """The socket, as the event loop wants it."""
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    return sock


def numbers(counters: RelayCounters) -> dict[str, float]:
    """The counters as the supervisor takes them: flat, and nothing but numbers."""
    flat = {n: v for n, v in asdict(counters).items() if isinstance(v, int | float)}
    flat |= {f"{i}xx": count for i, count in enumerate(counters.statuses, 1)}
    flat["seconds"] = round(FOLD.seconds(counters.latency.counts), 6)
    return flat | {"p50": counters.quantile(0.5), "p99": counters.quantile(0.99)}
