"""Streams of HTTP/2 connections are counted as requests: answered, reset, disowned or lost."""

from __future__ import annotations

import struct
import threading
from random import Random

import pytest

from tests.kernel.direct import OK, Direct, Exchange
from tests.kernel.test_loss import Crafted, Wire, wire
from tests.pods import needs_kernel, until

pytestmark = needs_kernel
__all__ = ["wire"]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS = 1, 4
BLOCK = b"\x82\x86\x84\x41\x01x"
PLACES = 256


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def get(stream: int) -> bytes:
    return frame(HEADERS, END_STREAM | END_HEADERS, stream, BLOCK)


def post(stream: int, *pieces: bytes) -> bytes:
    data = [frame(DATA, 0, stream, piece) for piece in pieces[:-1]]
    last = frame(DATA, END_STREAM, stream, pieces[-1])
    return frame(HEADERS, END_HEADERS, stream, BLOCK) + b"".join(data) + last


def answer(stream: int, body: bytes = b"hello") -> bytes:
    return frame(HEADERS, END_HEADERS, stream, b"\x88") + frame(DATA, END_STREAM, stream, body)


def reset(stream: int, code: int = 8) -> bytes:
    return frame(RST, 0, stream, struct.pack(">I", code))


def opened(direct: Direct) -> Exchange:
    """A connection on which both sides have said hello."""
    exchange = direct.connect()
    exchange.ask(PREFACE + frame(SETTINGS, 0, 0))
    exchange.answer(frame(SETTINGS, 0, 0) + frame(SETTINGS, 1, 0))
    exchange.ask(frame(SETTINGS, 1, 0))
    return exchange


# ---- the life of a stream --------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 2, 10, 13, 14, 15, 23])
def test_a_connection_without_streams_is_no_request(direct: Direct, cut: int) -> None:
    exchange = direct.connect()
    exchange.ask(PREFACE[:cut])
    exchange.ask(PREFACE[cut:] + frame(SETTINGS, 0, 0))
    exchange.answer(frame(SETTINGS, 0, 0))
    direct.expect(0, 0, 0, 0)
    assert direct.since("http2") == 1
    exchange.ask(get(1))
    direct.expect(1, 1, 0, 0)
    exchange.answer(answer(1))
    direct.expect(0, 1, 1, 0)
    exchange.close()
    direct.expect(0, 1, 1, 0)


def test_each_open_stream_is_in_flight(direct: Direct) -> None:
    exchange = opened(direct)
    exchange.ask(get(1) + get(3) + post(5, b"abc", b"def"))
    direct.expect(3, 3, 0, 0)
    exchange.answer(answer(3))
    direct.expect(2, 3, 1, 0)
    exchange.answer(answer(5) + answer(1))
    direct.expect(0, 3, 3, 0)


def test_a_stream_begins_with_its_first_frame_and_ends_with_its_last_byte(direct: Direct) -> None:
    exchange = opened(direct)
    request = frame(HEADERS, END_HEADERS, 1, BLOCK)
    exchange.ask(request)
    direct.expect(1, 1, 0, 0)
    exchange.ask(frame(DATA, 0, 1, b"x" * 5000))
    exchange.ask(frame(DATA, END_STREAM, 1))
    response = answer(1, b"y" * 100)
    exchange.answer(response[:-1])
    direct.expect(1, 1, 0, 0)
    exchange.answer(response[-1:])
    direct.expect(0, 1, 1, 0)


def test_trailers_end_a_stream_and_open_none(direct: Direct) -> None:
    """As in gRPC: the answer's END_STREAM is on a second HEADERS."""
    exchange = opened(direct)
    request_trailers = frame(HEADERS, END_STREAM | END_HEADERS, 1, b"\x10\x01a\x01b")
    exchange.ask(frame(HEADERS, END_HEADERS, 1, BLOCK) + frame(DATA, 0, 1, b"x") + request_trailers)
    exchange.answer(frame(HEADERS, END_HEADERS, 1, b"\x88") + frame(DATA, 0, 1, b"y"))
    direct.expect(1, 1, 0, 0)
    exchange.answer(frame(HEADERS, END_STREAM | END_HEADERS, 1, b"\x10\x01a\x01b"))
    direct.expect(0, 1, 1, 0)


def test_an_interim_answer_does_not_end_a_stream(direct: Direct) -> None:
    exchange = opened(direct)
    exchange.ask(get(1))
    exchange.answer(frame(HEADERS, END_HEADERS, 1, b"\x08\x03103"))
    direct.expect(1, 1, 0, 0)
    exchange.answer(answer(1))
    direct.expect(0, 1, 1, 0)


def test_continuation_frames_are_part_of_the_head(direct: Direct) -> None:
    exchange = opened(direct)
    exchange.ask(frame(HEADERS, END_STREAM, 1, BLOCK[:3]) + frame(CONTINUATION, 4, 1, BLOCK[3:]))
    direct.expect(1, 1, 0, 0)
    exchange.answer(answer(1))
    direct.expect(0, 1, 1, 0)


def test_other_frames_change_nothing(direct: Direct) -> None:
    exchange = opened(direct)
    exchange.ask(frame(PING, 0, 0, bytes(8)) + frame(WINDOW_UPDATE, 0, 0, b"\0\0\1\0") + get(1))
    exchange.answer(frame(PING, 1, 0, bytes(8)) + frame(WINDOW_UPDATE, 0, 1, b"\0\0\1\0"))
    exchange.ask(frame(0x55, 1, 1, b"an extension") + frame(WINDOW_UPDATE, 0, 1, b"\0\0\1\0"))
    direct.expect(1, 1, 0, 0)
    exchange.answer(answer(1))
    direct.expect(0, 1, 1, 0)


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_reset_of_either_side_aborts_the_stream(direct: Direct, side: str) -> None:
    exchange = opened(direct)
    exchange.ask(get(1) + get(3))
    (exchange.ask if side == "client" else exchange.answer)(reset(3))
    direct.expect(1, 2, 0, 1)
    exchange.answer(answer(1))
    direct.expect(0, 2, 1, 1)


def test_a_reset_after_the_answer_changes_nothing(direct: Direct) -> None:
    """A server that answers early resets with NO_ERROR what it does not want to read."""
    exchange = opened(direct)
    exchange.ask(frame(HEADERS, END_HEADERS, 1, BLOCK))
    exchange.answer(answer(1) + reset(1, 0))
    direct.expect(0, 1, 1, 0)
    exchange.ask(frame(DATA, END_STREAM, 1, b"late") + reset(1))
    direct.expect(0, 1, 1, 0)


def test_a_goaway_ends_the_streams_that_it_disowns(direct: Direct) -> None:
    exchange = opened(direct)
    exchange.ask(get(1) + get(3) + get(5))
    exchange.answer(frame(GOAWAY, 0, 0, struct.pack(">II", 3, 0) + b"bye"))
    direct.expect(2, 3, 0, 1)
    exchange.ask(get(7))  # nobody will answer it
    direct.expect(2, 3, 0, 1)
    exchange.answer(answer(1) + answer(3))
    direct.expect(0, 3, 2, 1)


def test_a_goaway_that_disowns_nobody_yet_changes_nothing(direct: Direct) -> None:
    exchange = opened(direct)
    exchange.ask(get(1))
    exchange.answer(frame(GOAWAY, 0, 0, struct.pack(">II", 0x7FFFFFFF, 0)))
    exchange.ask(get(3))
    direct.expect(2, 2, 0, 0)
    exchange.answer(answer(1) + answer(3))
    direct.expect(0, 2, 2, 0)


@pytest.mark.parametrize("way", ["close", "reset", "the server closes"])
def test_a_connection_that_ends_aborts_what_is_open(direct: Direct, way: str) -> None:
    exchange = opened(direct)
    exchange.ask(get(1) + get(3) + get(5))
    exchange.answer(answer(3))
    direct.expect(2, 3, 1, 0)
    if way == "the server closes":
        exchange.server.close()
    elif way == "reset":
        exchange.reset()
    else:
        exchange.close()
    direct.expect(0, 3, 1, 2)


# ---- many of them, in pieces -----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 10, 17])
def test_frames_may_be_cut_anywhere(direct: Direct, size: int) -> None:
    exchange = direct.connect()
    asked = PREFACE + frame(SETTINGS, 0, 0) + get(1) + post(3, b"abc", b"") + get(5)
    goaway = frame(GOAWAY, 0, 0, struct.pack(">II", 5, 0))
    answered = frame(SETTINGS, 0, 0) + answer(3) + goaway + answer(1, b"") + answer(5)
    for at in range(0, len(asked), size):
        exchange.ask(asked[at : at + size])
    direct.expect(3, 3, 0, 0)
    for at in range(0, len(answered), size):
        exchange.answer(answered[at : at + size])
    direct.expect(0, 3, 3, 0)


def test_large_frames_in_both_directions(direct: Direct) -> None:
    exchange = opened(direct)
    bodies = [Random(7).randbytes(16_000) for _ in range(20)]
    exchange.ask(post(1, *bodies))
    direct.expect(1, 1, 0, 0)
    response = frame(HEADERS, END_HEADERS, 1, b"\x88")
    response += b"".join(frame(DATA, 0, 1, body) for body in bodies)
    exchange.answer(response + frame(DATA, END_STREAM, 1))
    direct.expect(0, 1, 1, 0)


def test_ten_thousand_streams_one_after_the_other(direct: Direct) -> None:
    exchange = opened(direct)
    for stream in range(1, 20_001, 200):
        numbers = range(stream, stream + 200, 2)
        exchange.ask(b"".join(map(get, numbers)))
        exchange.answer(b"".join(map(answer, numbers)))
    direct.expect(0, 10_000, 10_000, 0)
    assert direct.since("crowded") == 0


def test_a_long_stream_among_many_short_ones_keeps_its_place(direct: Direct) -> None:
    exchange = opened(direct)
    exchange.ask(get(1))
    for stream in range(3, 2_003, 2):
        exchange.ask(get(stream))
        exchange.answer(answer(stream))
    direct.expect(1, 1001, 1000, 0)
    exchange.answer(answer(1))
    direct.expect(0, 1001, 1001, 0)


def test_streams_beyond_the_table_are_counted_without_their_time(direct: Direct) -> None:
    exchange = opened(direct)
    many = range(1, 2 * PLACES + 21, 2)
    exchange.ask(b"".join(map(get, many)))
    direct.expect(PLACES, PLACES + 10, 10, 0)
    assert direct.since("crowded") == 10
    exchange.answer(b"".join(map(answer, many)))
    direct.expect(0, PLACES + 10, PLACES + 10, 0)


def test_the_integral_of_streams_is_that_of_their_times(direct: Direct) -> None:
    exchange = opened(direct)
    before = direct.counters
    exchange.ask(get(1) + get(3))
    direct.expect(2, 2, 0, 0)
    first = direct.counters
    until(lambda: direct.counters.at_ns > first.at_ns + 50_000_000)
    exchange.answer(answer(1) + answer(3))
    direct.expect(0, 2, 2, 0)
    spent = direct.counters.integral_ns - before.integral_ns
    assert 2 * 50_000_000 <= spent <= 2 * (direct.counters.at_ns - before.at_ns)
    assert sum(direct.counters.latency) - sum(before.latency) == 2


# ---- doubtful input --------------------------------------------------------------------------


def test_streams_that_open_faster_than_the_budget_are_no_longer_followed(direct: Direct) -> None:
    burst = b"".join(get(stream) + reset(stream) for stream in range(1, 200_001, 2))

    def over_budget() -> bool:
        """A machine that is busy may be slower than the budget: then the burst comes again."""
        exchange = opened(direct)
        sender = threading.Thread(target=exchange.client.sendall, args=(burst,))
        sender.start()
        assert exchange.server.recv_exactly(len(burst)) == burst
        sender.join()
        if not direct.since("over_budget"):
            direct.end()
            return False
        counts = direct.counts()
        assert (counts.in_flight, counts.started - counts.aborted) == (1, 1)
        exchange.close()
        return True

    until(over_budget, seconds=60)
    until(lambda: direct.counts().in_flight == 0)


def test_even_and_repeated_numbers_open_nothing(direct: Direct) -> None:
    exchange = opened(direct)
    exchange.ask(get(3) + get(2) + get(1) + get(3) + get(0))
    direct.expect(1, 1, 0, 0)
    exchange.answer(answer(3) + answer(2))
    direct.expect(0, 1, 1, 0)


def test_garbage_after_the_preface_does_no_harm_and_leaves_nothing(direct: Direct) -> None:
    random = Random(11)
    for _ in range(50):
        exchange = direct.connect()
        exchange.ask(PREFACE + random.randbytes(random.randrange(1, 3000)))
        exchange.answer(random.randbytes(random.randrange(1, 3000)))
        exchange.reset()
    until(lambda: direct.counts().in_flight == 0)
    exchange = direct.connect()
    exchange.ask(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    exchange.answer(OK)
    until(lambda: direct.counts().in_flight == 0)


# ---- gaps ------------------------------------------------------------------------------------


def test_frames_lost_in_a_gap_are_counted_by_their_answers(direct: Direct, wire: Wire) -> None:
    connection = Crafted(wire, direct.listener)
    hello, first, second = PREFACE + frame(SETTINGS, 0, 0), get(1), get(3)
    connection.send(0, hello)
    at = len(hello)
    connection.send(at + len(first), second)  # before its turn: nobody reads it then
    connection.send(at, first)
    asked = hello + first + second
    assert connection.server.recv_exactly(len(asked)) == asked
    direct.expect(1, 1, 0, 0)
    assert direct.since("framing_lost") == 1
    connection.server.sendall(frame(SETTINGS, 0, 0) + answer(1) + answer(3))
    direct.expect(0, 2, 2, 0)
    connection.send(len(asked), get(5))
    assert connection.server.recv_exactly(len(get(5))) == get(5)
    direct.expect(1, 3, 2, 0)
    connection.server.sendall(answer(5))
    direct.expect(0, 3, 3, 0)
    connection.server.reset()


def test_a_gap_within_a_payload_loses_nothing(direct: Direct, wire: Wire) -> None:
    connection = Crafted(wire, direct.listener)
    head = PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, BLOCK)
    data = frame(DATA, END_STREAM, 1, b"d" * 1000)
    connection.send(0, head + data[:300])
    at = len(head)
    connection.send(at + 600, data[600:])
    connection.send(at + 300, data[300:600])
    assert connection.server.recv_exactly(len(head + data)) == head + data
    connection.server.sendall(frame(SETTINGS, 0, 0) + answer(1))
    direct.expect(0, 1, 1, 0)
    assert direct.since("framing_lost") == 0
    connection.server.reset()
