"""The log of a process that serves many pods: each line says whose it is.

Owns the name of the pod that work is done for (a context variable: whatever the event loop runs
later for that work inherits it) and the format. Costs nothing where nothing is logged.
"""

from __future__ import annotations

import logging
import sys
from contextvars import Context, ContextVar, copy_context

_POD: ContextVar[str] = ContextVar("pod", default="")


def context_of(pod: str) -> Context:
    """Run in it, or make tasks in it, what is done for this pod."""
    context = copy_context()
    context.run(_POD.set, pod)
    return context


class _Whose(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        pod = _POD.get()
        record.pod = f"pod {pod}: " if pod else ""
        return True


def set_up() -> None:
    """Warnings and errors go to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Whose())
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(pod)s%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
