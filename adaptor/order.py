"""One after the other: of the items with one key only the oldest is on its way.

Pure, and generic: items are whatever their owner likes; who waits is asked for nothing.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Order(Generic[T]):
    """Keys that nobody is on the way for take no memory."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[T]] = {}

    def is_free(self, key: str) -> bool:
        return key not in self._lines

    def enter(self, key: str, item: T) -> bool:
        """Whether it may go at once; else `leave` will return it when it is its turn."""
        line = self._lines.get(key)
        if line is None:
            self._lines[key] = deque()
            return True
        line.append(item)
        return False

    def leave(self, key: str) -> T | None:
        """The one on its way has arrived, or gone elsewhere: whose turn it is now."""
        line = self._lines[key]
        if line:
            return line.popleft()
        del self._lines[key]
        return None
