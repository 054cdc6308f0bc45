"""The backstop: direct connections whose request is far past its deadline are reset.

The callers of the direct port keep the timeouts; this is for one that doesn't. Owns what is asked
of sock_diag(7), which tells each socket together with what the programs keep in it (its storage; of
many it is in a table), and destroys sockets: no iterator, no copy of an app's socket, no program
of ours in any path. Works on the network namespace it is called in; refuses to know what a
deadline is.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from weir.bpf.btf import Btf, Struct
from weir.proxy import sockdiag
from weir.proxy.places import Places

_REQ_STORAGES, _REQ_MAP_FD = 2, 1  # INET_DIAG_REQ_SK_BPF_STORAGES, SK_DIAG_BPF_STORAGE_REQ_MAP_FD
_STORAGES, _STORAGE, _MAP_ID, _MAP_VALUE = 20, 1, 2, 3
_NESTED = 0x8000
# in which an answer may still be owed, or on its way: all but LISTEN, SYN_*, TIME_WAIT, CLOSE
_STATES = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11
_COOKIE = struct.Struct("<40xQ")  # in struct inet_diag_sockid
_MESSAGE = struct.Struct("=BBBB48s20s")  # struct inet_diag_msg: its socket id, and counters
_ENDED = 1 << 31  # ENDED in bpf/meter.h
_GIVEN_UP = 0xFFFFFFFF  # the number of the stream that stands for what isn't parsed any more


@dataclass(frozen=True)
class _Socket:
    """One socket: how the kernel names it, and its storages by map number."""

    family: int
    identity: bytes  # struct inet_diag_sockid, with the cookie
    storages: Mapping[int, bytes]


class Overdue:
    """Of the connections of one layout."""

    def __init__(self, fds: Mapping[str, int], btf: Btf, places: Places) -> None:
        self._places = places
        self._fds = (fds["connections"], fds["open_streams"])
        self._numbers = [_map_number(fd) for fd in self._fds]
        connection, streams = (btf.maps[name].value for name in ("connections", "open_streams"))
        assert isinstance(connection, Struct)
        assert isinstance(streams, Struct)
        self._connection = connection.part("since", "outstanding", "mode")
        self._streams = streams
        self._modes = btf.enum("mode")

    def reset(self, port: int, seconds: float) -> int:
        """Reset connections accepted on `port` with a request older than `seconds`; how many.

        Raises OSError."""
        before = time.monotonic_ns() - int(seconds * 1e9)
        done = 0
        placed = self._places.states()
        with sockdiag.connect() as netlink:
            for family in (socket.AF_INET, socket.AF_INET6):
                overdue = [
                    each
                    for each in _dump(netlink, family, port, self._fds)
                    if 0 < self._since(each, placed) < before
                ]
                done += sum(_destroy(netlink, each) for each in overdue)
        return done

    def _since(self, sock: _Socket, placed: Mapping[int, bytes]) -> int:
        """When the oldest request began that is running, in ns of CLOCK_MONOTONIC; 0: none."""
        stored, streams = (sock.storages.get(number) for number in self._numbers)
        (cookie,) = _COOKIE.unpack(sock.identity)
        raw = placed.get(cookie, stored)
        if raw is None:
            return 0
        connection = self._connection.decode(raw)
        if connection["mode"] == self._modes["HTTP1"]:
            waits = 0 < connection["outstanding"] < _ENDED
            return int(connection["since"]) if waits else 0
        if connection["mode"] == self._modes["HTTP2"] and streams is not None:
            opened = self._streams.decode(streams)
            pairs = zip(opened["id"], opened["since"], strict=True)
            return min((int(since) for id, since in pairs if id not in (0, _GIVEN_UP)), default=0)
        return 0


def _map_number(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}") as info:  # noqa: PTH123 - read once, at load
        return next(int(line.split()[1]) for line in info if line.startswith("map_id:"))


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        if size < 4:
            return
        yield kind & ~_NESTED, data[4:size]
        data = data[size + 3 & ~3 :]


def _dump(netlink: socket.socket, family: int, port: int, fds: tuple[int, ...]) -> list[_Socket]:
    wanted = b"".join(_attribute(_REQ_MAP_FD, struct.pack("=I", fd)) for fd in fds)
    identity = struct.pack(">H", port) + bytes(46)  # struct inet_diag_sockid: source port first
    asked = _attribute(_REQ_STORAGES | _NESTED, wanted)
    found: list[_Socket] = []
    for kind, payload in sockdiag.ask(
        netlink, sockdiag.BY_FAMILY, sockdiag.DUMP, family, _STATES, identity, asked
    ):
        if kind == sockdiag.DONE:
            return found
        if kind == sockdiag.ERROR:
            raise sockdiag.fault(payload)
        family, _state, _timer, _retransmits, identity, _ = _MESSAGE.unpack_from(payload)
        storages = {
            number: value
            for outer, nested in _attributes(payload[_MESSAGE.size :])
            if outer == _STORAGES
            for inner, storage in _attributes(nested)
            if inner == _STORAGE
            for number, value in (_storage(storage),)
        }
        found.append(_Socket(family, identity, storages))
    return found


def _storage(data: bytes) -> tuple[int, bytes]:
    parts = dict(_attributes(data))
    return int.from_bytes(parts[_MAP_ID], "little"), parts[_MAP_VALUE]


def _destroy(netlink: socket.socket, sock: _Socket) -> bool:
    """False when it has gone by itself."""
    for kind, payload in sockdiag.ask(
        netlink, sockdiag.DESTROY, sockdiag.ACK, sock.family, _STATES, sock.identity
    ):
        if kind == sockdiag.ERROR:
            fault = sockdiag.fault(payload)
            if fault.errno not in (0, errno.ENOENT):
                raise fault
            return not fault.errno
    return False
