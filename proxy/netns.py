"""Doing one thing inside another network namespace.

A network namespace belongs to a thread, so each call gets a short-lived thread of its own that
enters, does the thing and ends: the caller's threads are never anywhere else. Sockets keep the
namespace they were made in. Knows nothing of pods.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_SO_NETNS_COOKIE = 71
_libc = ctypes.CDLL(None, use_errno=True)


def run_in(netns: str | Path, call: Callable[[], T]) -> T:
    """`call()` inside `netns` (a path such as /run/netns/NAME or /proc/PID/ns/net).

    Raises OSError naming the path when it can't be entered, and whatever `call` raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            _enter(netns)
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - handed on to the caller below
            errors.append(error)

    thread = threading.Thread(target=body, name=f"netns {netns}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def cookie(netns: str | Path) -> int:
    """The kernel's name for this network namespace (never reused while the machine runs)."""

    def read() -> int:
        with socket.socket() as probe:
            raw = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        return int(struct.unpack("Q", raw)[0])

    return run_in(netns, read)


def tcp_sockets(netns: str | Path, count: int) -> list[socket.socket]:
    """Non-blocking, unconnected IPv4 TCP sockets that were made inside."""

    def make() -> list[socket.socket]:
        flags = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
        return [socket.socket(socket.AF_INET, flags) for _ in range(count)]

    return run_in(netns, make)


def listen(netns: str | Path | None, address: str, port: int, backlog: int = 4096) -> socket.socket:
    """A non-blocking listener inside, with SO_REUSEADDR. "::" takes IPv4 as well.

    `netns` None is where we are, which takes no privilege.
    """

    def make() -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                v6only = 0 if address == "::" else 1
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
            listener.bind((address, port))
            listener.listen(backlog)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            where = f"{address} port {port}" + (f" in {netns}" if netns else "")
            raise OSError(error.errno, f"{error.strerror}: listening on {where}") from error
        return listener

    return make() if netns is None else run_in(netns, make)


def _enter(netns: str | Path) -> None:
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, _CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, f"cannot enter: {os.strerror(code)}", str(netns))
    finally:
        os.close(fd)
