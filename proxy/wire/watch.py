"""One timer of the event loop for the deadlines of many exchanges.

Arming and cancelling a loop timer for every request costs more than the request's own bookkeeping.
A Watch keeps the exchanges in a set and one timer at the earliest deadline it has seen; most
requests are gone long before, and the timer finds nothing to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from math import inf
from typing import Generic, Protocol, TypeVar

_GRAIN = 0.002
"""Seconds between two rounds at least; also covers loops whose timers ring a moment early."""


class Timed(Protocol):
    """Something with deadlines. `due` in seconds of the Watch's clock, inf for none."""

    def due(self) -> float: ...

    def expire(self, now: float) -> None: ...


T = TypeVar("T", bound=Timed)


class Watch(Generic[T]):
    """`add` what has a deadline, `discard` what is over; `expire(now)` is called when it is due.

    A deadline may move later without notice, never earlier (`add` again for that).
    `due` spares the question where the caller knows the answer's lower bound.
    """

    __slots__ = ("_at", "_clock", "_handle", "_items", "_loop")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._items: dict[T, None] = {}
        self._at = inf
        self._handle: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._items))

    def add(self, item: T, due: float) -> None:
        self._items[item] = None
        if due < self._at:
            self._arm(due)

    def discard(self, item: T) -> None:
        self._items.pop(item, None)

    def close(self) -> None:
        self._items.clear()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._at = inf

    def _arm(self, at: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._at = at
        self._handle = self._loop.call_later(max(at - self._clock(), _GRAIN), self._ring)

    def _ring(self) -> None:
        self._handle = None
        self._at = inf
        now = self._clock()
        earliest = inf
        for item in list(self._items):
            due = item.due()
            if due <= now:
                item.expire(now)  # may discard itself, or others
                due = item.due()
            if due < earliest and item in self._items:
                earliest = due
        if earliest < self._at:
            self._arm(earliest)
