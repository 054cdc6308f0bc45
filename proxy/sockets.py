"""Listening sockets: handed over by whoever started us, or opened here.

Owns the LISTEN_FDS convention (systemd's: descriptors from 3 on, LISTEN_PID is who they are for)
and how a listener is set up. A sidecar imports it before anything heavy: while the rest is still
loading, the kernel already queues connections.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping

BACKLOG = 4096
_FIRST = 3


def inherited(environment: Mapping[str, str]) -> dict[int, list[socket.socket]]:
    """Listening TCP sockets by their port, when they are for this process.

    Raises ValueError when LISTEN_FDS is no number or a descriptor is not such a socket.
    """
    text = environment.get("LISTEN_FDS", "")
    if not text or environment.get("LISTEN_PID") != str(os.getpid()):
        return {}
    if not text.isdecimal():
        raise ValueError(f"LISTEN_FDS is {text!r}, wanted the number of sockets passed")
    found: dict[int, list[socket.socket]] = {}
    for descriptor in range(_FIRST, _FIRST + int(text)):
        try:
            os.set_inheritable(descriptor, False)
            sock = socket.socket(fileno=descriptor)
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            port = sock.getsockname()[1]
        except (OSError, IndexError) as error:
            raise ValueError(f"descriptor {descriptor} of LISTEN_FDS: {error}") from error
        if not listens:
            raise ValueError(f"descriptor {descriptor} of LISTEN_FDS does not listen")
        sock.setblocking(False)
        found.setdefault(port, []).append(sock)
    return found


def on_port(
    port: int, passed: dict[int, list[socket.socket]], host: str = ""
) -> list[socket.socket]:
    """Who listens on `port`: what was passed, else a new socket.

    `host` is an IP address, empty for all addresses of both families.

    Raises OSError.
    """
    handed = passed.pop(port, None)
    if handed:
        return handed
    has_ipv6 = os.path.exists("/proc/net/if_inet6")  # noqa: PTH110 - cheaper than pathlib
    return [listen(host or ("::" if has_ipv6 else "0.0.0.0"), port)]


def listen(address: str, port: int, backlog: int = BACKLOG) -> socket.socket:
    """A non-blocking listener with SO_REUSEADDR. "::" takes IPv4 as well. Raises OSError."""
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
        text = f"listening on {address} port {port}: {error.strerror}"
        raise OSError(error.errno, text) from error
    return listener


def raise_open_files() -> None:
    """Every connection is a descriptor or two; Go's programs raise their limit as well."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_files() -> int:
    """How many this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
