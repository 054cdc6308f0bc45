"""The way back from the sidecar to hold, when an agent has come (docs/decisions/022).

Owns the environment variable that says hold started us, the descriptors hold left, and the exec.
An unread ring makes the door readable; it stays unread, hold takes it. When to stop accepting and
whether what is in flight has ended is the sidecar's business.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterable, Mapping

DOOR = 63
"""Hold's own end, which it leaves open for us (hold/lease.h)."""
LET_GO_SECONDS = 2.0
"""How long connections wait in the backlog for requests to end, at most. With one in flight that
has been for as long they don't: it would not end in that time, either."""
LOOK_SECONDS = 0.25
"""How often to look whether it has ended meanwhile."""
AGAIN_SECONDS, MOST_SECONDS = 5.0, 60.0
"""After requests that did not end when they were waited for; every time twice as long."""
_FIRST = 3


def hold_of(environment: Mapping[str, str]) -> str:
    """Hold's path, empty when it did not start us."""
    path = environment.get("WEIR_HOLD", "")
    try:
        os.fstat(DOOR)
    except OSError:
        return ""
    return path


def exec_hold(path: str, listeners: Iterable[socket.socket]) -> None:
    """Become hold, with the listeners. Does not return; a SIGTERM meanwhile reaches hold."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    # above all that is written to below, DOOR included
    kept = [_above(listener, DOOR + 1) for listener in listeners]
    for number, descriptor in enumerate(kept, start=_FIRST):
        os.dup2(descriptor, number)  # inheritable
    environment = {**os.environ, "LISTEN_FDS": str(len(kept)), "LISTEN_PID": str(os.getpid())}
    try:
        os.execve(path, [path, *sys.orig_argv], environment)
    except OSError as error:  # our own descriptors are overwritten: there is no way back
        print(f"weir sidecar: {path}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(1)


def _above(listener: socket.socket, least: int) -> int:
    import fcntl

    return fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD_CLOEXEC, least)
