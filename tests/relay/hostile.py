"""What callers send that mean a pod's worker harm: bytes, and connections that send them.

Frames are made by tests.relay.h2rig; header blocks here are written by hand, since a good encoder
would never write them.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterable

from tests.relay.h2rig import (
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    frame,
    settings,
)

STREAMS = range(1, 501, 2)
"""As many as a connection may have open."""


def block(path: bytes, *fields: bytes, method: bytes = b"\x82") -> bytes:
    """A request, whose literals go into no table; \\x83 is POST."""
    return b"".join([method, b"\x86\x04", _string(path), b"\x01\x03a.b", *fields])


def field(name: bytes, value: bytes = b"") -> bytes:
    return b"\x00" + _string(name) + _string(value)


def _string(data: bytes) -> bytes:
    size = len(data)
    if size < 127:
        return bytes([size]) + data
    rest, length = size - 127, b"\x7f"
    while rest > 127:
        length += bytes([rest & 127 | 128])
        rest >>= 7
    return length + bytes([rest]) + data


def entry(name: bytes, value: bytes) -> bytes:
    """A field that goes into the table; the newest is \\xbe from then on."""
    return b"\x40" + _string(name) + _string(value)


def head(stream: int, fields: bytes, ended: bool = True) -> bytes:
    """HEADERS, and CONTINUATIONs if it takes any."""
    first, *more = [fields[at : at + 16384] for at in range(0, len(fields), 16384)]
    flags = END_STREAM if ended else 0
    if not more:
        return frame(HEADERS, flags | END_HEADERS, stream, first)
    frames = [frame(HEADERS, flags, stream, first)]
    frames += [frame(CONTINUATION, 0, stream, piece) for piece in more[:-1]]
    return b"".join([*frames, frame(CONTINUATION, END_HEADERS, stream, more[-1])])


def hello(*pairs: tuple[int, int]) -> bytes:
    return PREFACE + settings(*pairs)


def client_hello() -> bytes:
    """The first flight of a client that means it."""
    outgoing = ssl.MemoryBIO()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(
        ssl.MemoryBIO(), outgoing, server_hostname="a"
    )
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def endless_hello(size: int) -> bytes:
    """So many bytes of one that announces 128 KB."""
    body = b"\x01\x01\xff\x00\x03\x03" + bytes(size)
    pieces = [body[at : at + 16384] for at in range(0, size, 16384)]
    return b"".join(b"\x16\x03\x01" + len(p).to_bytes(2, "big") + p for p in pieces)


class Mob:
    """Connections to one port that send what they are given and, unless `reads`, read nothing."""

    def __init__(self, port: int) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._port = port
        self._sockets: list[socket.socket] = []
        self._ended = threading.Event()

    def come(self, count: int, first: bytes = b"") -> None:
        """What can't be sent at once is not sent: it was too much for the other side."""
        for _ in range(count):
            sock = socket.socket()
            sock.settimeout(10)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self._sockets.append(sock)
            with contextlib.suppress(OSError):
                sock.connect(("127.0.0.1", self._port))
                sock.setblocking(False)
                sock.send(first)

    def flood(self, data: bytes, reads: bool = False) -> None:
        """The same over and over on each of them, until `stop`."""
        at = dict.fromkeys(self._sockets, 0)
        while not self._ended.is_set():
            moved = False
            for sock in at:
                with contextlib.suppress(OSError):
                    at[sock] = (at[sock] + sock.send(data[at[sock] :])) % len(data)
                    moved = True
                if reads:
                    with contextlib.suppress(OSError):
                        moved = bool(sock.recv(1 << 20)) or moved
            if not moved:
                time.sleep(0.005)

    def pour(self, each: Iterable[bytes], seconds: float) -> None:
        """One after the other on each of them, as far as they get."""
        pieces = list(each)
        at = dict.fromkeys(self._sockets, (0, 0))
        until = time.monotonic() + seconds
        while time.monotonic() < until and at:
            for sock, (number, sent) in list(at.items()):
                try:
                    sent += sock.send(pieces[number][sent:])
                except BlockingIOError:
                    continue
                except OSError:
                    del at[sock]
                    continue
                if sent == len(pieces[number]):
                    number, sent = number + 1, 0
                at[sock] = number, sent
                if number == len(pieces):
                    del at[sock]

    def stop(self) -> None:
        self._ended.set()

    def leave(self) -> None:
        self.stop()
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()
