"""A relay worker: serves the pods it is given, and holds no privilege.

Owns the process, its messages and its tenants (proxy/tenant.py). Everything it needs comes over
the control channel from the supervisor (proxy/agent.py); what it tells back is readiness, counters
and "give me sockets". It reads all traffic, so it may do nothing else: its own uid, no
capabilities, no new privileges, bounded memory.
"""

import asyncio
import contextlib
import ctypes
import encodings.idna  # noqa: F401  getaddrinfo's, which no longer finds it later: see main()
import os
import signal
import socket
import sys
import urllib.parse  # noqa: F401  a redirected probe's, likewise
from collections.abc import Coroutine
from typing import Any

import uvloop

# what a Prober, a Relay and what observes them import late is not to be had any more then
from weir.proxy import contract, exchange2, podlog, probe_grpc, probe_http, sockets  # noqa: F401
from weir.proxy.control import Channel, Message
from weir.proxy.environment import SidecarSettings, read_environment
from weir.proxy.memory import Memory, die, end_without
from weir.proxy.observe import identity, metrics, opencensus  # noqa: F401
from weir.proxy.podserver import Role
from weir.proxy.policy.budget import Budget, connections, fair_level
from weir.proxy.tenant import Tenant, opened
from weir.proxy.wire.aside import look_every

REPORT_SECONDS = 0.5
WATCHES = 64
"""How often the memory is looked at while all of it is taken by what is put aside."""
PR_SET_NO_NEW_PRIVS = 38
PR_SET_DUMPABLE = 4


class Worker:
    """All tenants of this process, driven by the channel's messages."""

    def __init__(self, sock: socket.socket, memory: Memory) -> None:
        self._memory = memory
        self._budget = Budget(0)
        self._tenants: dict[str, tuple[Tenant, asyncio.Task[None]]] = {}
        self._gone = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._channel = Channel(sock, self._receive, self._gone.set)

    async def run(self) -> None:
        """Until the supervisor closes the channel; then what is in flight may end, bounded."""
        asyncio.get_running_loop().set_exception_handler(self._failed)
        look_every(self._memory.limit // WATCHES, self._watch_memory)
        self._channel.send({"op": "hello", "pid": os.getpid()})
        while not self._gone.is_set():
            self._watch_memory()
            self._report()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), REPORT_SECONDS)
        for tenant, _ in self._tenants.values():
            tenant.alone()
        patience = max((tenant.patience for tenant, _ in self._tenants.values()), default=0.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience), asyncio.TaskGroup() as group:
                for tenant, _ in self._tenants.values():
                    group.create_task(tenant.leave())
        for _, task in self._tenants.values():
            task.cancel()

    def _watch_memory(self) -> None:
        """Half of it is for what is under way. If that is exceeded, who has most of it gives up
        some, and whoever has less than the others are left with, nothing."""
        limit = self._memory.limit
        if self._memory.used <= limit // 2:
            return
        tenants = [tenant for tenant, _ in self._tenants.values()]
        weights = {tenant: tenant.relay.weigh() for tenant in tenants}
        amounts = {tenant: sum(weights[tenant].values()) for tenant in tenants}
        level = fair_level(amounts.values(), limit * 3 // 8)
        for tenant in tenants:
            if amounts[tenant] > level:
                tenant.context.run(tenant.shed, weights[tenant], level)

    def _failed(self, loop: asyncio.AbstractEventLoop, what: dict[str, Any]) -> None:
        """What nobody expected, or no memory."""
        if isinstance(what.get("exception"), MemoryError):
            die()
        protocol = what.get("protocol")
        for tenant, _ in self._tenants.values():
            if protocol is not None and tenant.relay.owns(protocol):
                tenant.context.run(loop.default_exception_handler, what)
                return
        loop.default_exception_handler(what)

    def _report(self) -> None:
        if self._channel.waiting:  # nobody listens: the numbers of later are as good
            return
        self._channel.send({"op": "alive"})
        for name, (tenant, task) in self._tenants.items():
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise RuntimeError(f"pod {name}: its relay failed") from task.exception()
            tenant.report()

    def _receive(self, message: Message, descriptors: list[int]) -> None:
        name = message["pod"]
        if message["op"] == "adopt":
            self._adopt(name, message, list(map(opened, descriptors)))
            return
        if name not in self._tenants:  # it left while the message was under way
            for descriptor in descriptors:
                os.close(descriptor)
            if message["op"] == "release":
                self._channel.send({"op": "closed", "pod": name})
                self._channel.send({"op": "released", "pod": name})
            return
        tenant, _ = self._tenants[name]
        tenant.context.run(self._told, tenant, message, descriptors)

    def _told(self, tenant: Tenant, message: Message, descriptors: list[int]) -> None:
        if message["op"] == "sockets":
            tenant.stock(descriptors)
        elif message["op"] == "look":
            tenant.look()
        elif message["op"] == "offer":
            tenant.offer = message["value"]
        elif message["op"] == "direct":
            tenant.direct(message["load"], message.get("counted"))
        elif message["op"] == "certificate":
            tenant.renew(*message["pair"])
        elif message["op"] == "terminate":
            self._begin(tenant.terminate())
        elif message["op"] == "release":
            self._begin(self._release(tenant.name))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._background.add(task := asyncio.create_task(work))
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled():
            task.result()  # anything unexpected goes to the loop's exception handler

    def _adopt(self, name: str, message: Message, sockets: list[socket.socket]) -> None:
        settings: contract.RevisionSettings | SidecarSettings
        if "environment" in message:
            settings = read_environment(message["environment"])
        else:
            settings = settings_from(message["settings"])
        age = message.get("age", 0.0)
        pair = message.get("certificate")
        roles = map(Role, message["roles"])
        listeners = list(zip(roles, sockets, strict=True))
        foreign = message["foreign"]
        share = self._budget.share()
        tenant = Tenant(name, settings, foreign, self._channel, listeners, share, age, pair)
        tenant.offer = message["offer"]
        if tenant.page is not None:
            tenant.page.direct.told = message.get("counted")
            tenant.page.resume(message.get("shown", ""))
        serving = asyncio.get_running_loop().create_task(tenant.serve(), context=tenant.context)
        self._tenants[name] = (tenant, serving)
        self._divide()
        if message["terminating"]:
            tenant.context.run(self._begin, tenant.terminate())

    async def _release(self, name: str) -> None:
        tenant, task = self._tenants[name]
        await tenant.leave()
        task.cancel()
        await asyncio.wait([task])
        tenant.report()
        self._channel.send({"op": "released", "pod": name})
        del self._tenants[name]
        self._divide()

    def _divide(self) -> None:
        files, memory = sockets.open_files(), self._memory.limit
        self._budget.resize(connections(files, memory, len(self._tenants)))


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


def drop_privileges(uid: int) -> None:
    """Become `uid` for good: no groups, no capabilities, none to be had by exec.

    uid 0 keeps the user (a plain run without root).
    Raises OSError when the kernel refuses, which ends the worker: it never runs with more.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)  # leaving uid 0 clears all capability sets
    for option, value in ((PR_SET_NO_NEW_PRIVS, 1), (PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, value, 0, 0, 0):
            code = ctypes.get_errno()
            raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def main(argv: list[str]) -> int:
    """Started by the supervisor as `python -m weir.proxy.worker CHANNEL UID MEMORY`: a descriptor,
    whom to become, bytes."""
    channel, uid, limit = map(int, argv)
    podlog.set_up()
    # the supervisor decides when to stop; Ctrl-C in a terminal reaches the whole process group
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sockets.raise_open_files()
    # after all imports: an unprivileged uid may not be able to read where Weir is installed
    memory = Memory(limit)
    drop_privileges(uid)
    end_without()

    async def run() -> None:
        await Worker(socket.socket(fileno=channel), memory).run()

    uvloop.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
