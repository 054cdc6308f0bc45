"""The channel between the supervisor and a relay worker: JSON messages, descriptors beside them.

Owns the framing (one SOCK_SEQPACKET datagram a message, descriptors by SCM_RIGHTS, what is too
large for a datagram in a sealed memfd), the queueing on the event loop, and how much a side that is
not trusted may say. Knows nothing of pods or relays.
"""

import array
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from weir.proxy.policy.budget import Pace

log = logging.getLogger("weir.agent")

MAX_MESSAGE = 64 * 1024
"""Bytes of a datagram; a longer message goes in a file in memory, up to MAX_ENCLOSED bytes."""
MAX_ENCLOSED = 64 << 20
MAX_SAID = MAX_MESSAGE
"""Bytes of a message of a side that is not trusted, which has no large ones and no descriptors."""
READ_AT_ONCE = 64  # messages; a peer that never stops must not hold the loop
MAX_QUEUED_DESCRIPTORS = 2048  # a node's pods, when all of them move to one worker at once
MAX_QUEUED_BYTES = 32 << 20
MAX_DESCRIPTORS = 64  # the kernel takes 253 (SCM_MAX_FD)
_ENCLOSED = b"@"  # no JSON: the message is what the first descriptor holds
_QUEUED = 256  # bytes, about, that any message costs here
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

Message = dict[str, Any]


class Channel:
    """One end. `receive(message, descriptors)` is called for each message, `closed()` once at EOF.

    An exception out of `receive` is logged and ends the channel like an EOF. Descriptors handed to
    it belong to the callee. With a `pace` the `peer` is not trusted: it is charged for each message
    and each kilobyte, and what is too fast or too large ends the channel; its descriptors are never
    taken. Must be made inside a running loop.
    """

    def __init__(
        self,
        sock: socket.socket,
        receive: Callable[[Message, list[int]], None],
        closed: Callable[[], None],
        *,
        peer: str = "the other side",
        pace: Pace | None = None,
    ) -> None:
        self._sock = sock
        self._receive = receive
        self._closed = closed
        self._peer = peer
        self._pace = pace
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._queued = 0
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def waiting(self) -> bool:
        """Does the other side not take what it is told?"""
        return bool(self._queue)

    def send(self, message: Message, sockets: Iterable[socket.socket] = ()) -> None:
        """Queue a message; the sockets' descriptors are duplicated, the caller keeps its own.

        Raises ValueError for a message over MAX_ENCLOSED bytes, OSError without descriptors. A side
        that takes nothing any more is given up: the channel ends when too much waits for it. After
        close() this does nothing: the other side is gone, and its pods with it.
        """
        if self._sock.fileno() < 0:
            return
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MAX_ENCLOSED:
            raise ValueError(f"control message {message.get('op')!r} has {len(data)} bytes")
        if (
            self._queued > MAX_QUEUED_BYTES
            or sum(len(descriptors) for _, descriptors in self._queue) > MAX_QUEUED_DESCRIPTORS
        ):
            log.error("%s takes nothing of what it is told: closing its channel", self._peer)
            self._loop.call_soon(self._end)
            return
        descriptors: list[int] = []
        try:
            if len(data) > MAX_MESSAGE:
                descriptors.append(_enclosed(data))
                data = _ENCLOSED
            descriptors += [os.dup(s.fileno()) for s in sockets]
        except BaseException:
            self._drop(descriptors)
            raise
        self._queue.append((data, descriptors))
        self._queued += len(data) + _QUEUED
        if len(self._queue) == 1:
            self._flush()

    def close(self) -> None:
        """Idempotent. Messages still queued are dropped."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        while self._queue:
            self._drop(self._queue.popleft()[1])

    def _flush(self) -> None:
        while self._queue:
            data, descriptors = self._queue[0]
            ancillary = (
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
                if descriptors
                else []
            )
            try:
                self._sock.sendmsg([data], ancillary)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            except OSError:  # the peer is gone; the reader tells
                break
            self._queue.popleft()
            self._queued -= len(data) + _QUEUED
            self._drop(descriptors)
        self._loop.remove_writer(self._sock.fileno())
        while self._queue:
            self._drop(self._queue.popleft()[1])

    def _readable(self) -> None:
        for _ in range(READ_AT_ONCE):
            if self._sock.fileno() < 0:
                return
            try:
                data, descriptors = self._read()
            except BlockingIOError:
                return
            except OSError:
                data, descriptors = b"", []
            if not data:
                self._drop(descriptors)
                self._end()
                return
            try:
                message = json.loads(data)
            except (ValueError, RecursionError):
                log.exception("%s: a message of %d bytes is not JSON", self._peer, len(data))
                self._drop(descriptors)
                self._end()
                return
            try:
                self._receive(message, descriptors)
            except Exception:  # a side that can't follow is as good as dead: start it anew
                log.exception("%s: a message of %d bytes can't be handled", self._peer, len(data))
                self._end()
                return

    def _read(self) -> tuple[bytes, list[int]]:
        """A message, or nothing at its end. Raises OSError."""
        if self._pace is None:
            data, descriptors, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE, MAX_DESCRIPTORS)
            if data == _ENCLOSED and descriptors:
                data = _disclosed(descriptors.pop(0))
            return data, descriptors
        data, _, flags, _ = self._sock.recvmsg(MAX_SAID)  # no room for descriptors: none come
        if flags & socket.MSG_TRUNC:
            log.error("%s: a message of over %d bytes", self._peer, MAX_SAID)
            return b"", []
        if not self._pace.spend(1.0 + len(data) / 1024, time.monotonic()):
            log.error("%s talks too much", self._peer)
            return b"", []
        return data, []

    def _end(self) -> None:
        if self._sock.fileno() >= 0:
            self.close()
            self._closed()

    @staticmethod
    def _drop(descriptors: list[int]) -> None:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _enclosed(data: bytes) -> int:
    """A file in memory that nobody changes any more. Raises OSError."""
    descriptor = os.memfd_create("weir-message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _disclosed(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        file.seek(0)
        return file.read(MAX_ENCLOSED)
