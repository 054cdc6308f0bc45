"""Finding sockets that other processes listen with.

Owns the walk through /proc and cgroupfs and the borrowing of a descriptor (pidfd_getfd).
Whoever gets a socket from here must close it at once: a copy that stays open keeps the port
busy after the app died. Knows nothing of BPF.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from weir.proxy import netns

_SYS_PIDFD_GETFD = 438  # the same on every architecture
_SO_COOKIE, _SO_PROTOCOL = 57, 38
_IPPROTO_MPTCP = 262
_LISTEN = "0A"
_TABLES = ("tcp", "tcp6")
_libc = ctypes.CDLL(None, use_errno=True)


def inodes(namespace: Path, port: int, tables: Sequence[str] = _TABLES) -> set[int]:
    """Inodes of the TCP sockets (MPTCP ones show up here, too) that listen on `port`."""
    return {inode for listening, inode in _listening(namespace, tables) if listening == port}


def ports(namespace: Path) -> set[int]:
    """On which anybody listens by TCP, whatever namespace or cgroup that process is in."""
    return {port for port, _ in _listening(namespace, _TABLES)}


def of_cgroup(cgroup: Path, namespace: Path, port: int) -> Iterator[socket.socket]:
    """A copy of each socket that listens on `port`, once, found among the processes of the
    cgroup and the cgroups below it. Processes that end meanwhile are passed over."""
    wanted = inodes(namespace, port)
    for pid in pids_of(cgroup):
        for fd in _listed(Path(f"/proc/{pid}/fd")):
            if not wanted:
                return
            inode = _inode(Path(f"/proc/{pid}/fd/{fd}"))
            if inode not in wanted:
                continue
            copy = _copy(pid, int(fd))
            if copy is not None:
                wanted.discard(inode)
                yield copy


def is_mptcp(listener: socket.socket) -> bool:
    return listener.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL) == _IPPROTO_MPTCP


def cookie(listener: socket.socket) -> int:
    raw = listener.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
    return int(struct.unpack("Q", raw)[0])


def pids_of(cgroup: Path) -> Iterator[int]:
    for folder, _, _ in os.walk(cgroup):
        try:
            text = (Path(folder) / "cgroup.procs").read_text()
        except OSError:  # removed, or a threaded cgroup: its processes are listed above it
            continue
        yield from map(int, text.split())


def _listening(namespace: Path, tables: Sequence[str]) -> list[tuple[int, int]]:
    """(port, inode) of every listener."""

    def read() -> list[tuple[int, int]]:
        found = []
        for table in tables:
            path = Path("/proc/thread-self/net") / table
            if not path.exists():
                continue  # no IPv6 in this kernel
            for line in path.read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == _LISTEN:
                    found.append((int(local.rpartition(":")[2], 16), int(rest[5])))
        return found

    return netns.run_in(namespace, read)


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - names are all that is wanted
    except OSError:
        return []


def _inode(entry: Path) -> int:
    """Of the socket that this /proc/PID/fd entry is; -1 for anything else."""
    try:
        match = re.fullmatch(r"socket:\[(\d+)\]", str(entry.readlink()))
    except OSError:
        return -1
    return int(match[1]) if match else -1


def _copy(pid: int, fd: int) -> socket.socket | None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        copied = _libc.syscall(_SYS_PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)
    return socket.socket(fileno=copied) if copied >= 0 else None
