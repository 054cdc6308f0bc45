"""A network namespace without a name, so that two sidecars can have the same fixed ports.

It lives as long as something is in it and leaves nothing behind. Needs root. Knows nothing of
what runs inside.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from weir.proxy import netns

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_libc = ctypes.CDLL(None, use_errno=True)


class Place:
    """With loopback up, and nothing else. `close` it; what still runs inside keeps it."""

    def __init__(self) -> None:
        made: list[int] = []
        errors: list[OSError] = []

        def body() -> None:
            try:
                made.append(_new_namespace())
            except OSError as error:
                errors.append(error)

        thread = threading.Thread(target=body, name="new netns")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        self._fd = made[0]

    def run(self, call: Callable[[], T]) -> T:
        return netns.run_in(f"/proc/self/fd/{self._fd}", call)

    def start(self, command: Sequence[str], **popen: Any) -> subprocess.Popen[bytes]:
        """A process inherits the namespace of the thread that starts it."""
        return self.run(lambda: subprocess.Popen(command, **popen))

    def listen(self, port: int, address: str = "127.0.0.1") -> socket.socket:
        """Also on a port that was just closed: a process that is being started has it till exec."""
        end = time.monotonic() + 5
        while True:
            try:
                return netns.listen(f"/proc/self/fd/{self._fd}", address, port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def socket(self) -> socket.socket:
        return netns.tcp_sockets(f"/proc/self/fd/{self._fd}", 1)[0]

    def accepts(self, port: int) -> bool:
        """Does somebody listen on this port of the loopback?"""

        def connect() -> int:
            with socket.socket() as sock:
                sock.settimeout(1.0)
                return sock.connect_ex(("127.0.0.1", port))

        return self.run(connect) == 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _new_namespace() -> int:
    if _libc.unshare(_CLONE_NEWNET):
        code = ctypes.get_errno() or errno.EPERM
        raise OSError(code, f"cannot make a network namespace: {os.strerror(code)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(sock, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
