"""A request that is over is gone at once: it leaves no reference cycle for the collector.

Cycles would cost every request its share of a collection, and let memory grow until the next one.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.relay.test_fuzz import Bench, Wire, bench

GET = b"GET / HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n"
CHUNKED = (
    b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: t\r\n\r\n"
)
SHORT = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
LONG = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"


@contextmanager
def garbage() -> Iterator[Counter[str]]:
    """What can only be freed by the collector, of all that is made in here, by type."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found.update(type(item).__name__ for item in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("request_", [GET, CHUNKED], ids=["GET", "chunked"])
@pytest.mark.parametrize("response", [SHORT, LONG], ids=["at once", "chunked"])
async def test_a_request_that_is_over_leaves_nothing_to_collect(
    limit: int, request_: bytes, response: bytes
) -> None:
    with bench(limit) as made:
        _one(made, request_, response)
        with garbage() as found:
            for _ in range(20):
                _one(made, request_, response)
        assert made.relay.counters().statuses[1] == 21
        assert not found


async def test_neither_does_one_that_had_to_wait_or_was_refused() -> None:
    with bench(1) as made:
        with garbage() as found:
            others = [Wire(made.relay.protocol(), made.sock) for _ in range(12)]
            for wire in (made.client, *others):
                made.stock()
                wire.protocol.data_received(GET)
            assert made.relay.counters().waiting == 10
            others.pop(0).close()  # one of those that wait gives up
            made.answer(lambda: [SHORT])
            statuses = made.relay.counters().statuses
            for wire in others:
                wire.close()
            others.clear()
        assert statuses == (0, 10, 0, 0, 2)
        assert not {"Http1Exchange", "Admission", "RequestHead"} & set(found), found


def _one(made: Bench, request: bytes, response: bytes) -> None:
    made.say(request)
    made.answer(lambda: [response])
