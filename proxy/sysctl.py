"""Setting a sysctl of the network namespace that the thread is in (proxy.netns).

Owns the way round a container's read-only /proc/sys: a procfs of our own that is mounted nowhere.
That takes CAP_SYS_ADMIN and Linux 5.2. Knows no sysctl.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432  # the same on every architecture
_CLOEXEC, _CREATE = 1, 6  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC, FSCONFIG_CMD_CREATE
_libc = ctypes.CDLL(None, use_errno=True)


def put(name: str, value: str) -> None:
    """Such as `net/ipv4/ip_forward`. Raises OSError naming the file."""
    path = Path("/proc/sys") / name
    if path.read_text().strip() == value:
        return
    try:
        path.write_text(value)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        _put_unmasked(path, value)


def _put_unmasked(path: Path, value: str) -> None:
    opened: list[int] = []
    try:
        kind = _made(opened, _libc.syscall(_SYS_FSOPEN, b"proc", _CLOEXEC), path)
        if _libc.syscall(_SYS_FSCONFIG, kind, _CREATE, None, None, 0):
            _fail(path)
        root = _made(opened, _libc.syscall(_SYS_FSMOUNT, kind, _CLOEXEC, 0), path)
        inside = path.relative_to("/proc")
        file = _made(opened, os.open(inside, os.O_WRONLY | os.O_CLOEXEC, dir_fd=root), path)
        os.write(file, value.encode())
    finally:
        for fd in opened:
            os.close(fd)


def _made(opened: list[int], fd: int, path: Path) -> int:
    if fd < 0:
        _fail(path)
    opened.append(fd)
    return fd


def _fail(path: Path) -> None:
    code = ctypes.get_errno()
    why = f"read-only, and no other procfs can be had: {os.strerror(code)}"
    raise OSError(code, why, str(path))
