"""Whose turn it is among a pod's connections that have more to do than other pods can wait for.

Owns the line and its pace: for all connections of a pod together there is one slice of work in each
turn of the event loop. So what many small frames cost is paid by the pod whose clients sent them;
the other pods of the process wait for one slice. It knows nothing of what is done in a slice.
"""

from __future__ import annotations

import asyncio
from typing import Protocol


class Late(Protocol):
    def go_on(self, turns: Turns) -> bool:
        """Do what fits `turns.left`, and take that from it. Is there more?"""


SLICE = 2048
"""Two milliseconds or three, in frames of HTTP/2: more than honest clients have for one turn."""


class Turns:
    """`line` holds who waits; whoever has something to do then goes to its end.

    `left` of the slice is for those that come while nobody waits; they take what they use of it.
    """

    __slots__ = ("_now", "left", "line")

    def __init__(self) -> None:
        self.line: list[Late] = []  # mostly empty, and every pod has several: no deque
        self.left = SLICE
        self._now = 0.0

    def look(self) -> int:
        """What is left for who comes now, while nobody waits."""
        now = asyncio.get_running_loop().time()  # of an event loop that stands still in a turn
        if now != self._now:
            self._now = now
            self.left = SLICE
        return self.left

    def wait(self, late: Late) -> None:
        """To be called once until its `go_on` has said that there is no more."""
        if not self.line:
            asyncio.get_running_loop().call_soon(self._next)
        self.line.append(late)

    def _next(self) -> None:
        self.left = SLICE
        while self.line and self.left > 0:
            late = self.line[0]  # it stays until it is done: who comes meanwhile is behind it
            self.left -= 1
            more = late.go_on(self)
            self.line.pop(0)
            if more:
                self.line.append(late)
        if self.line:
            asyncio.get_running_loop().call_soon(self._next)
