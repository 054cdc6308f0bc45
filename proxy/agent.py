"""The node agent's supervisor: attaches pods, opens and closes their direct ports, feeds workers.

Owns the privileges (netns, cgroups, BPF) and therefore never reads a byte of traffic: listeners
and sockets made inside a pod's netns go to relay workers (proxy/worker.py), which come back with
readiness and counters. What may be steered is decided by proxy/policy/eligible.py.
"""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from weir.proxy import netns
from weir.proxy.control import MAX_DESCRIPTORS, Channel, Message
from weir.proxy.direct import Offer
from weir.proxy.kernel import AttachedPod, Kernel, KernelUnavailable, PodTarget, Steering
from weir.proxy.pod import PodSpec
from weir.proxy.policy.deadlines import Timeouts
from weir.proxy.policy.eligible import DirectFacts, refusal

log = logging.getLogger("weir.agent")

# how soon a change of listeners is noticed (another kind after a restart); what matters at once,
# a dead app or a container that became ready, needs no tick
TICK_SECONDS = 1.0
DRAIN_TICK_SECONDS = 0.1
RESTART_SECONDS = 0.2
DRAIN_SECONDS = 30.0
# a number of its own, above the ranges that distributions and systemd hand out
WORKER_UID = 64830
WORKER_MEMORY = 1 << 30
# sums that go on growing over the death of a worker; gauges don't
_SUMS = ("requests", "integral")


class ServedPod:
    """One pod's state in the supervisor: kernel path, listeners, what its worker last said."""

    def __init__(self, spec: PodSpec, kernel: Kernel | None, no_kernel: str) -> None:
        self.spec = spec
        self.ready = False
        self.draining = False
        self.attached: AttachedPod | None = None
        self.no_kernel = no_kernel
        self.listeners: list[socket.socket] = []
        self.relayed: dict[str, Any] = {}
        self.offer: str | None = None
        self.refused = "not ready"
        self.steering: Steering = "none"
        self.restarts = 0
        self._earlier: dict[str, float] = dict.fromkeys(_SUMS, 0)
        if spec.netns is None or spec.cgroup is None:
            self.no_kernel = no_kernel or "a plain process without a network namespace of its own"
        elif kernel is not None:
            self._attach(kernel, spec.netns)

    def open(self) -> None:
        """Listen on the data port, inside the pod's netns. Raises OSError naming the address."""
        spec = self.spec
        try:
            self.listeners.append(netns.listen(spec.netns, spec.listen, spec.data_port))
        except OSError as e:
            raise OSError(e.errno, f"pod {spec.name}: data port: {e.strerror}") from None

    def decide(self) -> bool:
        """Open or close the direct port as the facts stand; True when the offer changed."""
        spec, settings = self.spec, self.spec.settings
        listener = self._steerable()  # first: it may find that the kernel can't
        self.refused = refusal(
            DirectFacts(
                container_concurrency=settings.container_concurrency,
                user_port=settings.user_port,
                direct_port=spec.direct_port,
                ready=self.ready,
                draining=self.draining,
                listener=listener,
                kernel=self.no_kernel,
            )
        )
        if (self.offer is None) == bool(self.refused):
            return False
        if self.refused:
            self.offer = None
            if self.attached is not None:
                self.attached.close_direct()
        elif self.attached is not None:
            self.attached.open_direct()
            self.offer = str(Offer(spec.direct_port, Timeouts.of(settings)))
        return True

    def worker_died(self) -> None:
        """Keep the sums of the dead worker; its in-flight requests are gone."""
        for name in _SUMS:
            self._earlier[name] += self.relayed.get(name, 0)
        self.relayed = {}
        self.ready = False
        self.restarts += 1

    def close(self) -> None:
        """Detach and stop listening. Idempotent."""
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()
        if self.attached is not None:
            self.attached.detach()
            self.attached = None

    def snapshot(self) -> dict[str, Any]:
        """What the status API and `weir run` show; times in seconds, `direct` from the kernel."""
        port = self.listeners[0].getsockname()[1] if self.listeners else self.spec.data_port
        direct: dict[str, Any] = {"open": not self.refused, "reason": self.refused}
        if self.attached is not None:
            counters = self.attached.counters()
            direct |= {k: v for k, v in asdict(counters).items() if k != "latency"}
            direct |= {
                "steering": self.steering,
                "p50": counters.quantile(0.5),
                "p99": counters.quantile(0.99),
            }
        relayed = dict(self.relayed)
        for name in _SUMS:
            relayed[name] = relayed.get(name, 0) + self._earlier[name]
        return {
            "name": self.spec.name,
            "addresses": list(self.spec.addresses),
            "data_port": port,
            "ready": self.ready,
            "draining": self.draining,
            "direct": direct,
            "relayed": relayed,
            "worker_restarts": self.restarts,
        }

    def _attach(self, kernel: Kernel, namespace: Any) -> None:
        spec = self.spec
        assert spec.cgroup is not None
        try:
            self.attached = kernel.attach(
                PodTarget(
                    name=spec.name,
                    netns=namespace,
                    cgroup=spec.cgroup,
                    addresses=spec.addresses,
                    user_port=spec.settings.user_port,
                    direct_port=spec.direct_port,
                    interface=spec.interface,
                )
            )
            self.attached.adopt_listeners()
        except (KernelUnavailable, OSError) as e:
            self._relay_only(e)

    def _steerable(self) -> bool:
        self.steering = "none"
        try:
            if self.attached is not None:
                self.steering = self.attached.steering()
        except (KernelUnavailable, OSError) as e:
            self._relay_only(e)
        return self.steering != "none"

    def _relay_only(self, error: Exception) -> None:
        """Every doubt ends in the relay, for as long as this agent runs."""
        self.no_kernel = str(error)
        log.warning("pod %s is relayed only: %s", self.spec.name, error)
        if self.attached is not None:
            self.attached.detach()
            self.attached = None


def _is_count(value: Any) -> bool:
    """A number that sums can bear, unlike NaN or an integer of a thousand digits."""
    return isinstance(value, int | float) and 0 <= value < 1e18


class WorkerProcess:
    """One relay worker and its channel; `ended` is called once when it is gone."""

    def __init__(self, receive: Callable[[Message], None], ended: Callable[[], None]) -> None:
        self.pid = 0
        self.serving = False  # it has dropped its privileges and said so
        self._receive = receive
        self._ended = ended
        self._channel: Channel | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Raises OSError when the interpreter can't be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-P", "-m", "weir.proxy.worker", "--channel", str(theirs.fileno())),
                *("--uid", str(WORKER_UID if os.geteuid() == 0 else 0)),
                *("--memory", str(WORKER_MEMORY)),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self.pid = self._process.pid
        self._channel = Channel(ours, self._message, self._ended)

    def send(self, message: Message, sockets: Sequence[socket.socket] = ()) -> None:
        """Nothing is sent to a worker that is gone."""
        if self._channel is not None:
            self._channel.send(message, sockets)

    def kill(self) -> None:
        """SIGKILL; `stop` reaps."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """Close the channel, which ends the worker, and reap it."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), DRAIN_SECONDS)
            except TimeoutError:
                self.kill()
                await self._process.wait()

    def _message(self, message: Message, descriptors: list[int]) -> None:
        for descriptor in descriptors:  # a worker has nothing to hand us
            os.close(descriptor)
        self.serving = True
        self._receive(message)


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
