"""One HTTP/2 connection, whichever end of it we are: frames, settings and flow control.

Owns what is the same towards clients and towards the user container. Its two kinds (`server`,
`user`) say what a header block or the end of the connection means.

A relay reads no faster than it can write: the sender of a body gets new credit for what has been
written to the other connection, so the bytes in memory stay within the windows that we offer. What
has to wait is credited to the connection ahead of that, within bounds: or a few streams that nobody
reads would use up the window of all others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from struct import unpack_from
from typing import Any, Generic, TypeVar, cast

from weir.proxy import contract
from weir.proxy.wire.h2 import frames
from weir.proxy.wire.h2.frames import FRAME_BYTES, LARGEST_WINDOW
from weir.proxy.wire.h2.hpack import EMPTY_TABLE, Block, Decoder, HpackError, TooLarge

WINDOW = 1 << 20
"""Bytes of bodies that a connection may have on their way through us, in each direction."""
STREAM_WINDOW = 256 << 10
MAX_STREAMS = 250
_AHEAD_BYTES, _ALL_AHEAD_BYTES = 8 << 20, 32 << 20
"""How much that waits may be credited ahead to one connection, and to all of the process."""
_SMALL = 4096
"""Smaller pieces that wait are joined: a byte must not cost the memory of an object."""
_GATHERED_BYTES = 64 << 10
"""Bodies that are held for one write; then it is seen whether the peer takes them."""
_UNREAD_BYTES = 1 << 20
"""What may wait to be written to a peer that does not read; all but bodies is never held back."""
_IDLE_FRAMES = 10_000
_IDLE_SECONDS = 60.0
"""So many frames that bring nothing forward (settings, pings, empty ones) in so long a time."""


class Fault(Exception):
    """The peer broke the protocol: the connection ends with this code."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


def join(waiting: Joinable, piece: bytes, ended: bool) -> bool:
    """Put a piece behind the last one that waits, if that is small. Was it?"""
    if waiting:
        last, over, *source = waiting[-1]
        if over is False and len(last) < _SMALL:
            waiting[-1] = (last + piece, ended, *source)
            return True
    return False


class _Ahead:
    """What is left of _ALL_AHEAD_BYTES."""

    left = _ALL_AHEAD_BYTES


class Stream:
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

    connection: Endpoint[Any]

    def __init__(self, connection: Endpoint[Any], number: int, window: int) -> None:
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


S = TypeVar("S", bound=Stream)
Joinable = (
    Any  # a list or deque of pieces: bytes, whether they are the last, and what belongs to it
)


class Endpoint(asyncio.Protocol, Generic[S]):
    """`streams` are those with a number, by it."""

    __slots__ = (
        "_ahead",
        "_block",
        "_block_flags",
        "_block_stream",
        "_blocked",
        "_corked",
        "_gathered",
        "_idle_frames",
        "_idle_since",
        "_out",
        "_resize",
        "_rest",
        "_room",
        "_taken",
        "_window",
        "closing",
        "decoder",
        "full",
        "initial_window",
        "max_streams",
        "partner",
        "streams",
        "transport",
    )

    def __init__(self) -> None:
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.streams: dict[int, S] = {}
        self.partner: Endpoint[Any] | None = None
        """The other connection of the relay; both write once for what one of them read."""
        self.decoder = Decoder(contract.MAX_HEAD_BYTES)
        self.initial_window = frames.DEFAULT_WINDOW
        self.max_streams = 1 << 31
        self.full = False
        self.closing = False
        self._window = frames.DEFAULT_WINDOW
        self._room = WINDOW
        self._taken = 0
        self._ahead = 0
        self._gathered = 0
        self._rest = b""
        self._out: list[bytes] = []
        self._corked = False
        self._resize = False
        self._blocked: dict[Stream, None] = {}
        self._block = bytearray()
        self._block_stream = 0
        self._block_flags = 0
        self._idle_frames = 0
        self._idle_since = 0.0

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
        if stream.queue is None:
            stream.queue = deque()
        if source is not None:
            source.connection.credit_ahead(source, size)
        if not join(stream.queue, piece, ended):
            stream.queue.append((piece, ended, source))
        self._blocked[stream] = None
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
        if self._corked:
            self._gathered += size
            if self._gathered > _GATHERED_BYTES:
                self._write()
        if source is not None and size:
            source.connection.credit(source, size)
        if ended:
            self._all_sent(stream)

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
                self._blocked[stream] = None
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
            _Ahead.left += ahead
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
        if size <= _AHEAD_BYTES - self._ahead and size <= _Ahead.left:
            stream.ahead += size
            self._ahead += size
            _Ahead.left -= size
            self.credit_connection(size)

    def fail(self, fault: Fault) -> None:
        """Say what the peer did wrong, and end."""
        if not self.closing:
            self.closing = True
            self._out.append(
                frames.goaway(self.last_peer_stream(), fault.code, str(fault).encode())
            )
            self._flush()
        self.end(f"http2: {fault}")
        self.hang_up()

    def hang_up(self) -> None:
        self.transport.close()

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
    def begin(self, transport: asyncio.Transport, first: bytes) -> None:
        """Take a transport, and say hello."""
        self.transport = transport
        self.send(first + frames.window(0, WINDOW - frames.DEFAULT_WINDOW))

    def data_received(self, data: bytes) -> None:
        partner = self.partner
        self._corked = True
        if partner is not None:
            partner._corked = True
        try:
            self._read(self._rest + data if self._rest else data)
        except Fault as fault:
            self.fail(fault)
        finally:
            self._flush()
            if partner is not None:
                partner._flush()
            if self.partner is not None and self.partner is not partner:
                self.partner._flush()

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

    def resume_writing(self) -> None:
        self.full = False
        self._pump_all()

    # --- reading ---------------------------------------------------------------------------
    def _read(self, data: bytes) -> None:
        at, end = 0, len(data)
        while end - at >= 9 and not self.closing:
            high, low, kind, flags, number = unpack_from(">HBBBI", data, at)
            size = high << 8 | low
            if size > FRAME_BYTES:
                self.strange(data[at : at + 9])
                raise Fault(frames.FRAME_SIZE_ERROR, "a frame is too large")
            stop = at + 9 + size
            if stop > end:
                break
            payload = data[at + 9 : stop]
            at = stop
            number &= 0x7FFFFFFF
            if self._block_stream and kind != frames.CONTINUATION:
                raise Fault(frames.PROTOCOL_ERROR, "a header block was interrupted")
            if kind == frames.DATA:
                self._data(number, flags, payload)
            elif kind == frames.HEADERS:
                self._headers(number, flags, payload)
            elif kind <= frames.CONTINUATION:
                self._control(kind, flags, number, payload)
            else:
                self._nothing_forward()
        self._rest = data[at:] if not self.closing else b""

    def _nothing_forward(self) -> None:
        self._idle_frames += 1
        if self._idle_frames == 1:
            self._idle_since = asyncio.get_running_loop().time()
        elif self._idle_frames > _IDLE_FRAMES:
            self._idle_frames = 0
            if asyncio.get_running_loop().time() - self._idle_since > _IDLE_SECONDS:
                return
            raise Fault(frames.ENHANCE_YOUR_CALM, "too many frames that mean nothing")

    def _data(self, number: int, flags: int, payload: bytes) -> None:
        ended = bool(flags & frames.END_STREAM)
        size = len(payload)
        self._room -= size
        if self._room < 0:
            raise Fault(frames.FLOW_CONTROL_ERROR, "more data than the connection's window")
        piece = self._unpadded(payload, 0) if flags & frames.PADDED else payload
        if piece:
            self._idle_frames = 0
        elif not ended:
            self._nothing_forward()
        stream = self.streams.get(number)
        if stream is None or not stream.open_in:
            self.not_open(number)
            self.credit_connection(size)
            if stream is not None:
                raise Fault(frames.STREAM_CLOSED, "data after the end of a stream")
            return
        stream.room -= size
        if stream.room < 0:
            self.credit_connection(size)
            self.end_stream(stream, frames.FLOW_CONTROL_ERROR)
            stream.reset(frames.FLOW_CONTROL_ERROR)
            return
        if ended:
            stream.open_in = False
            if not stream.open_out:
                del self.streams[number]
        padding = size - len(piece)
        if padding:
            self.credit(stream, padding)
        if piece or ended:
            stream.data(piece, ended)

    def credit_connection(self, size: int) -> None:
        """The same, for bytes of no stream any more."""
        self._taken += size
        if self._taken >= WINDOW // 2:
            self.send(frames.window(0, self._taken))
            self._room += self._taken
            self._taken = 0

    def _headers(self, number: int, flags: int, payload: bytes) -> None:
        self._idle_frames = 0
        if flags & frames.PRIORITIZED:
            start = 5 + (flags & frames.PADDED) // frames.PADDED
            if len(payload) < start:
                raise Fault(frames.FRAME_SIZE_ERROR, "HEADERS is too short for its priority")
            if unpack_from(">I", payload, start - 5)[0] & 0x7FFFFFFF == number:
                raise Fault(frames.PROTOCOL_ERROR, "a stream depends on itself")
            payload = self._unpadded(payload, 5) if flags & frames.PADDED else payload[5:]
        elif flags & frames.PADDED:
            payload = self._unpadded(payload, 0)
        if not number:
            raise Fault(frames.PROTOCOL_ERROR, "HEADERS without a stream")
        if flags & frames.END_HEADERS:
            self._block_ends(number, payload, bool(flags & frames.END_STREAM))
        else:
            self._block_stream = number
            self._block_flags = flags
            self._block += payload

    def _block_ends(self, number: int, block: bytes, ended: bool) -> None:
        try:
            self.headers_received(number, self.decoder.decode(block), ended)
        except HpackError as error:
            raise Fault(frames.COMPRESSION_ERROR, str(error)) from None
        except TooLarge:
            self.headers_received(number, None, ended)

    @staticmethod
    def _unpadded(payload: bytes, skip: int) -> bytes:
        """Without the padding, and without `skip` bytes of something else before the rest."""
        if not payload:
            raise Fault(frames.FRAME_SIZE_ERROR, "a padded frame is empty")
        end = len(payload) - payload[0]
        if end < 1 + skip:
            raise Fault(frames.PROTOCOL_ERROR, "more padding than frame")
        return payload[1 + skip : end]

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == frames.WINDOW_UPDATE:
            self._window_update(number, payload)
        elif kind == frames.RST_STREAM:
            self._reset(number, payload)
        elif kind == frames.CONTINUATION:
            self._continuation(number, flags, payload)
        elif kind == frames.SETTINGS:
            self._settings(number, flags, payload)
        elif kind == frames.PING:
            if number or len(payload) != 8:
                raise Fault(frames.PROTOCOL_ERROR if number else frames.FRAME_SIZE_ERROR, "PING")
            if not flags & frames.ACK:
                self._nothing_forward()
                self.send(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif kind == frames.GOAWAY:
            if number or len(payload) < 8:
                raise Fault(frames.PROTOCOL_ERROR if number else frames.FRAME_SIZE_ERROR, "GOAWAY")
            self.goaway_received(unpack_from(">I", payload)[0] & 0x7FFFFFFF)
        elif kind == frames.PRIORITY:
            self._nothing_forward()
            if not number or len(payload) != 5:
                raise Fault(
                    frames.PROTOCOL_ERROR if not number else frames.FRAME_SIZE_ERROR, "PRIORITY"
                )
        else:
            raise Fault(frames.PROTOCOL_ERROR, "PUSH_PROMISE was not allowed")

    def _window_update(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Fault(frames.FRAME_SIZE_ERROR, "WINDOW_UPDATE")
        more = unpack_from(">I", payload)[0] & 0x7FFFFFFF
        if not number:
            self._window += more
            if not more or self._window > LARGEST_WINDOW:
                code = frames.FLOW_CONTROL_ERROR if more else frames.PROTOCOL_ERROR
                raise Fault(code, "the connection's window")
            if self._blocked:
                self._pump_all()
            return
        stream = self.streams.get(number)
        if stream is None:
            self.not_open(number)
            return
        stream.window += more
        if not more or stream.window > LARGEST_WINDOW:
            code = frames.FLOW_CONTROL_ERROR if more else frames.PROTOCOL_ERROR
            self.end_stream(stream, code)
            stream.reset(code)
        elif stream.queue is not None:
            self._pump(stream)

    def _reset(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Fault(frames.FRAME_SIZE_ERROR, "RST_STREAM")
        stream = self.streams.get(number)
        if stream is None:
            self.not_open(number)
            self._nothing_forward()
            return
        self.end_stream(stream, None)
        stream.reset(unpack_from(">I", payload)[0])

    def _continuation(self, number: int, flags: int, payload: bytes) -> None:
        if not self._block_stream or number != self._block_stream:
            raise Fault(frames.PROTOCOL_ERROR, "CONTINUATION of nothing")
        if not payload:
            self._nothing_forward()
        self._block += payload
        if len(self._block) > contract.MAX_HEAD_BYTES:
            raise Fault(frames.ENHANCE_YOUR_CALM, "a header block is too large")
        if flags & frames.END_HEADERS:
            block = bytes(self._block)
            self._block.clear()
            self._block_stream = 0
            self._block_ends(number, block, bool(self._block_flags & frames.END_STREAM))

    def _settings(self, number: int, flags: int, payload: bytes) -> None:
        if number:
            raise Fault(frames.PROTOCOL_ERROR, "SETTINGS of a stream")
        if flags & frames.ACK:
            if payload:
                raise Fault(frames.FRAME_SIZE_ERROR, "SETTINGS")
            return
        if len(payload) % 6:
            raise Fault(frames.FRAME_SIZE_ERROR, "SETTINGS")
        self._nothing_forward()
        for at in range(0, len(payload), 6):
            self._setting(*unpack_from(">HI", payload, at))
        self.send(frames.frame(frames.SETTINGS, frames.ACK, 0))
        self.settings_received()

    def _setting(self, name: int, value: int) -> None:
        if name == frames.SET_INITIAL_WINDOW:
            if value > LARGEST_WINDOW:
                raise Fault(frames.FLOW_CONTROL_ERROR, "SETTINGS_INITIAL_WINDOW_SIZE")
            more, self.initial_window = value - self.initial_window, value
            for stream in list(self.streams.values()):
                stream.window += more
                if stream.window > LARGEST_WINDOW:
                    raise Fault(frames.FLOW_CONTROL_ERROR, "a stream's window")
                if stream.queue is not None:
                    self._pump(stream)
        elif name == frames.SET_MAX_STREAMS:
            self.max_streams = value
        elif name == frames.SET_TABLE_SIZE:
            self._resize = True
        elif name == frames.SET_MAX_FRAME and not FRAME_BYTES <= value < 1 << 24:
            raise Fault(frames.PROTOCOL_ERROR, "SETTINGS_MAX_FRAME_SIZE")
        elif name == frames.SET_ENABLE_PUSH and value > 1:
            raise Fault(frames.PROTOCOL_ERROR, "SETTINGS_ENABLE_PUSH")

    # --- what the two kinds make of it ---------------------------------------------------------
    def headers_received(self, number: int, block: Block | None, ended: bool) -> None:
        """A whole header block; None: larger than what is accepted."""
        raise NotImplementedError

    def goaway_received(self, last: int) -> None:
        raise NotImplementedError

    def settings_received(self) -> None:
        pass

    def not_open(self, number: int) -> None:
        """A frame of a stream that is not open: over, or was it never? Raises Fault then."""

    def strange(self, start: bytes) -> None:
        """The peer's bytes are no frame: perhaps another protocol."""

    def last_peer_stream(self) -> int:
        return 0
