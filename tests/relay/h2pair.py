"""A relay between clients and a user container of tests.relay.h2rig."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.relay.h2rig import Client, Message, Server, Speaker
from tests.relay.rig import PATIENCE
from weir.proxy.contract import RevisionSettings
from weir.proxy.probes import Prober
from weir.proxy.relay import Relay
from weir.proxy.wire.dial import dial_here


class Pair:
    def __init__(self, user: Server, relay: Relay, server: asyncio.Server) -> None:
        self.user, self.relay = user, relay
        self._server = server
        self._clients: list[Client] = []

    @classmethod
    async def start(cls, *, user_port: int = 0, **settings: Any) -> Pair:
        user = Server()
        await user.start()
        revision = RevisionSettings(user_port=user_port or user.port, **settings)
        relay = Relay(revision, dial=dial_here, prober=Prober(revision, dial_here))
        loop = asyncio.get_running_loop()
        return cls(user, relay, await loop.create_server(relay.protocol, "127.0.0.1", 0))

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    async def bare(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self._clients.append(client)
        return client

    async def client(self, *settings: tuple[int, int]) -> Client:
        client = await self.bare()
        client.begin(*settings)
        return client

    async def settled(self, in_flight: int = 0) -> None:
        """Until the relay has so many requests in flight."""
        async with asyncio.timeout(PATIENCE):
            while self.relay.counters().in_flight != in_flight:
                await asyncio.sleep(0.002)

    async def counted(self, requests: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while self.relay.counters().requests < requests:
                await asyncio.sleep(0.002)

    async def stop(self) -> None:
        for client in self._clients:
            client.abort()
        self.relay.abort()
        self._server.close()
        await self.user.stop()


class Gate:
    """An answer to every request that waits, when the test says so."""

    def __init__(self, body: bytes = b"held") -> None:
        self._body = body
        self._open = asyncio.Event()
        self.waiting = 0

    async def __call__(self, speaker: Speaker, stream: int, message: Message) -> None:
        self.waiting += 1
        await self._open.wait()
        head = speaker.headers(stream, [(":status", "200")])
        speaker.send(head, speaker.data(stream, self._body, True))

    def open(self) -> None:
        self._open.set()
