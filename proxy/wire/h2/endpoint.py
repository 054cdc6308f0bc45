"""One HTTP/2 connection, whichever end of it we are: frames and settings that the peer sends.

Owns what is the same towards clients and towards the user container; windows and what is written
are `sending`. Its two kinds (`server`, `user`) say what a header block or the end of the connection
means.
"""

from __future__ import annotations

import asyncio
from struct import unpack_from
from typing import Any

from weir.proxy import contract
from weir.proxy.wire.aside import put_aside
from weir.proxy.wire.clients import CLIENT_BYTES
from weir.proxy.wire.flow import MEMORY, TURN, Flow
from weir.proxy.wire.h2 import frames
from weir.proxy.wire.h2.frames import FRAME_BYTES, LARGEST_WINDOW
from weir.proxy.wire.h2.hpack import Block, Decoder, HpackError, TooLarge
from weir.proxy.wire.h2.sending import WINDOW, Ahead, S, Sender
from weir.proxy.wire.turns import SLICE, Turns

STREAM_BYTES = 1024
"""What a stream takes on each of its two connections, about, with all that is known of it."""
_HEAD, _HEAD_BYTES, _BYTES = 16, 512, 2048
"""A head costs as much of a slice as so many frames, and so many bytes of it, or others, as one."""
_IDLE_FRAMES = 10_000
_SETTINGS = 32
"""In one frame. Some concern all streams, and so cost more than other bytes."""
_IDLE_SECONDS = 60.0
"""So many frames that bring nothing forward (settings, pings, empty ones) in so long a time."""


class Fault(Exception):
    """The peer broke the protocol: the connection ends with this code."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Endpoint(Sender[S]):
    __slots__ = (
        "_block",
        "_block_flags",
        "_block_stream",
        "_idle_frames",
        "_idle_since",
        "_late",
        "_left",
        "_rest",
        "_turns",
        "closing",
        "decoder",
        "flow",
        "initial_window",
        "max_streams",
        "partner",
    )

    def __init__(self, pool: Ahead | None = None) -> None:
        super().__init__(pool)
        self.partner: Endpoint[Any] | None = None
        """The other connection of the relay; both write once for what one of them read."""
        self.decoder = Decoder(contract.MAX_HEAD_BYTES)
        self.initial_window = frames.DEFAULT_WINDOW
        self.max_streams = 1 << 31
        self.closing = False
        self._rest = b""
        self._turns = self.pool.turns
        self._late = False  # there are whole frames in the rest, and it stands in line
        self._left = 0  # of the slice
        self._block = bytearray()
        self._block_stream = 0
        self._block_flags = 0
        self._idle_frames = 0
        self._idle_since = 0.0

    # --- asyncio ---------------------------------------------------------------------------
    def begin(self, transport: asyncio.Transport, first: bytes) -> None:
        """Take a transport, and say hello."""
        self.transport = transport
        self.flow = Flow(transport)
        self.send(first + frames.window(0, WINDOW - frames.DEFAULT_WINDOW))

    def data_received(self, data: bytes) -> None:
        if self._turns.line:  # others of this pod are late, and so it is not served out of turn
            put_aside(len(data))
            self._rest += data
            self._wait()
        else:
            self._left = self._turns.look()
            self._slice(self._rest + data if self._rest else data)
            if self._late:
                self._late = False
                self._wait()

    def _wait(self) -> None:
        if not self._late and not self.closing:
            self._late = True
            self.flow.hold(TURN)
            self._turns.wait(self)

    def go_on(self, turns: Turns) -> bool:
        """Its turn has come. Is there still more?"""
        self._late = False
        self._left = turns.left
        if not self.closing:
            self._slice(self._rest)
        if not self._late and not self.closing:
            self.flow.release(TURN)
        return self._late

    def catch_up(self) -> None:
        """Read all that has come: there will be no turn."""
        while self._late and not self.closing:
            self._late = False
            self._left = SLICE
            self._slice(self._rest)

    def _slice(self, data: bytes) -> None:
        """Read so many frames, and write once for them."""
        partner = self.partner
        self._corked = True
        if partner is not None:
            partner._corked = True
        try:
            self._read(data)
        except Fault as fault:
            self.fail(fault)
        finally:
            self._turns.left = self._left
            self._flush()
            if partner is not None:
                partner._flush()
            if self.partner is not None and self.partner is not partner:
                self.partner._flush()

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

    def hold(self, held: bool) -> None:
        """Read nothing, for want of memory; or go on."""
        if held:
            self.flow.hold(MEMORY)
        else:
            self.flow.release(MEMORY)

    def weigh(self) -> int:
        """Bytes of memory, about, without those of exchanges; 0 for one that is ending."""
        if self.transport.is_closing():
            return 0
        queues = [stream.queue for stream in self.streams.values() if stream.queue is not None]
        waiting = sum(len(piece) for queue in queues for piece, _, _ in queue)
        waiting += self.transport.get_write_buffer_size()
        waiting += len(self._rest) + len(self._block) + STREAM_BYTES * len(self.streams)
        return 2 * CLIENT_BYTES + self.decoder.weigh() + waiting

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
            if self._left <= 0:
                self._late = True
                break
            self._left -= 1 + size // _BYTES
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
        self._left -= _HEAD
        try:
            self.headers_received(number, self.decoder.decode(block), ended)
        except HpackError as error:
            raise Fault(frames.COMPRESSION_ERROR, str(error)) from None
        except TooLarge:
            self.headers_received(number, None, ended)
        if self.decoder.fresh:
            self._left -= self.decoder.fresh // _HEAD_BYTES
            self.decoder.fresh = 0

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
            self._nothing_forward()
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
        put_aside(len(payload))
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
            self._nothing_forward()
            return
        if len(payload) % 6:
            raise Fault(frames.FRAME_SIZE_ERROR, "SETTINGS")
        self._nothing_forward()
        if len(payload) > 6 * _SETTINGS:
            raise Fault(frames.ENHANCE_YOUR_CALM, "too many settings")
        for at in range(0, len(payload), 6):
            self._setting(*unpack_from(">HI", payload, at))
        self.send(frames.frame(frames.SETTINGS, frames.ACK, 0))
        self.settings_received()

    def _setting(self, name: int, value: int) -> None:
        if name == frames.SET_INITIAL_WINDOW:
            if value > LARGEST_WINDOW:
                raise Fault(frames.FLOW_CONTROL_ERROR, "SETTINGS_INITIAL_WINDOW_SIZE")
            more, self.initial_window = value - self.initial_window, value
            self._left -= len(self.streams)
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
