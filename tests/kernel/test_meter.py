"""Connections, the integral, latencies and large bodies: what a pod's meter says over time."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from tests.kernel.direct import GET, OK, Direct
from tests.pods import USER_PORT, needs_kernel, until
from weir.proxy.kernel import PodCounters

pytestmark = needs_kernel


def test_connections_are_counted_open_until_they_close(direct: Direct) -> None:
    exchanges = [direct.connect() for _ in range(5)]
    assert direct.counters.open_connections == 5
    assert direct.since("connections") == 5
    for exchange in exchanges[:2]:
        exchange.close()
    until(lambda: direct.counters.open_connections == 3)


def test_relayed_connections_are_never_counted(direct: Direct) -> None:
    exchange = direct.connect(USER_PORT)
    exchange.ask(GET)
    exchange.answer(OK)
    exchange.ask(GET)
    direct.expect(0, 0, 0, 0)
    assert direct.since("connections") == 0


@pytest.mark.parametrize("end", ["answered", "aborted"])
def test_the_integral_is_what_the_callers_saw(direct: Direct, end: str) -> None:
    before = direct.counters
    at_least = at_most = 0
    held = []
    for _ in range(3):
        exchange = direct.connect()
        asking = time.monotonic_ns()
        exchange.ask(GET)
        held.append((exchange, asking, time.monotonic_ns()))
    hold(0.05)

    first = time.monotonic_ns()
    middle = direct.counters
    last = time.monotonic_ns()
    assert middle.in_flight == 3
    so_far = middle.integral_ns - before.integral_ns
    assert sum(first - asked for _, _, asked in held) <= so_far
    assert so_far <= sum(last - asking for _, asking, _ in held)

    for number, (exchange, asking, asked) in enumerate(held, start=1):
        ending = time.monotonic_ns()
        if end == "answered":
            exchange.answer(OK)
        else:
            exchange.reset()
        until(lambda number=number: direct.counts().in_flight == 3 - number)  # type: ignore[misc]
        at_least += ending - asked
        at_most += time.monotonic_ns() - asking
    direct.expect(0, 3, *((3, 0) if end == "answered" else (0, 3)))
    assert at_least <= direct.counters.integral_ns - before.integral_ns <= at_most


def test_the_latency_histogram_is_that_of_the_finished_requests(direct: Direct) -> None:
    before = direct.counters
    exchange = direct.connect()
    asking = time.monotonic_ns()
    exchange.ask(GET)
    asked = time.monotonic_ns()
    hold(0.02)
    at_least = time.monotonic_ns() - asked
    exchange.answer(OK)
    direct.expect(0, 1, 1, 0)
    at_most = time.monotonic_ns() - asking
    (start, end) = new_latencies(before, direct.counters)[0]
    assert start * 1000 <= at_most
    assert end * 1000 >= at_least


def test_a_pipelined_request_runs_from_the_end_of_the_answer_before_it(direct: Direct) -> None:
    before = direct.counters
    exchange = direct.connect()
    exchange.ask(GET * 2)
    hold(0.05)
    answering = time.monotonic_ns()
    exchange.answer(OK)
    exchange.answer(OK)
    at_most = time.monotonic_ns() - answering
    direct.expect(0, 2, 2, 0)
    second, first = new_latencies(before, direct.counters)
    assert second[0] * 1000 <= at_most
    assert first[1] * 1000 >= 50_000_000


@pytest.mark.parametrize("kind", ["Content-Length", "chunked"])
def test_300_megabytes_each_way_are_one_request(direct: Direct, kind: str) -> None:
    size = 300_000_000
    if kind == "chunked":
        framing, tail = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size, b"\r\n0\r\n\r\n"
    else:
        framing, tail = b"Content-Length: %d\r\n\r\n" % size, b""
    exchange = direct.connect()
    exchange.ask(b"POST / HTTP/1.1\r\n" + framing)
    upload = threading.Thread(target=send_zeros, args=(exchange.client, size))
    upload.start()
    assert exchange.server.discard(size) == size
    upload.join()
    exchange.ask(tail)
    direct.expect(1, 1, 0, 0)

    exchange.answer(b"HTTP/1.1 200 OK\r\n" + framing)
    download = threading.Thread(target=exchange.server.produce, args=(size,))
    download.start()
    got = receive_and_drop(exchange.client, size)
    download.join()
    assert got == size
    if tail:
        direct.expect(1, 1, 0, 0)
        exchange.answer(tail)
    direct.expect(0, 1, 1, 0)
    exchange.ask(GET)
    exchange.answer(OK)
    direct.expect(0, 2, 2, 0)


def send_zeros(client: socket.socket, size: int) -> None:
    block = bytes(1 << 20)
    while size:
        part = block[:size]
        client.sendall(part)
        size -= len(part)


def receive_and_drop(client: socket.socket, size: int) -> int:
    buffer, got = bytearray(1 << 20), 0
    while got < size:
        n = client.recv_into(buffer, min(size - got, len(buffer)))
        if not n:
            break
        got += n
    return got


def hold(seconds: float) -> None:
    """Let a request be outstanding for at least this long."""
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() >= end)


def new_latencies(before: PodCounters, after: PodCounters) -> list[tuple[int, int]]:
    """[from, to) in microseconds of each request that finished in between, fastest first."""
    found = []
    for bucket, (then, now) in enumerate(zip(before.latency, after.latency, strict=True)):
        found += [bounds_of(bucket)] * (now - then)
    return found


def bounds_of(bucket: int) -> tuple[int, int]:
    """[from, to) in microseconds, from the definition: four buckets per power of two."""
    edges = [0, 1, 2, 3]
    power = 4
    while len(edges) < 130:
        edges += [power + i * power // 4 for i in range(4)]
        power *= 2
    return edges[bucket], edges[bucket + 1]
