"""A PodServer with its relay and a user container, on ports of the loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from tests.relay.rig import Client, UserContainer, request
from weir.proxy import sockets
from weir.proxy.contract import RevisionSettings
from weir.proxy.podserver import PodServer, Role
from weir.proxy.policy.budget import Share
from weir.proxy.policy.drain import Drain
from weir.proxy.probes import Prober
from weir.proxy.relay import Relay
from weir.proxy.tls import TlsPort
from weir.proxy.wire.dial import dial_here

READY = b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: kube-probe/1\r\nK-Network-Probe: queue\r\n\r\n"
HOOK = request("GET", "/wait-for-drain")


class Pod:
    def __init__(self, user: UserContainer, server: PodServer, ports: dict[Role, int]) -> None:
        self.user, self.server, self.relay = user, server, server.relay
        self._ports = ports
        self._clients: list[Client] = []
        self.draining: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        *,
        quiet: float = 0.3,
        grace: float = 300,
        upgraded_seconds: float = 60,
        share: Share | None = None,
        secure: TlsPort | None = None,
        **more: Any,
    ) -> Pod:
        user = UserContainer()
        await user.start()
        revision = RevisionSettings(user_port=user.port, pod="pod-1", **more)
        prober = Prober(revision, dial_here)
        relay = Relay(revision, dial=dial_here, prober=prober, share=share)
        server = PodServer(
            relay,
            uptime_from=time.monotonic(),
            drain=Drain(grace, quiet),
            upgraded_seconds=upgraded_seconds,
            render=lambda: b"# metrics\n",
            secure=secure,
        )
        ports = {}
        roles = [Role.DATA, Role.ADMIN, Role.AUTOSCALER, Role.METRICS]
        for role in roles if secure is None else [*roles, Role.TLS]:
            listener = sockets.listen("127.0.0.1", 0)
            ports[role] = listener.getsockname()[1]
            await server.serve(role, [listener])
        return cls(user, server, ports)

    async def client(self, role: Role = Role.DATA) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self._ports[role]))
        self._clients.append(client)
        return client

    async def ready(self) -> int:
        """What a fresh readiness probe is told."""
        client = await self.client()
        return (await client.ask(READY)).status

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(20):
            while not await condition():
                await asyncio.sleep(0.005)

    def terminate(self) -> asyncio.Task[None]:
        self.server.terminate()
        self.draining = asyncio.create_task(self.server.drained())
        return self.draining

    async def refused(self) -> bool:
        try:
            (await self.client()).reset()
        except ConnectionRefusedError:
            return True
        return False

    async def stop(self) -> None:
        for client in self._clients:
            client.reset()
        if self.draining is not None:
            self.draining.cancel()
            with suppress(asyncio.CancelledError):
                await self.draining
        self.server.close()
        await self.user.stop()


MakePod = Callable[..., Awaitable[Pod]]
