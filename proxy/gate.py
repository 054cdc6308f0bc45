"""Listeners that accept while there is room, and otherwise let connections wait in their backlog.

Owns when a listener accepts. Whether there is room, and who may be closed to make some, is the
business of the clients' set. Descriptors must not run out before a gate closes: libuv would then
accept whatever waits, of all pods, and close it at once.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from weir.proxy import sockets
from weir.proxy.wire.clients import Clients

if TYPE_CHECKING:
    from weir.proxy.tls import TlsPort

CLOSED_SECONDS = 0.05
"""Between two looks of a closed gate."""


class Gate:
    """`make` gives the protocol of a connection, which it makes one of `clients`; `secure` is for
    a TLS port."""

    __slots__ = ("_clients", "_full", "_make", "_open", "_secure", "_shut", "_waiting", "closings")

    def __init__(
        self,
        make: Callable[[], asyncio.Protocol],
        clients: Clients[Any],
        secure: TlsPort | None = None,
    ) -> None:
        self._make = make if secure is None else secure.secure(make)
        self._clients = clients
        self._secure = secure
        self._open: list[tuple[asyncio.Server, socket.socket]] = []
        self._shut: list[socket.socket] = []
        self._full = False
        self.closings = 0
        """How often there was no room."""
        self._waiting: asyncio.Task[None] | None = None

    async def open(self, listener: socket.socket) -> None:
        """Accept on a listening, non-blocking socket, which is owned from now on. Raises OSError,
        and then it is not."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._accepted, sock=listener, backlog=sockets.BACKLOG)
        self._open.append((server, listener))

    def close(self) -> None:
        """Idempotent. Connections stay."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        for server, _ in self._open:
            server.close()
        for listener in self._shut:
            listener.close()
        self._open.clear()
        self._shut.clear()

    @property
    def closed(self) -> bool:
        """For want of room."""
        return bool(self._shut)

    def _accepted(self) -> asyncio.Protocol:
        made = self._make()
        if not self._full and not self._clients.room:
            # later: closing the listener now would lose the connection that is being accepted
            self._full = True
            asyncio.get_running_loop().call_soon(self._look)
        return made

    def _look(self) -> None:
        self._full = False
        if not self._clients.room and not self._spare():
            self.closings += 1
            self._shut_all()

    def _spare(self) -> bool:
        """Was there somebody to be closed?"""
        now = asyncio.get_running_loop().time()
        young = self._secure.young if self._secure is not None else None
        return self._clients.spare(now) or (young is not None and young.spare(now))

    def _shut_all(self) -> None:
        """An event loop can't pause a server, but it gives up its descriptor for a copy."""
        while self._open:
            server, listener = self._open[-1]
            try:
                self._shut.append(listener.dup())
            except OSError:  # no descriptor: at the next connection there may be one
                break
            server.close()
            self._open.pop()
        if self._shut and self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_task(self._wait())

    async def _wait(self) -> None:
        while not self._clients.room and not self._spare():
            await asyncio.sleep(CLOSED_SECONDS)
        while self._shut:
            listener = self._shut[-1]
            try:
                await self.open(listener)
            except OSError:  # fenced meanwhile: the lease is over, and we'll be told
                listener.close()
            self._shut.pop()
        self._waiting = None
