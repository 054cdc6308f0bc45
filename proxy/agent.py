"""The node agent's supervisor: attaches pods, opens and closes their direct ports, feeds workers.

Owns the privileges (netns, cgroups, BPF) and therefore never reads a byte of traffic: listeners
and sockets made inside a pod's netns go to relay workers (proxy/worker.py), which come back with
readiness and counters. A pod is `served`, its listeners are its own or come from its hold by
`borrow`, and `workers` says which process accepts.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from weir.proxy import contract, sockets
from weir.proxy.borrow import Borrower
from weir.proxy.counters import ColdStarts
from weir.proxy.kernel import Kernel
from weir.proxy.pod import PodSpec
from weir.proxy.served import ServedPod
from weir.proxy.workers import Workers

log = logging.getLogger("weir.agent")

# how soon a change of listeners is noticed (another kind after a restart); what matters at once,
# a dead app or a container that became ready, needs no tick
TICK_SECONDS = 1.0
OPEN_TICKS = 4
"""Of a pod that is open only its kind of listeners may have changed: the pods take turns."""
CERTIFICATE_TICKS = round(contract.CERTIFICATE_SECONDS)
SWEEP_TICKS = 30
"""Between two looks for what was left pinned: by pods that have ended, or by agents that had pods
which no agent has now."""
DRAIN_TICK_SECONDS = 0.1
DRAIN_SECONDS = 30.0
GIVE_UP_SECONDS = 5.0
"""Left of that for giving back a pod whose own drain does not end."""


class Agent:
    """All pods of one node. `kernel` None relays everything, for the reason `no_kernel`."""

    def __init__(
        self, pods: Sequence[PodSpec], kernel: Kernel | None, no_kernel: str = "", workers: int = 1
    ) -> None:
        self._kernel, self._no_kernel = kernel, no_kernel
        self._cold_starts = ColdStarts()
        self._pods = [ServedPod(spec, kernel, no_kernel, self._cold_starts) for spec in pods]
        self._workers = Workers(workers, self._decide)
        turn = asyncio.Lock()
        self._borrowers = [
            Borrower(pod, self._workers, self._decide, turn)
            for pod in self._pods
            if pod.spec.borrowed
        ]

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`, then drain and detach. That is bounded by DRAIN_SECONDS, and for what
        is in flight of pods that were given back by their timeouts.

        Raises OSError when a data port can't be opened.
        """
        sockets.raise_open_files()  # a dozen for each pod: listeners, lease, namespace, links
        own = [pod for pod in self._pods if not pod.spec.borrowed]
        try:
            for pod in own:
                pod.open()
            await self._workers.start()
            for pod in own:
                self._workers.adopt(pod)
            if self._kernel is not None:
                loop = asyncio.get_running_loop()
                loop.add_reader(self._kernel.bell.fileno(), self._listens, self._kernel)
            async with asyncio.TaskGroup() as group:
                ticking = group.create_task(self._tick())
                borrowing = [group.create_task(b.run()) for b in self._borrowers]
                await stop.wait()
                await self._drain(own)
                for task in (ticking, *borrowing):
                    task.cancel()
        finally:
            if self._kernel is not None:
                asyncio.get_running_loop().remove_reader(self._kernel.bell.fileno())
            await self._workers.stop()
            for pod in self._pods:
                pod.close()

    def snapshot(self) -> dict[str, Any]:
        """The status of the agent: its processes, the kernel, every pod (one by one)."""
        return {
            "supervisor": os.getpid(),
            "workers": self._workers.pids,
            "kernel": self._no_kernel or "ok",
            "pods": (pod.snapshot() for pod in self._pods),
        }

    def metrics(self) -> bytes:
        """The same for Prometheus, and more."""
        from weir.proxy.agentmetrics import page  # an agent that nobody scrapes can do without

        return page(self._pods, len(self._workers.pids), self._no_kernel, self._cold_starts)

    def _listens(self, kernel: Kernel) -> None:
        """Something began to listen in pods of ours: if it is what they waited for, look now."""
        rung = kernel.bell.heard()
        for pod in self._pods:
            if pod.attached is not None and pod.attached.cookie in rung and pod.offer is None:
                self._workers.tell(pod, {"op": "look"})
                self._decide(pod)

    async def _tick(self) -> None:
        for number in itertools.count():
            now = time.monotonic()
            if self._kernel is not None and number % SWEEP_TICKS == 0:
                self._kernel.sweep()
                self._kernel.close_abandoned()
            for borrower in self._borrowers:
                borrower.beat(now)
                if number % CERTIFICATE_TICKS == 0:
                    borrower.renew()
            self._workers.look()
            for turn, pod in enumerate(self._pods, number):
                if pod.offer is None or turn % OPEN_TICKS == 0:
                    self._decide(pod)
                pod.backstop(now)
                load = pod.direct_load(now)
                if load is not None:
                    told = {"op": "direct", "load": load, "counted": pod.told()}
                    self._workers.tell(pod, told)
            await asyncio.sleep(TICK_SECONDS)

    def _decide(self, pod: ServedPod) -> None:
        if pod.decide():
            self._workers.tell(pod, {"op": "offer", "value": pod.offer})

    async def _drain(self, own: list[ServedPod]) -> None:
        """The borrowed pods go to whoever comes next, one by one; of our own nothing is left."""
        tenancies = [t for t in self._workers.tenancies if not t.pod.spec.borrowed]
        for pod in own:
            pod.draining = True
            self._decide(pod)
        vacating = [self._workers.vacate(t) for t in tenancies]
        giving = [borrower.stop(DRAIN_SECONDS - GIVE_UP_SECONDS) for borrower in self._borrowers]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await asyncio.gather(*vacating, *giving)
                for tenancy in tenancies:
                    await tenancy.released.wait()
                while any(pod.direct_in_flight() for pod in own):
                    await asyncio.sleep(DRAIN_TICK_SECONDS)  # nothing tells us when the app answers
        left = [t for t in self._workers.tenancies if t.pod.spec.borrowed]
        longest = max((t.pod.spec.settings.timeout for t in left), default=0.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest + contract.UPGRADED_SECONDS):
                for tenancy in left:
                    await tenancy.released.wait()
        if self._workers.tenancies or any(pod.direct_in_flight() for pod in own):
            log.warning("the drain ends with requests still in flight")
