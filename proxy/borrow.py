"""A pod's listeners, borrowed from its hold and given back (docs/decisions/022).

Owns one pod's lease in the supervisor: it rings, carries out what `policy.lease` says in its order,
beats, and rings again after a lease that was lost. Who accepts is a worker, through `workers`; a
pod that can't be borrowed has its reason in `ServedPod.lease`, and its sidecar serves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable

from weir.proxy import contract, holds, lease, netns
from weir.proxy.environment import SidecarSettings
from weir.proxy.flag import Flag
from weir.proxy.holds import Hold
from weir.proxy.lease import NoHold
from weir.proxy.policy.lease import Action, Event, Lease, Phase
from weir.proxy.served import ServedPod
from weir.proxy.tenancy import Tenancy
from weir.proxy.workers import Workers

log = logging.getLogger("weir.agent")

LOOK_SECONDS = 0.25
"""How often to look for a hold that is not there; its grace is twice that."""
LEFT_SECONDS = 10.0
"""The same of a pod that is left to its sidecar: only another container would change that."""
AGAIN_SECONDS = 0.05
SAY_SECONDS = 0.02
MOST_ALONE = 5
"""Beats for which a pod is kept though no worker lives; a restart takes one."""
DRAIN_TICK_SECONDS = 0.1
_RUNG = "rung: hold, or the sidecar it became, has not lent yet"


class Borrower:
    """`run` until `stop`. `changed(pod)` is called when its offer may have changed."""

    def __init__(
        self,
        pod: ServedPod,
        workers: Workers,
        changed: Callable[[ServedPod], None],
        turn: asyncio.Lock,
    ) -> None:
        """`turn` is the same for all of them."""
        self._pod = pod
        self._turn = turn
        self._workers = workers
        self._changed = changed
        self._policy = Lease(Phase.OVER)
        self._lease: socket.socket | None = None
        self._events: list[Event] = []
        self._happened = Flag()
        self._stopped = Flag()
        self._idle = Flag()  # no lease
        self._idle.set()
        self._hold: Hold | None = None
        self._tenancy: Tenancy | None = None
        self._draining: asyncio.Task[None] | None = None
        self._alone = 0

    async def run(self) -> None:
        while not self._stopped.is_set():
            pause = LOOK_SECONDS
            try:
                if not self._workers.pids:
                    raise NoHold("no relay worker serves (yet)")
                async with self._in_turn():
                    self._hold = holds.find(self._pod.spec)
                if self._workers.crowded(self._pod):
                    raise NoHold("its earlier leases are not over: connections are still open")
                await self._borrow(self._hold)
                pause = AGAIN_SECONDS
            except NoHold as error:
                self._cannot(str(error))
                if isinstance(error, holds.LeftToSidecar):
                    self._pod.unheld = "left_to_sidecar"
                    pause = LEFT_SECONDS
            except OSError as error:  # it ended while we looked, or we are out of descriptors
                self._cannot(f"can't be borrowed: {error}")
            except Exception:  # one pod must not cost the node its agent: its sidecar serves it
                log.exception("pod %s", self._pod.spec.name)
                self._cannot("a fault of the agent, see its log")
            finally:
                if self._hold is not None:
                    self._hold.close()
                    self._hold = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopped.wait()

    def beat(self, now: float) -> None:
        """To be called every second, as long as this process is well."""
        if self._lease is None:
            return
        for action in self._policy.look(now):
            lease.say(self._lease, action)
        self._alone = 0 if self._workers.pids else self._alone + 1
        if self._alone > MOST_ALONE:  # nobody accepts, and the sidecar would
            self._alone = 0
            self._post(Event.GIVE_UP)

    def renew(self) -> None:
        """To be called every minute: the container may have another certificate."""
        pod, tenancy = self._pod, self._tenancy
        if tenancy is None or pod.certificate is None:
            return
        pair = tenancy.renewed()
        if pair is not None:
            pod.certificate = pair
            self._workers.tell(pod, {"op": "certificate", "pair": pair})

    async def stop(self, patience: float) -> None:
        """Give the pod back; one that drains may end that, for so many seconds."""
        self._stopped.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience if self._policy.phase is Phase.ENDING else 0.0):
                await self._idle.wait()
        self._post(Event.GIVE_UP)
        await self._idle.wait()

    @contextlib.asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        """What takes milliseconds is done for one pod in a turn of the loop: so grants are heard,
        and beats sent, while a hundred pods are taken."""
        async with self._turn:
            try:
                yield
            finally:
                await asyncio.sleep(0)

    def _cannot(self, reason: str) -> None:
        if reason != self._pod.lease:
            log.warning("pod %s: %s", self._pod.spec.name, reason)
        self._pod.lease, self._pod.unheld = reason, "looking"
        self._changed(self._pod)

    # --- one lease -----------------------------------------------------------------------------
    async def _borrow(self, hold: Hold) -> None:
        """Ring, and return when the lease is over. Raises NoHold, OSError."""
        loop = asyncio.get_running_loop()
        async with self._in_turn():
            lease.allow_fences(hold.netns)
            sock = lease.ring(hold.process)
        self._idle.clear()
        self._lease, self._policy, self._events = sock, Lease(), []
        if self._stopped.is_set():
            self._post(Event.GIVE_UP)
        self._pod.describe(hold)
        self._pod.lease, self._pod.unheld = _RUNG, "rung"
        loop.add_reader(sock.fileno(), self._readable, sock)
        try:
            while self._policy.phase is not Phase.OVER:
                await self._happened.wait()
                self._happened.clear()
                events, self._events = self._events, []
                for event in events:
                    for action in self._policy.happened(event, time.monotonic()):
                        await self._do(action, sock)
        finally:
            loop.remove_reader(sock.fileno())
            if self._draining is not None:
                self._draining.cancel()
                self._draining = None
            await self._close_copies()
            sock.close()
            self._lease = None
            self._idle.set()

    def _post(self, event: Event) -> None:
        self._events.append(event)
        self._happened.set()

    def _readable(self, sock: socket.socket) -> None:
        heard = lease.hear(sock)
        if heard is None:
            return
        if heard.event is Event.GRANTED:
            if self._policy.phase is Phase.WAITING and not self._pod.listeners:
                self._take(heard.listeners)
            else:
                for listener in heard.listeners:
                    listener.close()
        elif heard.event is Event.HUNG_UP:
            asyncio.get_running_loop().remove_reader(sock.fileno())
        self._post(heard.event)

    async def _do(self, action: Action, sock: socket.socket) -> None:
        if action is Action.ACCEPT:
            async with self._in_turn():
                self._accept()
        elif action is Action.DRAIN and self._tenancy is not None:
            self._draining = asyncio.create_task(self._drain(self._tenancy))
        elif action is Action.CLOSE_COPIES:
            await self._close_copies()
        elif action is Action.BEAT:
            lease.say(sock, action)
        elif action in (Action.SAY_RELEASED, Action.SAY_DONE):
            while not lease.say(sock, action):  # hold reads, or finds us silent and hangs up
                await asyncio.sleep(SAY_SECONDS)
        # STOP_ACCEPTING is the first half of closing the copies; HANG_UP is the end of _borrow

    def _take(self, listeners: tuple[socket.socket, ...]) -> None:
        """Each by its port. Metrics that hold knows nothing of get a listener of ours."""
        assert self._hold is not None
        pod, settings = self._pod, self._hold.settings
        roles = {
            settings.data_port: "data",
            contract.ADMIN_PORT: "admin",
            contract.AUTOSCALER_PORT: "autoscaler",
        }
        if self._hold.certificate is not None:
            roles[settings.tls_port] = "tls"
        metrics = _metrics_address(settings)
        if metrics is not None:
            roles[metrics[1]] = "metrics"
        for listener in listeners:
            role = roles.get(listener.getsockname()[1])
            if role is None:
                listener.close()
            else:
                pod.listeners.setdefault(role, []).append(listener)
        if metrics is not None and "metrics" not in pod.listeners:
            host, port = metrics
            try:
                pod.listeners["metrics"] = [netns.listen(pod.spec.netns, host or "::", port)]
            except OSError as error:  # not fatal, as upstream (contract section 1.5)
                log.warning("pod %s: no metrics are served: %s", pod.spec.name, error)

    def _accept(self) -> None:
        pod, hold, self._hold = self._pod, self._hold, None
        pod.lease = ""
        pod.attach()
        self._tenancy = self._workers.adopt(pod, hold)
        self._changed(pod)
        log.info("pod %s is borrowed", pod.spec.name)

    async def _drain(self, tenancy: Tenancy) -> None:
        """The worker drains as a queue-proxy does; then what came directly may end, too."""
        pod = self._pod
        pod.draining = True
        self._changed(pod)
        self._workers.terminate(tenancy)
        await tenancy.drained.wait()
        until = time.monotonic() + pod.spec.settings.timeout
        while pod.direct_in_flight() and time.monotonic() < until:
            await asyncio.sleep(DRAIN_TICK_SECONDS)  # nothing tells us when the app answers
        self._post(Event.DRAINED)

    async def _close_copies(self) -> None:
        """The worker's, then ours. Idempotent."""
        pod = self._pod
        if not pod.lease:
            pod.lease, pod.unheld = "the lease has ended", "looking"
        if self._tenancy is not None:
            await self._workers.vacate(self._tenancy)
            self._tenancy = None
        pod.let_go()
        pod.draining = False


def _metrics_address(settings: SidecarSettings) -> tuple[str, int] | None:
    if settings.observability.request_metrics.protocol != "prometheus":
        return None
    try:
        return settings.observability.metrics_address()
    except ValueError:
        return None
