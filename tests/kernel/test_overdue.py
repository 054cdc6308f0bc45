"""The backstop: a direct request that runs for too long loses its connection, and no other does."""

from __future__ import annotations

import socket

import pytest

from tests.kernel.direct import GET, OK, Direct, Exchange
from tests.kernel.test_http2 import answer as answer2
from tests.kernel.test_http2 import get, opened
from tests.pods import DIRECT_PORT, needs_kernel, until

pytestmark = needs_kernel

SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"
SOON, LATE = 0.05, 3600.0


def reset(exchange: Exchange) -> None:
    """The caller has been told, and so is the app when it answers."""
    with pytest.raises(ConnectionResetError):
        exchange.client.recv(1)
    with pytest.raises(ConnectionError):
        exchange.server.sendall(OK)
        exchange.server.sendall(OK)  # when the first error went to the reading side


def alive(exchange: Exchange) -> None:
    exchange.ask(GET)
    exchange.answer(OK)


def test_a_request_past_its_deadline_is_reset_and_others_are_not(direct: Direct) -> None:
    overdue, idle, quick = direct.connect(), direct.connect(), direct.connect()
    alive(idle)
    alive(overdue)
    overdue.ask(GET)
    assert direct.attached.reset_overdue(LATE) == 0
    until(lambda: direct.attached.reset_overdue(SOON) == 1)
    reset(overdue)
    direct.expect(0, 3, 2, 1)
    alive(idle)
    alive(quick)
    direct.expect(0, 5, 4, 1)


def test_an_answer_that_never_ends_is_overdue_too(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET)
    exchange.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    until(lambda: direct.attached.reset_overdue(SOON) == 1)
    reset(exchange)
    direct.expect(0, 1, 0, 1)


def test_a_caller_that_closed_its_half_still_waits_and_is_reset(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET)
    exchange.client.shutdown(socket.SHUT_WR)
    until(lambda: direct.attached.reset_overdue(SOON) == 1)
    reset(exchange)
    direct.expect(0, 1, 0, 1)


def test_a_tunnel_has_no_deadline(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET)
    exchange.answer(SWITCHED)
    until(lambda: direct.since("upgraded") == 1)
    old = direct.connect()
    old.ask(GET)
    until(lambda: direct.attached.reset_overdue(SOON) == 1)
    reset(old)
    exchange.answer(b"anything")


def test_a_pipeline_is_judged_by_the_request_that_runs(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET * 2)
    exchange.answer(OK)
    until(lambda: direct.attached.reset_overdue(SOON) == 1)
    reset(exchange)
    direct.expect(0, 2, 1, 1)


def test_an_http2_connection_with_an_overdue_stream_is_reset(direct: Direct) -> None:
    exchange, other = opened(direct), opened(direct)
    exchange.ask(get(1) + get(3))
    exchange.answer(answer2(1))
    other.ask(get(1))
    other.answer(answer2(1))
    assert direct.attached.reset_overdue(LATE) == 0
    until(lambda: direct.attached.reset_overdue(SOON) == 1)
    reset(exchange)
    direct.expect(0, 3, 2, 1)
    other.ask(get(3))
    other.answer(answer2(3))
    direct.expect(0, 4, 3, 1)


def test_callers_over_ipv6_are_no_exception(direct: Direct) -> None:
    client = socket.create_connection((direct.pod.address6, DIRECT_PORT), 10)
    exchange = Exchange(client, direct.listener.accept())
    exchange.ask(GET)
    until(lambda: direct.attached.reset_overdue(SOON) == 1)
    reset(exchange)
    direct.expect(0, 1, 0, 1)
    exchange.close()


def test_hundreds_at_once(direct: Direct) -> None:
    exchanges = [direct.connect() for _ in range(300)]
    for exchange in exchanges[:200]:
        exchange.ask(GET)
    done = 0

    def all_reset() -> bool:
        nonlocal done
        done += direct.attached.reset_overdue(SOON)
        return done == 200

    until(all_reset)
    direct.expect(0, 200, 0, 200)
    for exchange in exchanges[200:210]:
        alive(exchange)
