"""Conversations over the direct port, both ends in the hands of the test.

Knows how to talk and how to wait for counts; the claims are made by the tests.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from dataclasses import dataclass

from tests.pods import DIRECT_PORT, Backend, Pod, RemoteSocket, until
from weir.proxy.kernel import AttachedPod, PodCounters

GET = b"GET / HTTP/1.1\r\nHost: x\r\nCache-Control: no\r\nContent-Type: a/b\r\nTe: x\r\n\r\n"
HEAD = GET.replace(b"GET", b"HEAD")
POST = b"POST /a HTTP/1.1\r\nHost: x\r\ncOnTeNt-LeNgTh:  7 \r\nX: y\r\n\r\n1234567"
CHUNKED_POST = (
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
    b'5\r\nhello\r\n1A;ext="a"\r\nGET / HTTP/1.1\r\n\r\n89012345\r\n0\r\nTrailer: x\r\n\r\n'
)
OK = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED_OK = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n1a\r\nHTTP/1.1 200 OK\r\n\r\n8901234\r\n0\r\n\r\n"
)
NO_CONTENT = b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HEAD_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"


@dataclass(frozen=True)
class Counts:
    in_flight: int
    started: int
    finished: int
    aborted: int


class Exchange:
    """One connection: the caller's socket here, the app's in the backend."""

    def __init__(self, client: socket.socket, server: RemoteSocket) -> None:
        self.client, self.server = client, server
        client.settimeout(10)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, data: bytes) -> None:
        """Sent, and received by the app: the kernel has seen all of it."""
        self.client.sendall(data)
        received = self.server.recv_exactly(len(data))
        assert received == data

    def answer(self, data: bytes) -> None:
        self.server.sendall(data)
        received = self.receive(len(data))
        assert received == data

    def receive(self, size: int) -> bytes:
        parts = []
        while size:
            part = self.client.recv(min(size, 1 << 20))
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.client.close()

    def close(self) -> None:
        self.client.close()
        with suppress(OSError):
            self.server.close()


class Direct:
    """An attached pod whose user port is served by a scripted backend."""

    def __init__(
        self, pod: Pod, attached: AttachedPod, backend: Backend, listener: RemoteSocket
    ) -> None:
        self.pod, self.attached = pod, attached
        self.backend, self.listener = backend, listener
        self._base = attached.counters()
        self._open: list[Exchange] = []

    def begin(self) -> None:
        self._base = self.attached.counters()
        assert self._base.in_flight == 0

    def end(self) -> None:
        """Close what the test left open, so that the next one starts from nothing."""
        for exchange in self._open:
            exchange.close()
        self._open.clear()
        until(
            lambda: self.counters.in_flight == 0 and self.counters.open_connections == 0,
            "all connections released",
        )

    def connect(self, port: int = DIRECT_PORT, *, receive_buffer: int = 0) -> Exchange:
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(10)
        client.connect((self.pod.address, port))
        exchange = Exchange(client, self.listener.accept())
        self._open.append(exchange)
        return exchange

    @property
    def counters(self) -> PodCounters:
        return self.attached.counters()

    def since(self, name: str) -> int:
        """How much a counter grew during this test."""
        return int(getattr(self.counters, name) - getattr(self._base, name))

    def counts(self) -> Counts:
        now, base = self.counters, self._base
        return Counts(
            now.in_flight,
            now.started - base.started,
            now.finished - base.finished,
            now.aborted - base.aborted,
        )

    def expect(self, in_flight: int, started: int, finished: int, aborted: int) -> None:
        """The counts are exactly these, now or as soon as the last packet has passed."""
        wanted = Counts(in_flight, started, finished, aborted)
        with suppress(AssertionError):
            until(lambda: self.counts() == wanted, seconds=2)
        assert self.counts() == wanted
