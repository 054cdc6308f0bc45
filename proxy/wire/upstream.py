"""The user container as seen from its proxy: one address, idle connections to it, and new ones."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Protocol

from weir.proxy import contract
from weir.proxy.wire.connection import Connection
from weir.proxy.wire.dial import Dial, connect_patiently
from weir.proxy.wire.flow import MEMORY
from weir.proxy.wire.pool import IdlePool
from weir.proxy.wire.protocol import as_protocol
from weir.proxy.wire.response import ResponseHeads


class Caller(Protocol):
    """Who asked for a new connection."""

    def reached(self, connection: Connection) -> None: ...

    def unreachable(self, why: str) -> None:
        """No connection, in the words of the queue-proxy."""


class Upstream:
    """`take` an idle connection or `dial`; `put` back what is reusable.

    Open connections are not limited here: whoever limits concurrency limits them.
    """

    __slots__ = (
        "_dial",
        "_dialling",
        "_host",
        "_known",
        "_open",
        "_pool",
        "_port",
        "authority",
        "clock",
        "put",
        "take",
    )

    def __init__(
        self, host: str, port: int, dial: Dial, idle_limit: int, clock: Callable[[], float]
    ) -> None:
        self.clock = clock
        self.authority = f"{host}:{port}".encode()
        self._host = host
        self._port = port
        self._dial = dial
        self._pool = IdlePool(idle_limit, contract.IDLE_UPSTREAM_SECONDS, clock)
        self._known = ResponseHeads()
        self._open: set[Connection] = set()
        self._dialling: set[asyncio.Task[None]] = set()
        self.take = self._pool.take
        self.put = self._pool.put

    def dial(self, caller: Caller) -> asyncio.Task[None]:
        """Open a connection for the caller, who may cancel that."""
        task = asyncio.get_running_loop().create_task(self._connect(caller))
        self._dialling.add(task)
        task.add_done_callback(self._dialled)
        return task

    async def reach(self) -> socket.socket:
        """A connected socket, for a protocol of the caller's. Raises DialError."""
        return await connect_patiently(self._dial, self._host, self._port)

    def hold(self, held: bool) -> None:
        """Read no answers, for want of memory; or go on."""
        for connection in self._open:
            if held:
                connection.flow.hold(MEMORY)
            else:
                connection.flow.release(MEMORY)

    def owns(self, protocol: Any) -> bool:
        return protocol in self._open

    def close_idle(self) -> None:
        self._pool.close()

    def abort(self, why: str) -> None:
        """Cut every connection; their exchanges are lost for the reason given."""
        for task in self._dialling:
            task.cancel()
        self._pool.close()
        for connection in list(self._open):
            connection.end(why)

    async def _connect(self, caller: Caller) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock = await self.reach()
            connection = Connection(self._gone, self._known)
            await loop.create_connection(lambda: as_protocol(connection), sock=sock)
        except OSError as error:
            caller.unreachable(str(error))
        else:
            self._open.add(connection)
            caller.reached(connection)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dialling.discard(task)
        if not task.cancelled():
            task.result()  # anything unexpected goes to the loop's exception handler

    def _gone(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._pool.drop(connection)
