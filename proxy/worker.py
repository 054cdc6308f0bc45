"""A relay worker: serves the data ports of the pods it is given, and holds no privilege.

Owns the relays, their probers and their stock of sockets for dialling the user containers.
Everything it needs comes over the control channel from the supervisor (proxy/agent.py); what it
tells back is readiness, counters and "give me sockets". It reads all traffic, so it may do
nothing else: its own uid, no capabilities, no new privileges, bounded memory.
"""

import argparse
import asyncio
import contextlib
import ctypes
import encodings.idna  # noqa: F401  getaddrinfo's, which no longer finds it later: see main()
import errno
import os
import resource
import signal
import socket
import sys
import time
import urllib.parse  # noqa: F401  a redirected probe's, likewise
from collections import deque
from dataclasses import asdict
from typing import Any

import uvloop

# what a Prober and a Relay import late is not to be had any more then
from weir.proxy import contract, exchange2, probe_grpc, probe_http  # noqa: F401
from weir.proxy.control import Channel, Message
from weir.proxy.podserver import PodServer, Role
from weir.proxy.probes import Prober
from weir.proxy.relay import Relay, RelayCounters

SOCKETS_LOW = 16  # below this many spare sockets of a pod the worker asks for more
SOCKETS_BATCH = 32
REPORT_SECONDS = 0.5
PROBE_PERIOD_SECONDS = 10.0  # kubelet's default readiness period
DRAIN_SECONDS = 60.0  # bound for what is in flight when the supervisor is gone
PR_SET_NO_NEW_PRIVS = 38
PR_SET_DUMPABLE = 4


class Tenant:
    """One pod in this worker. The sockets of a `foreign` pod, in another netns, come by channel."""

    def __init__(
        self, name: str, settings: contract.RevisionSettings, foreign: bool, channel: Channel
    ) -> None:
        self.name = name
        self.offer: str | None = None
        self.ready = False
        self._reported: tuple[int, ...] = ()
        self._foreign = foreign
        self._channel = channel
        self._stock: deque[socket.socket] = deque()
        self._asked = False
        self._waiting: deque[asyncio.Future[socket.socket]] = deque()
        periods = [probe.period for probe in settings.probes if probe.period]
        self._period = min(periods, default=PROBE_PERIOD_SECONDS)
        self._prober = Prober(settings, self._dial)
        self.relay = Relay(settings, dial=self._dial, prober=self._prober, offer=lambda: self.offer)
        self._server = PodServer(self.relay, uptime_from=time.monotonic())

    async def serve(self, listeners: list[socket.socket]) -> None:
        """Accept on the listeners and watch the user container's readiness, until cancelled."""
        try:
            await self._server.serve(Role.DATA, listeners)
            while True:
                await self._watch()
        finally:
            self._server.stop_accepting()
            for spare in self._stock:
                spare.close()

    async def release(self) -> None:
        """Stop accepting, wait for what is in flight. The caller bounds the time."""
        self.relay.start_draining()
        self._server.stop_accepting()
        await self.relay.drained()

    def stock(self, sockets: list[socket.socket]) -> None:
        """Sockets from the supervisor; waiting dials are served first. None at all: it has none."""
        self._asked = False
        if not sockets:
            error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            while self._waiting:
                future = self._waiting.popleft()
                if not future.done():
                    future.set_exception(error)
        self._stock.extend(sockets)
        while self._waiting and self._stock:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(self._stock.popleft())
        if self._waiting:
            self._ask()

    def report(self) -> None:
        """Tell the counters, if anything happened since the last time."""
        counters = self.relay.counters()
        now = (counters.requests, counters.in_flight, counters.connections, counters.probes)
        if counters.in_flight or now != self._reported:
            self._reported = now
            self._channel.send({"op": "report", "pod": self.name, "counters": numbers(counters)})

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
            return self._stock.popleft()
        future: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return await future

    async def _watch(self) -> None:
        ready = await self._prober.ready()
        if ready != self.ready:
            self.ready = ready
            self._channel.send({"op": "ready", "pod": self.name, "ready": ready})
        # an unready container has been polled for seconds by the prober itself
        await asyncio.sleep(self._period if ready else 0.05)


class Worker:
    """All tenants of this process, driven by the channel's messages."""

    def __init__(self, sock: socket.socket) -> None:
        self._tenants: dict[str, tuple[Tenant, asyncio.Task[None]]] = {}
        self._gone = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._channel = Channel(sock, self._receive, self._gone.set)

    async def run(self) -> None:
        """Until the supervisor closes the channel; then what is in flight may end, bounded."""
        self._channel.send({"op": "hello", "pid": os.getpid()})
        while not self._gone.is_set():
            self._report()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), REPORT_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS), asyncio.TaskGroup() as group:
                for tenant, _ in self._tenants.values():
                    group.create_task(tenant.release())

    def _report(self) -> None:
        for name, (tenant, task) in self._tenants.items():
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise RuntimeError(f"pod {name}: its relay failed") from task.exception()
            tenant.report()

    def _receive(self, message: Message, descriptors: list[int]) -> None:
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        for sock in sockets:
            sock.setblocking(False)
        name = message["pod"]
        if message["op"] == "adopt":
            self._adopt(name, message, sockets)
            return
        if name not in self._tenants:  # it left while the message was under way
            for sock in sockets:
                sock.close()
            if message["op"] == "release":
                self._channel.send({"op": "released", "pod": name})
            return
        tenant, _ = self._tenants[name]
        if message["op"] == "sockets":
            tenant.stock(sockets)
        elif message["op"] == "offer":
            tenant.offer = message["value"]
        elif message["op"] == "drain":
            tenant.relay.start_draining()
        elif message["op"] == "release":
            self._background.add(task := asyncio.create_task(self._release(name)))
            task.add_done_callback(self._background.discard)

    def _adopt(self, name: str, message: Message, sockets: list[socket.socket]) -> None:
        tenant = Tenant(name, settings_from(message["settings"]), message["foreign"], self._channel)
        self._tenants[name] = (tenant, asyncio.create_task(tenant.serve(sockets)))

    async def _release(self, name: str) -> None:
        tenant, task = self._tenants[name]
        await tenant.release()
        task.cancel()
        await asyncio.wait([task])
        tenant.report()
        self._channel.send({"op": "released", "pod": name})
        del self._tenants[name]


def numbers(counters: RelayCounters) -> dict[str, float]:
    """The counters as the supervisor takes them: flat, and nothing but numbers."""
    flat = {n: v for n, v in asdict(counters).items() if isinstance(v, int | float)}
    flat |= {f"{i}xx": count for i, count in enumerate(counters.statuses, 1)}
    return flat | {"p50": counters.quantile(0.5), "p99": counters.quantile(0.99)}


def settings_from(fields: dict[str, Any]) -> contract.RevisionSettings:
    """The settings as `dataclasses.asdict` and JSON left them."""
    probes = []
    for probe in fields["probes"]:
        http, grpc = probe["http"], probe["grpc"]
        if http is not None:
            headers = tuple((name, value) for name, value in http["headers"])
            http = contract.HttpGet(**{**http, "headers": headers})
        if grpc is not None:
            grpc = contract.GrpcCheck(**grpc)
        probes.append(contract.Probe(**{**probe, "http": http, "grpc": grpc}))
    return contract.RevisionSettings(**{**fields, "probes": tuple(probes)})


def drop_privileges(uid: int, memory: int) -> None:
    """Become `uid` for good: no groups, no capabilities, none to be had by exec; memory bounded.

    uid 0 keeps the user (a plain run without root); `memory` in bytes limits the data segment.
    Raises OSError when the kernel refuses, which ends the worker: it never runs with more.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)  # leaving uid 0 clears all capability sets
    for option, value in ((PR_SET_NO_NEW_PRIVS, 1), (PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, value, 0, 0, 0):
            code = ctypes.get_errno()
            raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def main(argv: list[str]) -> int:
    """Started by the supervisor as `python -m weir.proxy.worker`, never by hand."""
    parser = argparse.ArgumentParser(prog="weir-worker")
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--uid", type=int, default=0)
    parser.add_argument("--memory", type=int, default=1 << 30)
    args = parser.parse_args(argv)
    # the supervisor decides when to stop; Ctrl-C in a terminal reaches the whole process group
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # after all imports: an unprivileged uid may not be able to read where Weir is installed
    drop_privileges(args.uid, args.memory)

    async def run() -> None:
        await Worker(socket.socket(fileno=args.channel)).run()

    uvloop.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
