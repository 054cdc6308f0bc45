"""Where a local run keeps what must outlive it: the broker's queue and the quarantine.

Owns the choice of the directory and its lock. What is in it is the broker's and the adaptor's.
"""

import contextlib
import fcntl
import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path

from weir.adaptor.commands import default_quarantine


class StateError(Exception):
    """The directory can't be had; the message names it and says why."""


@contextlib.contextmanager
def directory(routes: Path, home: Path | None, temporary: Path) -> Iterator[Path]:
    """One per routes file, below `home` (default: the machine's or the user's state folder).

    A second run of the same routes at the same time gets `temporary`, which ends with it.
    Raises StateError.
    """
    routes = routes.resolve()
    key = hashlib.sha256(str(routes).encode()).hexdigest()[:12]
    path = (home or default_quarantine().parent) / f"{routes.parent.name}-{key}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)  # payloads are nobody else's business
        lock = (path / "lock").open("w")
    except OSError as e:
        raise StateError(f"state directory {path}: {e.strerror}; choose one with --state") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            path = temporary
        yield path


def client_id(state: Path) -> str:
    """One for each machine and state directory, the same in every run: the broker keeps a session
    under it, and two developers on one broker must not take over each other's."""
    return f"weir-{hashlib.sha256(f'{socket.gethostname()}{state}'.encode()).hexdigest()[:8]}"
