"""Whose turn it is among a pod's connections that have more to do than other pods can wait for.

Owns the line and its pace: one slice in each turn of the event loop, for all of the pod together.
So what many small frames cost is paid by the pod whose clients sent them; the other pods of the
process wait for one slice. It knows nothing of what is done in a slice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol


class Late(Protocol):
    def go_on(self) -> bool:
        """Do one slice. Is there more?"""


class Turns:
    """`line` holds who waits; whoever has something to do then goes to its end."""

    __slots__ = ("line",)

    def __init__(self) -> None:
        self.line: deque[Late] = deque()

    def wait(self, late: Late) -> None:
        """To be called once until its `go_on` has said that there is no more."""
        if not self.line:
            asyncio.get_running_loop().call_soon(self._next)
        self.line.append(late)

    def _next(self) -> None:
        late = self.line[0]  # it stays until it is done: who comes meanwhile is behind it
        more = late.go_on()
        self.line.popleft()
        if more:
            self.line.append(late)
        if self.line:
            asyncio.get_running_loop().call_soon(self._next)
