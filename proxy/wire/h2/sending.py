"""The sending half of an HTTP/2 connection: its streams, the windows, and what waits for them.

Owns when data is written and when credit is given; what a frame of the peer means is the business
of `endpoint`.

A relay reads no faster than it can write: the sender of a body gets new credit for what has been
written to the other connection, so the bytes in memory stay within the windows that we offer. What
has to wait is credited to the connection ahead of that, within bounds: or a few streams that nobody
reads would use up the window of all others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Generic, TypeVar, cast

from weir.proxy.wire.aside import put_aside
from weir.proxy.wire.h2 import frames
from weir.proxy.wire.h2.frames import FRAME_BYTES
from weir.proxy.wire.h2.hpack import EMPTY_TABLE
from weir.proxy.wire.turns import Turns

WINDOW = 1 << 20
"""Bytes of bodies that a connection may have on their way through us, in each direction."""
STREAM_WINDOW = 256 << 10
_AHEAD_BYTES, _ALL_AHEAD_BYTES = 8 << 20, 32 << 20
"""How much that waits may be credited ahead to one connection, and to all of a pod."""
_SMALL = 4096
"""Smaller pieces that wait are joined: a byte must not cost the memory of an object."""
_GATHERED_BYTES = 64 << 10
"""Heads and bodies that are held for one write; then it is seen whether the peer takes them."""
_UNREAD_BYTES = 1 << 20
"""What may wait to be written to a peer that does not read; all but bodies is never held back."""


def join(waiting: Joinable, piece: bytes, ended: bool) -> bool:
    """Put a piece behind the last one that waits, if that is small. Was it?"""
    if waiting:
        last, over, *source = waiting[-1]
        if over is False and len(last) < _SMALL:
            waiting[-1] = (last + piece, ended, *source)
            return True
    return False


class Ahead:
    """What the connections of a pod have in common: what is left of _ALL_AHEAD_BYTES, and turns."""

    __slots__ = ("left", "turns")

    def __init__(self, turns: Turns | None = None) -> None:
        self.left = _ALL_AHEAD_BYTES
        self.turns = Turns() if turns is None else turns


E = TypeVar("E", bound="Sender[Any]", covariant=True)


class StreamBase(Generic[E]):
    """One stream on one connection. `id` 0: it has no number yet."""

    __slots__ = (
        "ahead",
        "connection",
        "id",
        "open_in",
        "open_out",
        "queue",
        "room",
        "taken",
        "window",
    )

    connection: E

    def __init__(self, connection: E, number: int, window: int) -> None:
        self.connection = connection
        self.id = number
        self.window = window
        """Bytes that we may still send."""
        self.room = STREAM_WINDOW
        """Bytes that the peer may still send."""
        self.taken = 0
        """Bytes that were received and passed on, and not credited yet."""
        self.ahead = 0
        """Bytes that wait, and were credited to the connection already."""
        self.queue: deque[tuple[bytes, bool | None, Stream | None]] | None = None
        """Data that waits for a window: bytes, whether they are the last, whom to credit.

        The last entry may be a block of trailers, with nobody to credit and None for the flag.
        """
        self.open_in = self.open_out = True

    # --- what the peer sent ----------------------------------------------------------------
    def data(self, piece: bytes, ended: bool) -> None:
        raise NotImplementedError

    def reset(self, code: int) -> None:
        """The peer gave the stream up; it is closed."""
        raise NotImplementedError

    def lost(self, why: str) -> None:
        """The connection is gone."""
        raise NotImplementedError

    def sent_all(self) -> None:
        """The last byte of ours was written."""
        raise NotImplementedError


Stream = StreamBase["Sender[Any]"]
"""One of either side."""
S = TypeVar("S", bound=Stream)
Joinable = (
    Any  # a list or deque of pieces: bytes, whether they are the last, and what belongs to it
)


class Sender(Generic[S]):
    """`streams` are those with a number, by it."""

    __slots__ = (
        "_ahead",
        "_blocked",
        "_corked",
        "_gathered",
        "_out",
        "_resize",
        "_room",
        "_taken",
        "_window",
        "full",
        "pool",
        "streams",
        "transport",
    )

    def __init__(self, pool: Ahead | None = None) -> None:
        """`pool` is shared with the other connections of the pod."""
        self.pool = Ahead() if pool is None else pool
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.streams: dict[int, S] = {}
        self.full = False
        self._window = frames.DEFAULT_WINDOW
        self._room = WINDOW
        self._taken = 0
        self._ahead = 0
        self._gathered = 0
        self._out: list[bytes] = []
        self._corked = False
        self._resize = False
        self._blocked: dict[Stream, None] = {}
        """Streams that wait, and not for a window of their own: looking at the others would cost
        for every frame of a peer that opens the connection's window byte by byte."""

    # --- writing ---------------------------------------------------------------------------
    def send(self, data: bytes) -> None:
        """Frames that no window holds back."""
        if self._corked:
            self._out.append(data)
        elif not self.transport.is_closing():
            self.transport.write(data)

    def send_headers(self, stream: Stream, block: bytes, ended: bool) -> None:
        if self._resize:  # the peer made its table smaller and has to hear that ours is
            self._resize = False
            block = EMPTY_TABLE + block
        if ended:
            stream.open_out = False
        self.send(frames.headers(stream.id, block, ended))
        self._gather(len(block))
        if ended:
            self._all_sent(stream)

    def send_data(self, stream: Stream, piece: bytes, ended: bool, source: Stream | None) -> None:
        """In order; `source` is credited for it as it is written."""
        size = len(piece)
        if (
            stream.queue is None
            and size <= stream.window
            and size <= self._window
            and size <= FRAME_BYTES
            and (not self.full or not size)
        ):
            self._write_data(stream, piece, ended, source)
            return
        put_aside(size)
        if stream.queue is None:
            stream.queue = deque()
        if source is not None:
            source.connection.credit_ahead(source, size)
        if not join(stream.queue, piece, ended):
            stream.queue.append((piece, ended, source))
        self._pump(stream)

    def send_trailers(self, stream: Stream, block: bytes) -> None:
        """Behind all data."""
        if stream.queue is None:
            self.send_headers(stream, block, True)
        else:
            stream.queue.append((block, None, None))

    def _write_data(self, stream: Stream, piece: bytes, ended: bool, source: Stream | None) -> None:
        size = len(piece)
        stream.window -= size
        self._window -= size
        if ended:
            stream.open_out = False
        self.send(frames.frame(frames.DATA, 1 if ended else 0, stream.id, piece))
        self._gather(size)
        if source is not None and size:
            source.connection.credit(source, size)
        if ended:
            self._all_sent(stream)

    def _gather(self, size: int) -> None:
        if self._corked:
            self._gathered += size
            if self._gathered > _GATHERED_BYTES:
                self._write()

    def _pump(self, stream: Stream) -> None:
        """Write of a stream's queue what the windows allow."""
        queue = stream.queue
        while queue:
            piece, ended, source = queue[0]
            if ended is None:
                stream.queue = None
                self._blocked.pop(stream, None)
                self.send_headers(stream, piece, True)
                return
            room = 0 if self.full else max(min(stream.window, self._window, FRAME_BYTES), 0)
            if len(piece) > room:
                if room > 0:
                    queue[0] = (piece[room:], ended, source)
                    self._write_data(stream, piece[:room], False, source)
                if room < FRAME_BYTES:
                    if stream.window > 0:
                        self._blocked[stream] = None
                    else:
                        self._blocked.pop(stream, None)
                    return
                continue
            queue.popleft()
            self._write_data(stream, piece, ended, source)
        stream.queue = None
        self._blocked.pop(stream, None)

    def _pump_all(self) -> None:
        for stream in list(self._blocked):
            if self.full or self._window <= 0:
                return
            self._blocked.pop(stream, None)  # to the end of the line: all get their share
            if stream.queue is not None:
                self._pump(stream)

    def _all_sent(self, stream: Stream) -> None:
        if not stream.open_in:
            self.streams.pop(stream.id, None)
        stream.sent_all()

    def end_stream(self, stream: Stream, code: int | None) -> None:
        """Forget a stream; with a code, tell the peer if it does not know that it is over."""
        if stream.queue is not None:
            for piece, _, source in stream.queue:
                if source is not None and piece:
                    source.connection.credit(source, len(piece))
            stream.queue = None
            self._blocked.pop(stream, None)
        if self.streams.pop(stream.id, None) is not None and code is not None:
            self.send(frames.reset(stream.id, code))
        stream.open_in = stream.open_out = False

    def credit(self, stream: Stream, size: int) -> None:
        """So many bytes that the stream received are off our hands."""
        ahead = min(stream.ahead, size)
        if ahead:
            stream.ahead -= ahead
            self._ahead -= ahead
            self.pool.left += ahead
        if size > ahead:
            self.credit_connection(size - ahead)
        if stream.open_in:
            stream.taken += size
            if stream.taken >= STREAM_WINDOW // 2:
                self.send(frames.window(stream.id, stream.taken))
                stream.room += stream.taken
                stream.taken = 0

    def credit_ahead(self, stream: Stream, size: int) -> None:
        """So many bytes that the stream received have to wait: may the other streams go on?"""
        if size <= _AHEAD_BYTES - self._ahead and size <= self.pool.left:
            stream.ahead += size
            self._ahead += size
            self.pool.left -= size
            self.credit_connection(size)

    def credit_connection(self, size: int) -> None:
        """The same, for bytes of no stream any more."""
        self._taken += size
        if self._taken >= WINDOW // 2:
            self.send(frames.window(0, self._taken))
            self._room += self._taken
            self._taken = 0

    def end(self, why: str) -> None:
        """All streams are lost; the connection itself is left alone."""
        streams = list(self.streams.values())
        self.streams.clear()
        self._blocked.clear()
        for stream in streams:
            stream.open_in = stream.open_out = False
            if stream.queue is not None:
                for piece, _, source in stream.queue:
                    if source is not None and piece:
                        source.connection.credit(source, len(piece))
                stream.queue = None
            stream.lost(why)

    # --- asyncio ---------------------------------------------------------------------------
    def _flush(self) -> None:
        self._corked = False
        self._write()

    def _write(self) -> None:
        self._gathered = 0
        if self._out:
            out, self._out = self._out, []
            if self.transport is not None and not self.transport.is_closing():
                self.transport.write(out[0] if len(out) == 1 else b"".join(out))
                if self.full and self.transport.get_write_buffer_size() > _UNREAD_BYTES:
                    self.transport.abort()

    def pause_writing(self) -> None:
        self.full = True
        put_aside(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self.full = False
        self._pump_all()
