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

from weir.proxy import sockets

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


def listen(netns: str | Path | None, address: str, port: int) -> socket.socket:
    """`sockets.listen` inside; `netns` None is where we are, which takes no privilege."""
    if netns is None:
        return sockets.listen(address, port)
    try:
        return run_in(netns, lambda: sockets.listen(address, port))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (in {netns})") from error


def _enter(netns: str | Path) -> None:
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, _CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, f"cannot enter: {os.strerror(code)}", str(netns))
    finally:
        os.close(fd)
