"""Hostile HTTP/2, HTTP/1 and TLS at one pod of a worker: its neighbour is served all the same.

Against a worker as it runs, of 256 MB. Each of these ended it, or kept it from everything else,
before what they hold was weighed and what they cost was done in turns.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.relay.certificates import Pair, make_pair, needs_openssl
from tests.relay.h2rig import DATA, PING, RST, WINDOW_UPDATE, frame, settings, window
from tests.relay.hostile import (
    STREAMS,
    Mob,
    block,
    client_hello,
    endless_hello,
    entry,
    field,
    head,
    hello,
)
from tests.relay.workerrig import MEMORY, Running, worker
from weir.proxy import sockets
from weir.proxy.policy.budget import Budget, connections

INITIAL_WINDOW = 4
POST = b"\x83"
CALM = 100
"""So many of the neighbour's requests are answered while the others do their worst."""


@contextlib.asynccontextmanager
async def attacked(
    port: str, *, http2: bool, pair: Pair | None = None
) -> AsyncIterator[tuple[Running, Mob]]:
    """A worker and a mob at the hungry pod's port; in the end all is given back."""
    async with worker(http2=http2, pair=pair) as running:
        files = running.files
        mob = Mob(running.hungry.ports[port])
        try:
            yield running, mob
            before = running.asked
            await running.until(lambda: running.asked > before + CALM)
            assert running.most < MEMORY
            assert running.counters["other"]["cut"] == 0
        finally:
            mob.leave()
        await running.until(lambda: running.counters["hungry"]["connections"] == 0)
        await running.until(lambda: running.counters["hungry"]["in_flight"] == 0)
        # those to the function may stay for the next request
        await running.until(lambda: running.files <= files + 1000)
        print(f"{running.most >> 20} MB, {running.descriptors} files, {running.slowest:.3f} s")


def many_heads(count: int) -> bytes:
    """Each of a few hundred fields, and each another one."""
    fields = [field(b"%x" % number) for number in range(256, 856)]
    return b"".join(
        head(1 + 2 * number, block(b"/hello", field(b"k", b"%d" % number), *fields))
        for number in range(count)
    )


def bombs(count: int) -> bytes:
    """Each a megabyte in 300 bytes."""
    first = head(1, block(b"/hello", entry(b"a", b"v" * 4000)))
    return first + b"".join(
        head(3 + 2 * number, block(b"/hello", field(b"k", b"%d" % number), b"\xbe" * 255))
        for number in range(count)
    )


HOLDING: dict[str, tuple[int, bytes]] = {
    "streams that are never answered": (
        1500,
        hello() + b"".join(head(stream, block(b"/deaf")) for stream in STREAMS),
    ),
    "answers that no window lets through": (
        300,
        hello((INITIAL_WINDOW, 0)) + b"".join(head(stream, block(b"/large")) for stream in STREAMS),
    ),
    "heads of many fields that repeat": (300, hello() + many_heads(64)),
    "heads of a megabyte in 300 bytes": (30, hello() + bombs(64)),
    "a head of more fields than bytes": (
        20,
        hello()
        + b"".join(
            head(stream, block(b"/deaf", *[field(b"%x" % n) for n in range(4096, 24096)]))
            for stream in range(1, 11, 2)
        ),
    ),
}


@pytest.mark.parametrize("what", HOLDING)
async def test_what_http2_clients_make_a_worker_hold_is_bounded(what: str) -> None:
    count, first = HOLDING[what]
    async with attacked("data", http2=True) as (_, mob):
        await asyncio.to_thread(mob.come, count, first)


async def test_uploads_in_huge_windows_to_a_function_that_does_not_read_are_bounded() -> None:
    heads = [head(stream, block(b"/unread", method=POST), ended=False) for stream in STREAMS]
    bodies = [frame(DATA, 0, stream, bytes(16384)) * 15 for stream in STREAMS]
    async with attacked("data", http2=True) as (_, mob):
        await asyncio.to_thread(
            mob.come, 300, hello((INITIAL_WINDOW, (1 << 31) - 1)) + b"".join(heads)
        )
        await asyncio.to_thread(mob.pour, bodies, 3)


WASTING: dict[str, tuple[bytes, bytes]] = {
    "windows of connections, a byte at a time": (
        hello((INITIAL_WINDOW, 0)) + b"".join(head(stream, block(b"/large")) for stream in STREAMS),
        window(0, 1) * 5000,
    ),
    "windows of streams, a byte at a time": (
        hello((INITIAL_WINDOW, 0)) + b"".join(head(stream, block(b"/large")) for stream in STREAMS),
        b"".join(window(stream, 1) for stream in STREAMS) * 20,
    ),
    "a byte in each frame": (
        hello() + head(1, block(b"/sink", method=POST), ended=False),
        frame(DATA, 0, 1, b"x") * 6000,
    ),
    "settings that concern all streams": (
        hello((INITIAL_WINDOW, 0)) + b"".join(head(stream, block(b"/large")) for stream in STREAMS),
        settings(*[(INITIAL_WINDOW, value) for value in (0, 1)] * 16),
    ),
}


@pytest.mark.parametrize("what", WASTING)
async def test_frames_of_one_pod_that_cost_more_than_they_are_make_no_other_wait(what: str) -> None:
    first, more = WASTING[what]
    async with attacked("data", http2=True) as (running, mob):
        await asyncio.to_thread(mob.come, 20, first)
        await while_flooded(running, mob, more)


MEASURED = b"POST /sink HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\n"
CHUNKED = b"POST /sink HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("count", "first", "more"),
    [
        (5, CHUNKED, b"1\r\nx\r\n" * 10_000),
        (200, CHUNKED, b"100000\r\n" + b"x" * 0x100000 + b"\r\n"),
        (200, MEASURED, b"x" * 0x100000),
        (200, b"", b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n" * 2000),
    ],
    ids=["a byte in each chunk", "uploads in chunks", "uploads", "requests behind one another"],
)
async def test_http1_of_one_pod_that_costs_much_makes_no_other_wait(
    count: int, first: bytes, more: bytes
) -> None:
    async with attacked("data", http2=False) as (running, mob):
        await asyncio.to_thread(mob.come, count, first)
        await while_flooded(running, mob, more, reads=True)


async def while_flooded(running: Running, mob: Mob, data: bytes, reads: bool = False) -> None:
    flooding = asyncio.create_task(asyncio.to_thread(mob.flood, data, reads))
    try:
        before = running.asked
        await running.until(lambda: running.asked > before + CALM)
    finally:
        mob.stop()
        await flooding


@needs_openssl
@pytest.mark.parametrize(
    "first", [client_hello, lambda: endless_hello(60_000), lambda: endless_hello(120_000)]
)
async def test_handshakes_that_never_end_are_weighed_and_make_no_other_wait(
    tmp_path: Path, first: Callable[[], bytes]
) -> None:
    pair = make_pair(tmp_path)
    async with attacked("tls", http2=False, pair=pair) as (running, mob):
        await asyncio.to_thread(mob.come, 3000, first())
        # and who means it gets through
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            running.hungry.ports["tls"],
            ssl=pair.trusted(),
            server_hostname="127.0.0.1",
        )
        writer.write(b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200 ")
        writer.close()


@pytest.mark.parametrize("role", ["admin", "autoscaler", "metrics"])
async def test_slow_heads_on_the_other_ports_take_16_connections_of_it(role: str) -> None:
    async with attacked(role, http2=False) as (running, mob):
        files = running.files
        await asyncio.to_thread(mob.come, 500, b"GET / HTTP/1.1\r\nX-Padding: " + b"x" * 60_000)
        before = running.asked
        await running.until(lambda: running.asked > before + CALM)
        assert running.descriptors <= files + 24


async def test_connections_to_a_function_that_takes_no_more_streams_on_any_are_the_pods() -> None:
    """Each client may have one; what a function makes of it beyond that is charged to its share."""
    budget = Budget(connections(sockets.open_files(), MEMORY, 2))
    share, _ = budget.share(), budget.share()
    while share.room:
        share.take()
    async with attacked("data", http2=True) as (running, mob):
        await asyncio.to_thread(mob.come, 400, hello())
        asking = b"".join(head(stream, block(b"/goaway")) for stream in STREAMS)
        before = running.files
        await while_flooded(running, mob, asking)
        assert running.descriptors - before < 2 * share.used


async def test_answers_to_floods_that_are_not_read_are_bounded() -> None:
    noise = frame(PING, 0, 0, bytes(8)) * 9000
    async with attacked("data", http2=True) as (running, mob):
        await asyncio.to_thread(mob.come, 300, hello())
        await while_flooded(running, mob, noise)


async def test_floods_of_resets_are_the_end_of_the_connection_and_of_no_other() -> None:
    resets = [head(n, block(b"/deaf")) + frame(RST, 0, n, bytes(4)) for n in range(1, 4001, 2)]
    updates = frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1") * 100
    async with attacked("data", http2=True) as (running, mob):
        await asyncio.to_thread(mob.come, 100, hello() + b"".join(resets))
        await while_flooded(running, mob, updates)
