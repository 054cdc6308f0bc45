"""Questions to sock_diag(7), about TCP sockets of the network namespace that the thread is in.

Owns netlink's frames and what an error says. Which sockets, and what of them, is the caller's.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

BY_FAMILY, DESTROY = 20, 21  # enum in linux/sock_diag.h
ACK, DUMP = 4, 0x300  # NLM_F_...
ERROR, DONE = 2, 3  # NLMSG_...
_REQUEST = 1
_NETLINK_SOCK_DIAG = 4
_HEADER = struct.Struct("=IHHII")
_LARGE, _SMALL = 1 << 18, 4096
"""Bytes of what is read at once: of many sockets, of one."""


def connect() -> socket.socket:
    """Raises OSError."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)


def ask(
    netlink: socket.socket,
    operation: int,
    flags: int,
    family: int,
    states: int,
    identity: bytes,
    attributes: bytes = b"",
) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of every message that comes, without end. `states` is a set of bits,
    `identity` a struct inet_diag_sockid. Raises OSError."""
    body = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, states) + identity + attributes
    netlink.send(_HEADER.pack(_HEADER.size + len(body), operation, _REQUEST | flags, 0, 0) + body)
    while True:
        data = netlink.recv(_LARGE if flags & DUMP else _SMALL)
        while len(data) >= _HEADER.size:
            size, kind, _, _, _ = _HEADER.unpack_from(data)
            yield kind, data[_HEADER.size : size]
            data = data[size + 3 & ~3 :]


def fault(payload: bytes) -> OSError:
    """Of a message of the type ERROR; with errno 0 it is an acknowledgement."""
    code = -struct.unpack_from("=i", payload)[0]
    return OSError(code, f"sock_diag: {os.strerror(code)}")
