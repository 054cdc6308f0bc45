"""The relay workers as their supervisor sees them: processes, channels, and which pods they have.

Owns their start and end, the rights they start with, and that a pod moves to another worker when
its own dies or no longer answers. A worker reads all traffic of its pods, so nothing it says is
taken for granted, and no other pod is touched by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from weir.proxy import netns
from weir.proxy.control import MAX_DESCRIPTORS, Channel, Message
from weir.proxy.holds import Hold
from weir.proxy.policy.budget import Pace
from weir.proxy.served import ServedPod
from weir.proxy.tenancy import Tenancy

log = logging.getLogger("weir.agent")

STOP_SECONDS = 30.0
RESTART_SECONDS = 0.2
VACATE_SECONDS = 5.0
"""In which a worker closes a pod's listeners; one that does not is killed, which closes them."""
MISSED_LOOKS = 10
"""So many looks without a word end a worker, which a node that is merely busy must not cause. Looks
and not seconds: a supervisor that was stopped itself must not blame its workers."""
MAX_TENANCIES = 16
"""Of a pod that changes hands faster than its requests end."""
SAID_PER_SECOND, SAID_AT_ONCE = 2000.0, 8000.0
"""What a worker may say, in messages and kilobytes: four times what it has to say for 256 pods that
are all busy."""
SOCKETS_PER_SECOND, SOCKETS_AT_ONCE = 16_000.0, 32_000.0
"""More than a worker can connect."""
# a number of its own, above the ranges that distributions and systemd hand out
WORKER_UID = 64830
WORKER_MEMORY = 1 << 30


class Workers:
    """`count` processes. `changed(pod)` is called when what a worker said may change its offer."""

    def __init__(self, count: int, changed: Callable[[ServedPod], None]) -> None:
        self._processes: list[WorkerProcess | None] = [None] * count
        self._changed = changed
        self._tenancies: dict[str, Tenancy] = {}
        self._numbers = 0
        self._replacing: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def pids(self) -> list[int]:
        return [w.pid for w in self._processes if w is not None and w.serving]

    @property
    def tenancies(self) -> list[Tenancy]:
        """Also those that only end their connections."""
        return list(self._tenancies.values())

    async def start(self) -> None:
        """Raises OSError when a process can't be started."""
        for index in range(len(self._processes)):
            await self._start(index)

    def look(self) -> None:
        """Once a second: a worker that says nothing for several looks is as good as dead."""
        for worker in self._processes:
            if worker is not None and worker.silent():
                log.error("relay worker %d does not answer: killing it", worker.pid)
                worker.kill()

    def crowded(self, pod: ServedPod) -> bool:
        """Are too many of its earlier leases still not over? Each costs descriptors."""
        return sum(t.pod is pod for t in self._tenancies.values()) >= MAX_TENANCIES

    def adopt(self, pod: ServedPod, hold: Hold | None = None) -> Tenancy:
        """Have the pod's listeners accepted on, by the worker that has the fewest pods.

        `hold` belongs to the tenancy from now on.
        """
        self._numbers += 1
        tenancy = Tenancy(pod, self._numbers, hold)
        self._tenancies[tenancy.id] = tenancy
        self._place(tenancy)
        return tenancy

    def tell(self, pod: ServedPod, message: Message) -> None:
        """To the worker that accepts for this pod, if there is one."""
        for tenancy in self._tenancies.values():
            if tenancy.pod is pod and not tenancy.leaving and tenancy.worker is not None:
                tenancy.worker.send({**message, "pod": tenancy.id})

    def terminate(self, tenancy: Tenancy) -> None:
        """SIGTERM reached the pod; `drained` is set when its drain is over."""
        tenancy.terminating = True
        self._say(tenancy, {"op": "terminate"})

    async def vacate(self, tenancy: Tenancy) -> None:
        """Return when no worker has a listener of it. What is in flight ends by itself.

        Close the supervisor's own copies afterwards, not before: the pod may move meanwhile.
        """
        tenancy.leaving = True
        worker = tenancy.worker
        if worker is None:
            self._over(tenancy)
            return
        self._say(tenancy, {"op": "release"})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(tenancy.closed.wait(), VACATE_SECONDS)
            return
        log.error("relay worker %d keeps what it shall give back: killing it", worker.pid)
        worker.kill()
        await tenancy.closed.wait()

    async def stop(self) -> None:
        """End them all, at the latest after STOP_SECONDS."""
        self._stopping = True
        for task in self._replacing:
            task.cancel()
        await asyncio.gather(*(w.stop() for w in self._processes if w is not None))
        for tenancy in self.tenancies:
            self._over(tenancy)

    # --- where pods are ------------------------------------------------------------------------
    def _place(self, tenancy: Tenancy) -> None:
        load = {worker: 0 for worker in self._processes if worker is not None}
        for other in self._tenancies.values():
            if other.worker in load:
                load[other.worker] += 1
        tenancy.worker = min(load, key=lambda worker: load[worker], default=None)
        if tenancy.worker is not None:
            tenancy.worker.send(*tenancy.adoption())

    async def _start(self, index: int) -> None:
        worker = WorkerProcess(self._message, self._ended)
        await worker.start()
        self._processes[index] = worker

    def _ended(self, worker: WorkerProcess) -> None:
        if self._stopping:
            return
        log.error("relay worker %d ended; its pods go to another one", worker.pid)
        index = self._processes.index(worker)
        self._processes[index] = None
        lost = [tenancy for tenancy in self._tenancies.values() if tenancy.worker is worker]
        for tenancy in lost:
            if not tenancy.leaving:
                tenancy.pod.worker_died(tenancy.id)
        self._replacing.add(task := asyncio.create_task(self._replace(index, worker, lost)))
        task.add_done_callback(self._replacing.discard)

    async def _replace(self, index: int, worker: WorkerProcess, lost: list[Tenancy]) -> None:
        worker.kill()  # its channel is gone, and its pods wait
        await worker.stop()  # from here on it has no listener, so that others may
        for tenancy in lost:
            tenancy.worker = None
            if tenancy.leaving:
                self._over(tenancy)
            else:
                self._place(tenancy)
                self._changed(tenancy.pod)
        while True:
            await asyncio.sleep(RESTART_SECONDS)  # a worker that dies at once must not spin
            try:
                await self._start(index)
            except OSError:
                log.exception("no relay worker can be started; trying again")
            else:
                break
        for tenancy in self.tenancies:
            if tenancy.worker is None:
                self._place(tenancy)

    def _over(self, tenancy: Tenancy) -> None:
        self._tenancies.pop(tenancy.id, None)
        tenancy.over()

    # --- what is said --------------------------------------------------------------------------
    def _say(
        self, tenancy: Tenancy, message: Message, sockets: Sequence[socket.socket] = ()
    ) -> None:
        if tenancy.worker is not None:
            tenancy.worker.send({**message, "pod": tenancy.id}, sockets)

    def _message(self, worker: WorkerProcess, message: Message) -> None:
        # messages come from a process that reads all traffic: take nothing for granted
        tenancy = self._tenancies.get(str(message.get("pod")))
        operation = message.get("op")
        if tenancy is None or tenancy.worker is not worker:
            return
        pod = tenancy.pod
        if operation == "report" and isinstance(message.get("counters"), dict):
            pod.relayed.report(tenancy.id, message["counters"])
        elif operation == "need":
            self._give_sockets(worker, tenancy, message.get("count"))
        elif tenancy.leaving:
            if operation == "closed":
                tenancy.closed.set()
            elif operation == "released":
                self._over(tenancy)
        elif operation == "ready":
            pod.found(message.get("ready") is True)
            self._changed(pod)
        elif operation == "draining":
            pod.draining = tenancy.terminating or message.get("draining") is True
            self._changed(pod)
        elif operation == "shown":
            tenancy.shown.take(message.get("piece"), message.get("last") is True)
        elif operation == "drained" and tenancy.terminating:
            tenancy.drained.set()

    def _give_sockets(self, worker: WorkerProcess, tenancy: Tenancy, count: Any) -> None:
        namespace = tenancy.netns
        if namespace is None:
            return
        wanted = min(max(count, 1), MAX_DESCRIPTORS) if isinstance(count, int) else 1
        if not worker.sockets.spend(wanted, time.monotonic()):
            log.error("relay worker %d asks for too many sockets", worker.pid)
            worker.give_up()
            return
        sockets: list[socket.socket] = []
        try:
            sockets = netns.tcp_sockets(namespace, wanted)
        except OSError:  # the worker is told by getting none
            log.exception("pod %s: can't make sockets in its network namespace", tenancy.id)
        self._say(tenancy, {"op": "sockets"}, sockets)
        for sock in sockets:
            sock.close()


class WorkerProcess:
    """One relay worker and its channel; `ended` is called once when it is gone."""

    def __init__(
        self,
        receive: Callable[[WorkerProcess, Message], None],
        ended: Callable[[WorkerProcess], None],
    ) -> None:
        self.pid = 0
        self.serving = False  # it has dropped its privileges and said so
        self.sockets = Pace(SOCKETS_PER_SECOND, SOCKETS_AT_ONCE)
        self._missed = 0
        self._receive = receive
        self._ended = ended
        self._channel: Channel | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Raises OSError when the interpreter can't be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            uid = WORKER_UID if os.geteuid() == 0 else 0
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "weir.proxy.worker"),
                *map(str, (theirs.fileno(), uid, WORKER_MEMORY)),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self.pid = self._process.pid
        self._listen(ours)

    def send(self, message: Message, sockets: Sequence[socket.socket] = ()) -> None:
        """Nothing is sent to a worker that is gone."""
        if self._channel is not None:
            self._channel.send(message, sockets)

    def silent(self) -> bool:
        """Whether nothing was heard at several looks, of which this is one."""
        self._missed += 1
        return self.serving and self._missed > MISSED_LOOKS

    def kill(self) -> None:
        """SIGKILL; `stop` reaps."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def give_up(self) -> None:
        """Hear no more of it; it is ended like one that died."""
        if self._channel is not None:
            self._channel.close()
        self._ended(self)

    async def stop(self) -> None:
        """Close the channel, which ends the worker, and reap it."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            except TimeoutError:
                self.kill()
                await self._process.wait()

    def _listen(self, ours: socket.socket) -> None:
        pace = Pace(SAID_PER_SECOND, SAID_AT_ONCE)
        peer = f"relay worker {self.pid}"
        self._channel = Channel(ours, self._message, self._gone, peer=peer, pace=pace)

    def _gone(self) -> None:
        self._ended(self)

    def _message(self, message: Message, _: list[int]) -> None:
        self.serving = True
        self._missed = 0
        self._receive(self, message)
