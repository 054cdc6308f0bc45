"""Finding sockets that other processes listen with.

Owns the walk through /proc and cgroupfs and the borrowing of a descriptor (pidfd_getfd).
Whoever gets a socket from here must close it at once: a copy that stays open keeps the port
busy after the app died. Knows nothing of BPF.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from weir.proxy import netns, sockdiag

_SYS_PIDFD_GETFD = 438  # the same on every architecture
_SO_COOKIE, _SO_PROTOCOL = 57, 38
_IPPROTO_MPTCP = 262
_LISTEN = "0A"
_STATE_LISTEN = 10
_libc = ctypes.CDLL(None, use_errno=True)


def inodes(namespace: Path, port: int) -> set[int]:
    """Inodes of the TCP sockets (MPTCP ones show up here, too) that listen on `port`. Milliseconds:
    the kernel goes through all sockets of the machine."""

    def read() -> set[int]:
        found = set()
        for table in ("tcp", "tcp6"):
            path = Path("/proc/thread-self/net") / table
            if not path.exists():
                continue  # no IPv6 in this kernel
            for line in path.read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                    found.add(int(rest[5]))
        return found

    return netns.run_in(namespace, read)


def listening(namespace: Path, ports: Iterable[int], addresses: Iterable[str]) -> set[int]:
    """Those of the ports where a connection to one of the addresses would be accepted, by whatever
    process: one question to sock_diag(7) for each pair, some microseconds. Raises OSError."""
    pairs = [(port, ip_address(text)) for port in ports for text in addresses]

    def ask() -> set[int]:
        with sockdiag.connect() as netlink:
            return {port for port, address in pairs if _listens(netlink, port, address)}

    return netns.run_in(namespace, ask)


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


def take(process: int, fd: int) -> int:
    """A copy of that descriptor of the process that this pidfd is of. Raises OSError."""
    copied: int = _libc.syscall(_SYS_PIDFD_GETFD, process, fd, 0)
    if copied < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return copied


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


def _listens(netlink: socket.socket, port: int, address: IPv4Address | IPv6Address) -> bool:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    local = address.packed.ljust(16, b"\0")
    # local end, no peer, any cookie
    identity = struct.pack(">HH", port, 0) + local + bytes(16) + struct.pack("=Iq", 0, -1)
    states = 1 << _STATE_LISTEN
    kind, payload = next(sockdiag.ask(netlink, sockdiag.BY_FAMILY, 0, family, states, identity))
    if kind == sockdiag.BY_FAMILY:
        return payload[1] == _STATE_LISTEN
    fault = sockdiag.fault(payload)
    if fault.errno not in (errno.ENOENT, errno.EAFNOSUPPORT):  # the latter without IPv6
        raise fault
    return False


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
        return socket.socket(fileno=take(process, fd))
    except OSError:
        return None
    finally:
        os.close(process)
