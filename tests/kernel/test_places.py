"""Connections have their state in a table while it has a place for them, else on their socket:
which of the two it is makes no difference to what is counted."""

from __future__ import annotations

import pytest

from tests.kernel.direct import GET, OK, Direct, Exchange
from tests.pods import Pod, needs_kernel, until
from weir.proxy.kernel import Kernel

pytestmark = needs_kernel

PLACES = 128  # in bpf/maps.h
MANY = 3 * PLACES


def placed(direct: Direct) -> int:
    return len(direct.attached.tables.places.states())


def spoken(exchange: Exchange) -> None:
    exchange.ask(GET)
    exchange.answer(OK)


def test_a_connection_gives_its_place_back_when_it_closes(direct: Direct) -> None:
    exchange = direct.connect()
    assert placed(direct) == 1
    spoken(exchange)
    exchange.close()
    until(lambda: placed(direct) == 0)
    direct.expect(0, 1, 1, 0)


def test_connections_that_find_no_place_are_counted_like_the_others(direct: Direct) -> None:
    exchanges = [direct.connect() for _ in range(MANY)]
    assert placed(direct) <= PLACES
    assert placed(direct) > PLACES / 2, "cookies that follow each other have places of their own"
    for exchange in exchanges:
        exchange.ask(GET)
    direct.expect(MANY, MANY, 0, 0)
    for exchange in exchanges:
        exchange.answer(OK)
    direct.expect(0, MANY, MANY, 0)
    for exchange in exchanges[::2]:
        exchange.ask(GET)
        exchange.reset()
    direct.expect(0, MANY + MANY // 2, MANY, MANY // 2)
    assert direct.since("connections") == MANY
    until(lambda: direct.counters.open_connections == MANY // 2)


def test_a_place_remembers_nothing_of_the_connection_before(direct: Direct) -> None:
    """Each leaves another state behind: of a body, a chunk, a tunnel, a close-delimited answer."""
    chunk = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel"
    leave = [
        (b"POST / HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf", b""),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", chunk),
        (b"HEAD / HTTP/1.1\r\n\r\n", b""),
        (GET, b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
        (GET, b"HTTP/1.1 200 OK\r\n\r\nuntil the close"),
        (b"GET / HT", b""),
        (b"\x00garbage", b""),
    ]
    for number in range(3 * PLACES):
        asked, answered = leave[number % len(leave)]
        left = direct.connect()
        left.ask(asked)
        if answered:
            left.answer(answered)
        left.reset()
        until(lambda: placed(direct) == 0)
        next_one = direct.connect()
        before = direct.counts()
        spoken(next_one)
        spoken(next_one)
        direct.expect(0, before.started + 2, before.finished + 2, before.aborted)
        next_one.close()
        until(lambda: placed(direct) == 0)


def test_who_finds_no_place_is_overdue_as_well(direct: Direct) -> None:
    exchanges = [direct.connect() for _ in range(2 * PLACES)]
    assert placed(direct) < len(exchanges)
    for exchange in exchanges:
        exchange.ask(GET)
    overdue = 0

    def all_are_reset() -> bool:
        nonlocal overdue
        overdue += direct.attached.reset_overdue(0.05)
        return overdue >= len(exchanges)

    until(all_are_reset)
    direct.expect(0, len(exchanges), 0, len(exchanges))
    for exchange in exchanges:
        with pytest.raises(ConnectionResetError):
            exchange.client.recv(1)


def test_a_pod_that_is_detached_leaves_no_place_taken(kernel: Kernel, pod: Pod) -> None:
    attached = kernel.attach(pod.target())
    listener = pod.backend().listen("0.0.0.0")
    attached.adopt_listeners()
    attached.open_direct()
    direct = Direct(pod, attached, pod.backend(), listener)
    direct.begin()
    exchange = direct.connect()
    exchange.ask(GET)
    assert placed(direct) == 1
    attached.detach()
    assert placed(direct) == 0
    exchange.answer(OK)  # nobody counts it, and it goes on
    exchange.close()
