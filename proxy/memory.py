"""The memory of this process: how much there is, what happens when it runs out.

Owns the limit and the end: a process that got a MemoryError has lost something, nobody knows what,
so it does not go on.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import Any, NoReturn

_FAREWELL = b"ERROR weir.worker: out of memory; this worker ends, and its pods go to another one\n"
_DATA = 5  # of /proc/PID/statm, in pages: what RLIMIT_DATA counts


class Memory:
    """`limit` bytes of data from now on. Raises OSError."""

    def __init__(self, limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        self.limit = limit
        self._file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._page = resource.getpagesize()

    @property
    def used(self) -> int:
        """Bytes that count for the limit; asking takes a microsecond."""
        return int(os.pread(self._file, 256, 0).split()[_DATA]) * self._page


def die() -> NoReturn:
    """At once, and without asking for memory."""
    os.write(2, _FAREWELL)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def end_without() -> None:
    """Where nobody else hears of it, a MemoryError ends this process."""
    told = sys.unraisablehook

    def heard(fault: Any) -> None:
        if issubclass(fault.exc_type, MemoryError):
            die()
        told(fault)

    sys.unraisablehook = heard
