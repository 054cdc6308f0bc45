"""Whether a file is another one than it was, and whoever writes it has finished.

Looks at what the name leads to (a Kubernetes ConfigMap is a chain of links that is turned at once)
and says so only when two looks in a row see the same: half of a file may be a file, too.
"""

from __future__ import annotations

from pathlib import Path

EVERY = 1.0
"""Seconds between two looks."""

_State = tuple[int, ...] | None


class Watch:
    """Pure but for the look itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._before = self._look()

    def changed(self) -> bool:
        """To be asked every now and then; True once for each change."""
        now, before = self._look(), self._before
        self._before = now
        if now is None or now != before or now == self._known:
            return False
        self._known = now
        return True

    def _look(self) -> _State:
        """None when it isn't there: that is no file to take."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
