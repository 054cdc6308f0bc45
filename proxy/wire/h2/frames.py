"""Frames of HTTP/2 (RFC 9113, section 6): numbers, limits, and how ours are written."""

from __future__ import annotations

from struct import pack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITIZED = 0x4, 0x8, 0x20

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0x0, 0x1, 0x2, 0x3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL = 0x5, 0x6, 0x7, 0x8
COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 0x9, 0xB

SET_ENABLE_PUSH, SET_MAX_STREAMS, SET_INITIAL_WINDOW = 2, 3, 4
SET_TABLE_SIZE, SET_MAX_FRAME, SET_MAX_FIELDS = 1, 5, 6

DEFAULT_WINDOW = 65535
LARGEST_WINDOW = (1 << 31) - 1
FRAME_BYTES = 16384
"""What a frame may hold in either direction: the protocol's default, never raised by us."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    size = len(payload)
    return pack(">HBBBI", size >> 8, size & 255, kind, flags, stream) + payload


def headers(stream: int, block: bytes, ended: bool) -> bytes:
    """A header block in as many frames as it takes."""
    flags = END_STREAM if ended else 0
    if len(block) <= FRAME_BYTES:
        return frame(HEADERS, flags | END_HEADERS, stream, block)
    pieces = [block[i : i + FRAME_BYTES] for i in range(0, len(block), FRAME_BYTES)]
    first, *middle, last = pieces
    frames = [frame(HEADERS, flags, stream, first)]
    frames += [frame(CONTINUATION, 0, stream, piece) for piece in middle]
    return b"".join([*frames, frame(CONTINUATION, END_HEADERS, stream, last)])


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(pack(">HI", *pair) for pair in values.items()))


def reset(stream: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, stream, pack(">I", code))


def window(stream: int, more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, pack(">I", more))


def goaway(last: int, code: int, why: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, 0, pack(">II", last, code) + why)
