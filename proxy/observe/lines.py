"""Lines for a pipe that somebody else reads: never waits for the reader, never forgets in silence.

Owns buffering and what happens when the reader is slow. What is said arrives in one write per turn
of the loop. A pipe that is full is tried again when it has room; meanwhile lines are kept up to a
limit, then whole lines are dropped and counted, and the count is reported once there is room.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import time
from collections import deque

_MOST_BYTES = 1 << 20
_ATOMIC = select.PIPE_BUF
"""So many bytes fit into a pipe that poll() calls writable: writing them does not block."""
_TURN = 64 << 10
"""Written in one turn of the loop at most."""
_RETRY_SECONDS = 0.02

log = logging.getLogger("weir.log")


class Lines:
    """`say` a line (bytes, with its newline); `flush` at the end.

    The descriptor stays blocking, because its other holders (a shell, stderr on the same terminal)
    would not expect anything else.
    """

    def __init__(self, descriptor: int, what: str, most: int = _MOST_BYTES) -> None:
        self._descriptor = descriptor
        self._what = what
        self._most = most
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._scheduled = False
        self._broken = False
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self.dropped = 0
        self._reported = 0

    def say(self, line: bytes) -> None:
        if self._broken or self._size + len(line) > self._most:
            self.dropped += 1
            return
        self._waiting.append(line)
        self._size += len(line)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        self._write(_TURN)
        if self._waiting:
            self._scheduled = True
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._turn)
        elif self.dropped > self._reported:
            log.warning(
                "%d lines of the %s were dropped: nobody reads them fast enough",
                self.dropped - self._reported,
                self._what,
            )
            self._reported = self.dropped

    def _write(self, most: int) -> None:
        """As much as the pipe takes without blocking."""
        if not self._waiting:
            return
        data = b"".join(self._waiting)
        at = 0
        try:
            while at < min(len(data), most) and self._poll.poll(0):
                at += os.write(self._descriptor, data[at : at + _ATOMIC])
        except OSError as error:
            log.error("the %s can't be written any more: %s", self._what, error)  # noqa: TRY400
            self._broken = True
            at = len(data)
        self._waiting.clear()
        self._size = len(data) - at
        if self._size:
            self._waiting.append(data[at:])

    async def flush(self, seconds: float) -> None:
        """Write what is left, for so long at most."""
        until = time.monotonic() + seconds
        while self._waiting:
            self._write(len(self._waiting[0]) + self._size)
            if not self._waiting or time.monotonic() >= until:
                break
            await asyncio.sleep(_RETRY_SECONDS)
