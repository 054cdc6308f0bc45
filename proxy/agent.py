"""The node agent's supervisor: attaches pods, opens and closes their direct ports, feeds workers.

Owns the privileges (netns, cgroups, BPF) and therefore never reads a byte of traffic: listeners
and sockets made inside a pod's netns go to relay workers (proxy/worker.py), which come back with
readiness and counters.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from weir.proxy import netns
from weir.proxy.control import MAX_DESCRIPTORS, Message
from weir.proxy.kernel import Kernel
from weir.proxy.pod import PodSpec
from weir.proxy.served import ServedPod
from weir.proxy.workers import WorkerProcess

log = logging.getLogger("weir.agent")

# how soon a change of listeners is noticed (another kind after a restart); what matters at once,
# a dead app or a container that became ready, needs no tick
TICK_SECONDS = 1.0
DRAIN_TICK_SECONDS = 0.1
RESTART_SECONDS = 0.2
DRAIN_SECONDS = 30.0


class Agent:
    """All pods of one node. `kernel` None relays everything, for the reason `no_kernel`."""

    def __init__(
        self, pods: Sequence[PodSpec], kernel: Kernel | None, no_kernel: str = "", workers: int = 1
    ) -> None:
        self._no_kernel = no_kernel
        self._pods = {spec.name: ServedPod(spec, kernel, no_kernel) for spec in pods}
        self._workers: list[WorkerProcess | None] = [None] * workers
        self._shard = {name: i % workers for i, name in enumerate(self._pods)}
        self._released: dict[str, asyncio.Event] = {name: asyncio.Event() for name in self._pods}
        self._restarting: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`, then drain (bounded by DRAIN_SECONDS) and detach.

        Raises OSError when a data port can't be opened.
        """
        try:
            for pod in self._pods.values():
                pod.open()
            for shard in range(len(self._workers)):
                await self._start_worker(shard)
            while not stop.is_set():
                self._tick()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), TICK_SECONDS)
            await self._drain()
        finally:
            self._stopping = True
            for task in self._restarting:
                task.cancel()
            await asyncio.gather(*(w.stop() for w in self._workers if w is not None))
            for pod in self._pods.values():
                pod.close()

    def snapshot(self) -> dict[str, Any]:
        """The status of the agent: its processes, the kernel, every pod."""
        return {
            "supervisor": os.getpid(),
            "workers": [w.pid for w in self._workers if w is not None and w.serving],
            "kernel": self._no_kernel or "ok",
            "pods": [pod.snapshot() for pod in self._pods.values()],
        }

    def _tick(self) -> None:
        for pod in self._pods.values():
            self._decide(pod)

    def _decide(self, pod: ServedPod) -> None:
        if pod.decide():
            name = pod.spec.name
            self._tell(name, {"op": "offer", "pod": name, "value": pod.offer})

    async def _drain(self) -> None:
        for name, pod in self._pods.items():
            pod.draining = True
            self._decide(pod)
            self._tell(name, {"op": "release", "pod": name})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                for event in self._released.values():
                    await event.wait()
                while any(
                    p.attached and p.attached.counters().in_flight for p in self._pods.values()
                ):
                    await asyncio.sleep(DRAIN_TICK_SECONDS)  # nothing tells us when the app answers
                return
        log.warning("drain ended after %.0f s with requests still in flight", DRAIN_SECONDS)

    async def _start_worker(self, shard: int) -> None:
        worker = WorkerProcess(
            lambda message: self._message(shard, message), lambda: self._worker_ended(shard)
        )
        await worker.start()
        self._workers[shard] = worker
        for name, pod in self._pods.items():
            if self._shard[name] != shard:
                continue
            if pod.draining:  # its worker died before it could be told to release it
                self._released[name].set()
            else:
                adopt: Message = {
                    "op": "adopt",
                    "pod": name,
                    "settings": asdict(pod.spec.settings),
                    "foreign": pod.spec.netns is not None,
                }
                worker.send(adopt, pod.listeners)
                worker.send({"op": "offer", "pod": name, "value": pod.offer})

    def _worker_ended(self, shard: int) -> None:
        if self._stopping:
            return
        log.error("relay worker %d ended; its pods go to a new one", shard)
        for name, pod in self._pods.items():
            if self._shard[name] == shard:
                pod.worker_died()
                if pod.draining:  # nothing of it is in flight any more
                    self._released[name].set()
        self._restarting.add(task := asyncio.create_task(self._restart_worker(shard)))
        task.add_done_callback(self._restarting.discard)

    async def _restart_worker(self, shard: int) -> None:
        old = self._workers[shard]
        if old is not None:
            old.kill()  # its channel is gone, and its pods wait
            await old.stop()
        while True:
            await asyncio.sleep(RESTART_SECONDS)  # a worker that dies at once must not spin
            try:
                await self._start_worker(shard)
            except OSError:
                log.exception("no relay worker can be started; trying again")
            else:
                return

    def _tell(self, name: str, message: Message, sockets: Sequence[socket.socket] = ()) -> None:
        worker = self._workers[self._shard[name]]
        if worker is not None:
            worker.send(message, sockets)

    def _message(self, shard: int, message: Message) -> None:
        # messages come from a process that reads all traffic: take nothing for granted
        pod = self._pods.get(str(message.get("pod")))
        operation = message.get("op")
        if pod is None or self._shard[pod.spec.name] != shard:
            return
        if operation == "ready":
            pod.ready = message.get("ready") is True
            self._decide(pod)
        elif operation == "report" and isinstance(message.get("counters"), dict):
            counters = message["counters"]
            pod.relayed = {name: v for name, v in counters.items() if _is_count(v)}
        elif operation == "need":
            self._give_sockets(pod, message.get("count"))
        elif operation == "released":
            self._released[pod.spec.name].set()

    def _give_sockets(self, pod: ServedPod, count: Any) -> None:
        if pod.spec.netns is None:
            return
        wanted = min(max(count, 1), MAX_DESCRIPTORS) if isinstance(count, int) else 1
        sockets: list[socket.socket] = []
        try:
            sockets = netns.tcp_sockets(pod.spec.netns, wanted)
        except OSError:  # the worker is told by getting none
            log.exception("pod %s: can't make sockets in its network namespace", pod.spec.name)
        self._tell(pod.spec.name, {"op": "sockets", "pod": pod.spec.name}, sockets)
        for sock in sockets:
            sock.close()


def _is_count(value: Any) -> bool:
    """A number that sums can bear, unlike NaN or an integer of a thousand digits."""
    return isinstance(value, int | float) and 0 <= value < 1e18
