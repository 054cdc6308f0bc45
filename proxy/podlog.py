"""The log of a process that serves many pods: each line says whose it is, and none has too many.

Owns the name of the pod that work is done for (a context variable: whatever the event loop runs
later for that work inherits it), the format, and how much may be said of a pod. Costs nothing where
nothing is logged.
"""

from __future__ import annotations

import logging
import sys
import time
from contextvars import Context, ContextVar, copy_context

from weir.proxy.policy.budget import Pace

LINES_PER_SECOND, LINES_AT_ONCE = 5.0, 100.0
"""Clients can make a relay complain; they shall not fill the node's disk, nor hide other pods."""
_MOST_PODS = 1000
_POD: ContextVar[str] = ContextVar("pod", default="")


def context_of(pod: str) -> Context:
    """Run in it, or make tasks in it, what is done for this pod."""
    context = copy_context()
    context.run(_POD.set, pod)
    return context


class Whose(logging.Filter):
    """Names the pod, and leaves out what is too much."""

    def __init__(self) -> None:
        super().__init__()
        self._paces: dict[str, Pace] = {}
        self._left_out: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        pod = _POD.get()
        name = f"pod {pod}: " if pod else ""
        pace = self._paces.get(pod)
        if pace is None:
            if len(self._paces) >= _MOST_PODS:
                self._paces.clear()
            pace = self._paces[pod] = Pace(LINES_PER_SECOND, LINES_AT_ONCE)
        if not pace.spend(1.0, time.monotonic()):
            self._left_out[pod] = self._left_out.get(pod, 0) + 1
            return False
        missing = self._left_out.pop(pod, 0)
        record.pod = f"{name}({missing} lines before were left out) " if missing else name
        return True


def set_up() -> None:
    """Warnings and errors go to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Whose())
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(pod)s%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
