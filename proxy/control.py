"""The channel between the supervisor and a relay worker: JSON messages, descriptors beside them.

Owns the framing (one SOCK_SEQPACKET datagram a message, descriptors by SCM_RIGHTS) and the
queueing on the event loop. Knows nothing of pods or relays.
"""

import array
import asyncio
import contextlib
import json
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

log = logging.getLogger("weir.agent")

MAX_MESSAGE = 64 * 1024
READ_AT_ONCE = 64  # messages; a peer that never stops must not hold the loop
MAX_QUEUED_DESCRIPTORS = 2048  # a node's pods, when all of them move to one worker at once
MAX_DESCRIPTORS = 64  # the kernel takes 253 (SCM_MAX_FD)

Message = dict[str, Any]


class Channel:
    """One end. `receive(message, descriptors)` is called for each message, `closed()` once at EOF.

    An exception out of `receive` is logged and ends the channel like an EOF. Descriptors handed to
    it belong to the callee. Must be made inside a running loop.
    """

    def __init__(
        self,
        sock: socket.socket,
        receive: Callable[[Message, list[int]], None],
        closed: Callable[[], None],
    ) -> None:
        self._sock = sock
        self._receive = receive
        self._closed = closed
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self, message: Message, sockets: Iterable[socket.socket] = ()) -> None:
        """Queue a message; the sockets' descriptors are duplicated, the caller keeps its own.

        Raises ValueError for a message over MAX_MESSAGE bytes. A side that takes nothing any more
        is given up: the channel ends when too many descriptors wait for it. After close() this
        does nothing: the other side is gone, and its pods with it.
        """
        if self._sock.fileno() < 0:
            return
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"control message {message.get('op')!r} has {len(data)} bytes")
        if sum(len(descriptors) for _, descriptors in self._queue) > MAX_QUEUED_DESCRIPTORS:
            log.error("the other side asks for descriptors and takes none: closing the channel")
            self._loop.call_soon(self._end)
            return
        self._queue.append((data, [os.dup(s.fileno()) for s in sockets]))
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
            self._drop(descriptors)
        self._loop.remove_writer(self._sock.fileno())
        while self._queue:
            self._drop(self._queue.popleft()[1])

    def _readable(self) -> None:
        for _ in range(READ_AT_ONCE):
            if self._sock.fileno() < 0:
                return
            try:
                data, descriptors, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE, MAX_DESCRIPTORS)
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
                log.exception("control message of %d bytes is not JSON", len(data))
                self._drop(descriptors)
                self._end()
                return
            try:
                self._receive(message, descriptors)
            except Exception:  # a side that can't follow is as good as dead: start it anew
                log.exception("control message of %d bytes can't be handled", len(data))
                self._end()
                return

    def _end(self) -> None:
        if self._sock.fileno() >= 0:
            self.close()
            self._closed()

    @staticmethod
    def _drop(descriptors: list[int]) -> None:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
