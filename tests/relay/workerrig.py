"""A relay worker as it runs: a process of little memory, two pods, one with hostile callers.

What is measured is the process itself (memory, descriptors), and how the other pod is answered
meanwhile. The function of both is a program of its own that speaks HTTP/1.1 and HTTP/2.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from tests.contract.world import ENVIRONMENT
from tests.relay.certificates import Pair
from weir.proxy import sockets
from weir.proxy.control import Channel, Message

MEMORY = 256 << 20
"""Of a worker here: a quarter of what it has else, so that the loads may be small."""
ROLES = ("data", "admin", "autoscaler", "metrics", "tls")
FUNCTION = Path(__file__).with_name("hungry_function.py")


class WorkerPod:
    """One pod of the worker: the ports its listeners have on the loopback, by role."""

    def __init__(self, name: str, port: int, http2: bool, pair: Pair | None) -> None:
        self.name = name
        roles = ROLES if pair is not None else ROLES[:-1]
        self.listeners = [sockets.listen("127.0.0.1", 0) for _ in roles]
        self.ports = {r: s.getsockname()[1] for r, s in zip(roles, self.listeners, strict=True)}
        environment = {
            **ENVIRONMENT,
            "SERVING_POD": name,
            "USER_PORT": str(port),
            "SERVING_READINESS_PROBE": "",
        }
        if http2:
            environment["USER_PORT_NAME"] = "h2c"
        self.adoption: Message = {
            "op": "adopt",
            "pod": f"{name}/1",
            "roles": list(roles),
            "offer": None,
            "foreign": False,
            "terminating": False,
            "environment": environment,
            "age": 0.0,
            "certificate": pair and [pair.certificate.read_text(), pair.key.read_text()],
            "counted": None,
            "shown": "",
        }


class Running:
    """The worker. `hungry` has hostile callers, `other` is its neighbour."""

    def __init__(self, process: asyncio.subprocess.Process, ours: socket.socket) -> None:
        self.process = process
        self.counters: dict[str, dict[str, Any]] = {}
        self.ended = asyncio.Event()
        self.alive = 0
        self.channel = Channel(ours, self._said, self.ended.set)
        self.hungry: WorkerPod
        self.other: WorkerPod
        self.most = self.descriptors = 0
        self._slowest = self._began = 0.0
        self.asked = 0

    def _said(self, message: Message, _: list[int]) -> None:
        if message["op"] == "report":
            self.counters[message["pod"].partition("/")[0]] = message["counters"]
        elif message["op"] in ("alive", "hello"):
            self.alive += 1

    @property
    def data(self) -> int:
        """Bytes that count for its limit."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(pages[5]) * resource.getpagesize()

    @property
    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def slowest(self) -> float:
        """Seconds, of the neighbour's requests so far: one that is not answered yet included."""
        waits = time.monotonic() - self._began if self._began else 0.0
        return max(self._slowest, waits)

    async def watch(self) -> None:
        """The most that it had of memory and descriptors, until cancelled."""
        with contextlib.suppress(OSError):  # it has died, which `ended` tells
            while True:
                self.most = max(self.most, self.data)
                self.descriptors = max(self.descriptors, self.files)
                await asyncio.sleep(0.01)

    async def neighbour(self) -> None:
        """A client of the other pod, until cancelled: every request is answered."""
        loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.other.ports["data"])
        try:
            while True:
                self._began = began = loop.time()
                writer.write(b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n")
                answer = await reader.readuntil(b"hello")
                assert answer.startswith(b"HTTP/1.1 200 "), answer
                self._slowest = max(self._slowest, loop.time() - began)
                self._began = 0.0
                self.asked += 1
                await asyncio.sleep(0.002)
        finally:
            writer.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                assert not self.ended.is_set(), "the worker has died"
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def worker(
    *, memory: int = MEMORY, http2: bool = False, pair: Pair | None = None
) -> AsyncIterator[Running]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "weir.proxy.worker", str(theirs.fileno()), "0"),
            str(memory),
            pass_fds=[theirs.fileno()],
            stderr=sys.stderr,
        )
    functions = [
        await asyncio.create_subprocess_exec(sys.executable, FUNCTION, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    made = Running(process, ours)
    tasks: list[asyncio.Task[None]] = []
    try:
        user = []
        for function in functions:
            assert function.stdout is not None
            user.append(int(await function.stdout.readline()))
        made.hungry = WorkerPod("hungry", user[0], http2, pair)
        made.other = WorkerPod("other", user[1], False, pair)
        await made.until(lambda: made.alive > 0)
        for pod in (made.hungry, made.other):
            made.channel.send(pod.adoption, pod.listeners)
            for listener in pod.listeners:
                listener.close()
        tasks += [asyncio.create_task(made.watch()), asyncio.create_task(made.neighbour())]
        await made.until(lambda: made.asked > 0 and len(made.counters) == 2)
        yield made
        for task in tasks:
            if task.done() and not made.ended.is_set():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        made.channel.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        for function in functions:
            function.kill()
            await function.wait()
