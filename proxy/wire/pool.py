"""Idle keep-alive connections to one address: newest first, bounded, not kept forever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from weir.proxy.wire.connection import Connection


class IdlePool:
    """`put` what is reusable, `take` what is still alive.

    A connection that the peer closes leaves by `drop`, which its `gone` callback must call. One
    loop timer, and only while something is idle.
    """

    __slots__ = ("_clock", "_idle", "_limit", "_seconds", "_timer")

    def __init__(self, limit: int, seconds: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._limit = limit
        self._seconds = seconds
        self._idle: dict[Connection, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, careful: bool) -> Connection | None:
        """`careful`: ask the kernel if the peer has closed it, for what can't be sent twice."""
        while self._idle:
            connection, _ = self._idle.popitem()
            if not (careful and connection.stale()):
                return connection
            connection.forget()
        return None

    def put(self, connection: Connection, now: float) -> None:
        """`now` of the pool's clock."""
        if len(self._idle) >= self._limit:
            connection.close()
            return
        connection.idle_since = now
        self._idle[connection] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._sweep)

    def drop(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._idle:
            self._idle.popitem()[0].close()

    def _sweep(self) -> None:
        """Close what was idle too long; the longest idle come first."""
        self._timer = None
        limit = self._clock() - self._seconds
        for connection in list(self._idle):
            if connection.idle_since > limit:
                wait = max(connection.idle_since - limit, 0.01)
                self._timer = asyncio.get_running_loop().call_later(wait, self._sweep)
                return
            del self._idle[connection]
            connection.close()
