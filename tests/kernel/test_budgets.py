"""Bytes that are costly to parse cost a bounded amount of CPU, and honest traffic is not hit."""

from __future__ import annotations

import threading
import time

import pytest

from tests.kernel.direct import GET, OK, Direct
from tests.pods import needs_kernel, until

pytestmark = needs_kernel

CHUNKED_HEAD = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
TINY_CHUNK = b"1\r\na\r\n"


def assert_given_up(direct: Direct) -> None:
    """Counted as one request until the connection closes, and the counter says so."""
    direct.expect(1, 1, 0, 0)
    assert direct.since("over_budget") == 1


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET / HTTP/1.1\r\n" + b"c:\n" * 20_000 + b"\r\n", id="two-byte lines"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"t" + b"\n" * 0 + b":\nt" * 20_000, id="name starts"),
        pytest.param(b"\r\n" * 30_000 + GET, id="blank lines before the request"),
        pytest.param(
            CHUNKED_HEAD + b"0\r\n" + b"t:\n" * 20_000 + b"\r\n", id="two-byte trailer lines"
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nContent-Length:" + b" " * 60_000 + b"1\r\n\r\nx",
            id="60 KB of spaces before a length",
        ),
        pytest.param(CHUNKED_HEAD + TINY_CHUNK * 10_000, id="a burst of one-byte chunks"),
        pytest.param(
            CHUNKED_HEAD + b"0" * 200_000 + b"1\r\na\r\n", id="a chunk size with 200 000 zeros"
        ),
    ],
)
def test_a_hostile_request_is_over_budget(direct: Direct, head: bytes) -> None:
    exchange = direct.connect()
    exchange.ask(head)
    assert_given_up(direct)
    exchange.answer(OK)
    exchange.ask(GET)
    exchange.answer(OK)
    assert_given_up(direct)
    exchange.close()
    direct.expect(0, 1, 1, 0)


def test_a_hostile_answer_is_over_budget(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET)
    exchange.answer(b"HTTP/1.1 200 OK\r\n" + b"c:\n" * 20_000 + b"\r\n")
    assert_given_up(direct)


def test_heads_deep_in_a_pipeline_are_over_budget(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET * 70 + GET.replace(b"GET", b"HEAD"))
    assert_given_up(direct)


def test_an_honest_head_of_60_kb_is_not_over_budget(direct: Direct) -> None:
    fields = b"".join(b"X-Header-%05d: %s\r\n" % (i, b"v" * 33) for i in range(1150))
    exchange = direct.connect()
    for number in range(1, 4):
        exchange.ask(b"GET / HTTP/1.1\r\n" + fields + b"\r\n")
        exchange.answer(b"HTTP/1.1 200 OK\r\n" + fields + b"Content-Length: 0\r\n\r\n")
        direct.expect(0, number, number, 0)
    assert direct.since("over_budget") == 0


def test_a_head_that_trickles_in_is_not_over_budget(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(b"GET / HTTP/1.1\r\n")
    for _ in range(300):
        exchange.ask(b"X")
    exchange.ask(b": y\r\n\r\n")
    exchange.answer(OK)
    direct.expect(0, 1, 1, 0)
    assert direct.since("over_budget") == 0


def test_a_long_slow_stream_of_tiny_chunks_is_not_over_budget(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(CHUNKED_HEAD)
    batch, began = 100, time.monotonic()
    for number in range(1, 151):
        exchange.ask(TINY_CHUNK * batch)
        due = began + number * batch * 30e-6  # 33 000 chunks a second
        until(lambda due=due: time.monotonic() >= due)  # type: ignore[misc]
    exchange.ask(b"0\r\n\r\n")
    exchange.answer(OK)
    direct.expect(0, 1, 1, 0)
    assert direct.since("over_budget") == 0


@pytest.mark.parametrize("size", [32, 100, 1000, 4096])
def test_chunks_that_are_not_tiny_never_run_over_budget(direct: Direct, size: int) -> None:
    chunk = b"%x\r\n%s\r\n" % (size, b"d" * size)
    body = chunk * (20_000_000 // len(chunk))
    exchange = direct.connect()
    exchange.ask(CHUNKED_HEAD)
    sender = threading.Thread(target=exchange.client.sendall, args=(body,))
    sender.start()
    assert exchange.server.discard(len(body)) == len(body)
    sender.join()
    exchange.ask(b"0\r\n\r\n")
    exchange.answer(OK)
    direct.expect(0, 1, 1, 0)
    assert direct.since("over_budget") == 0
