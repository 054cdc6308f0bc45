"""What outlives the agent: maps and links under a bpffs (docs/decisions/027).

    ROOT/LAYOUT/maps/NAME               the maps of all pods of that layout
    ROOT/LAYOUT/pods/COOKIE/PROGRAM     a pod's links, by the cookie of its network namespace

Owns those names, their order of coming and going, who may remove them, and who claims a pod. A
pod's directory is there before anything else of it, and goes last: what has no directory has
nothing. Knows neither programs nor what is in the maps.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from weir.bpf.libbpf import BpfError, link_target, pinned

PATIENCE = 2.0  # seconds; making all pins of a pod takes milliseconds
_BPF_FS_MAGIC = 0xCAFE4A11
_FLOCK = struct.Struct("hhqqi4x")  # fcntl(2): type, whence, start, length, pid


class PinsUnavailable(OSError):
    """Nothing can be pinned there; says why and what to do about it."""


class Layout:
    """One layout's directory. Open for as long as somebody uses its maps."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    @property
    def maps(self) -> Path:
        return self.path / "maps"

    def map_fds(self) -> dict[str, int]:
        """Descriptors of all maps, by name; the caller's to close."""
        fds: dict[str, int] = {}
        try:
            for name in _names(self.maps):
                fds[name] = pinned(self.maps / name)
        except BpfError:
            for fd in fds.values():
                os.close(fd)
            raise
        return fds

    def pods(self) -> list[int]:
        return [int(name) for name in _names(self.path / "pods") if name.isdigit()]

    def pod(self, cookie: int) -> Path:
        return self.path / "pods" / str(cookie)

    def begin(self, cookie: int) -> None:
        """The pod's directory, before anything of it is in a map or attached."""
        self.pod(cookie).mkdir(parents=True, exist_ok=True)

    def links(self, cookie: int) -> dict[str, Path]:
        """Pinned links of a pod, by program."""
        folder = self.pod(cookie)
        return {name: folder / name for name in _names(folder)}

    def dead(self, cookie: int) -> bool:
        """Has what its links were attached to gone? Without links nobody can tell: no."""
        for path in self.links(cookie).values():
            with suppress(BpfError):
                link = pinned(path)
                try:
                    if not link_target(link):
                        return True
                finally:
                    os.close(link)
        return False

    def end(self, cookie: int) -> None:
        """The last that goes of a pod. Its links are removed, and so detached, before."""
        with suppress(FileNotFoundError):
            self.pod(cookie).rmdir()

    def close(self, *, remove_unused: bool = False) -> None:
        """`remove_unused`: the whole layout, unless it has pods or somebody else has it open."""
        if remove_unused and not self.pods():
            with suppress(BlockingIOError, OSError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for name in _names(self.maps):
                    (self.maps / name).unlink()
                for folder in (self.maps, self.path / "pods", self.path):
                    if folder.exists():
                        folder.rmdir()
        os.close(self._lock)


class Claims:
    """Which pods an agent that lives has in its hands, for others to see.

    A claim is a lock for reading on one byte of ROOT, whose offset is the pod's cookie: it costs
    no descriptor of its own, and the kernel drops it when its holder has ended in any way.
    """

    def __init__(self, root: Path) -> None:
        self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def take(self, cookie: int) -> None:
        self._lock(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, cookie)

    def drop(self, cookie: int) -> None:
        self._lock(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, cookie)

    def of_another(self, cookie: int) -> bool:
        """Does another agent claim this pod?"""
        return self._lock(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, cookie) != fcntl.F_UNLCK

    def close(self) -> None:
        """Drops them all."""
        os.close(self._fd)

    def _lock(self, command: int, kind: int, cookie: int) -> int:
        asked = _FLOCK.pack(kind, os.SEEK_SET, cookie, 1, 0)
        found: int = _FLOCK.unpack(fcntl.fcntl(self._fd, command, asked))[0]
        return found


@contextmanager
def opened(root: Path) -> Iterator[None]:
    """Only one process at a time makes and removes pins, except that one that is stopped while
    it does is not waited for longer than PATIENCE. Raises PinsUnavailable."""
    try:
        usable = _is_bpffs(root if root.exists() else root.parent)
    except OSError as error:
        raise PinsUnavailable(f"{root.parent}: {error.strerror}") from error
    if not usable:
        raise PinsUnavailable(
            f"{root.parent} is no bpffs, so the direct path ends with the agent: "
            f"mount -t bpf bpf {root.parent}"
        )
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise PinsUnavailable(f"{root}: {error.strerror}") from error
    try:
        give_up = time.monotonic() + PATIENCE
        while not _locked(lock) and time.monotonic() < give_up:
            time.sleep(0.001)
        yield
    finally:
        os.close(lock)


def layout(root: Path, name: str) -> Layout:
    """Made if it isn't there. Within opened()."""
    (root / name / "maps").mkdir(parents=True, exist_ok=True)
    return Layout(root / name)


def others(root: Path, name: str) -> list[Layout]:
    """Layouts of other versions. Within opened()."""
    return [Layout(root / other) for other in _names(root) if other != name]


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return []


def _is_bpffs(path: Path) -> bool:
    data = (ctypes.c_long * 32)()  # struct statfs: its type comes first, and it is no larger
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), ctypes.byref(data)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return bool(data[0] & 0xFFFFFFFF == _BPF_FS_MAGIC)
