"""Sinks that lie, drip and never end: each event waits for a better answer, and gets it.

The adaptor runs as a process of its own, so that what it holds in memory can be told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.broker.harness import AdaptorProcess, Mosquitto, free_port, routes, until
from tests.broker.test_hostile_broker import BOUND, MIB, resident
from weir.adaptor.service import client_id
from weir.proxy.wire.status import read_status

DELIVERY = "delivery: {retry: 3, backoffDelay: PT0.02S, timeout: PT0.5S}, onFailure: block"
EVENTS = 60

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def request(reader: asyncio.StreamReader) -> bytes:
    """The body of the next one."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    return await reader.readexactly(length)


class HostileSink:
    """Does as told to whoever comes, until `mend()`; then takes events."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/events"
        self.taken: list[bytes] = []
        self.connections = 0
        self._behaviour: Behaviour = behaviour
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> HostileSink:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self._cut()

    def mend(self) -> None:
        self._behaviour = self._well
        self._cut()

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, IndexError):
            await self._behaviour(reader, writer)
        self._writers.discard(writer)
        writer.transport.abort()

    async def _well(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            self.taken.append(await request(reader))
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")


# --- what it does -----------------------------------------------------------------------------


def answers(data: bytes) -> Behaviour:
    """To every request; and then waits for the client to go."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(data)
        await reader.read()

    return behave


def floods(head: bytes, piece: bytes) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()

    return behave


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await request(reader)
    for byte in b"HTTP/1.1 204 No Content\r\nX: " + b"x" * 1000:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.02)


async def takes_no_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def speaks_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 500 You\r\nContent-Length: 0\r\n\r\n" * 2)
    await reader.read()


async def closes_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


async def closes_after_the_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await request(reader)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BEHAVIOURS = {
    "an endless body": floods(CHUNKED, b"10000\r\n" + b"x" * 65_536 + b"\r\n"),
    "an endless body without a frame": floods(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65_536),
    "an endless head": floods(b"HTTP/1.1 200 OK\r\n", b"X-More: " + b"x" * 8000 + b"\r\n"),
    "endless interim answers": floods(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100),
    "an endless chunk size": floods(CHUNKED, b"0" * 4096),
    "a body of 10 EB": floods(
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999999999\r\n\r\n", b"x" * 65_536
    ),
    "a body that doesn't come": answers(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx"),
    "half a head": answers(b"HTTP/1.1 200 OK\r\nContent-"),
    "drips": drips,
    "takes no body": takes_no_body,
    "speaks first": speaks_first,
    "closes at once": closes_at_once,
    "closes after the request": closes_after_the_request,
    "garbage": answers(b"\x16\x03\x01\x00\xa5" * 50 + b"\r\n\r\n"),
    "two lengths": answers(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx"),
    "no such protocol": answers(b"HTTP/9.9 200 OK\r\n\r\n"),
    "no such status": answers(b"HTTP/1.1 99999 What\r\nContent-Length: 0\r\n\r\n"),
    "switches protocols": answers(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"),
    "a bad chunk": answers(CHUNKED + b"zz\r\n"),
}


@pytest.mark.parametrize("name", BEHAVIOURS)
async def test_a_hostile_sink_costs_no_event_and_little_memory(
    broker: Mosquitto, tmp_path: Path, name: str
) -> None:
    many = [("plant/x", b"%d" % number + b"x" * 20_000) for number in range(EVENTS)]
    status = tmp_path / "status"
    async with HostileSink(BEHAVIOURS[name]) as sink:
        text = routes(f"name: all, filter: plant/#, sink: '{sink.url}', {DELIVERY}")
        options = ("--status", str(status), "--grace", "0.5")
        async with AdaptorProcess(broker.url, text, tmp_path, *options) as process:
            await until(lambda: broker.subscribed(client_id("weir", sink.url)), "subscribed")
            await broker.publish(many)
            said = ""
            while not said:  # it gives a reason
                said = read_status(status)["sinks"][0]["reason"] or ""
                await asyncio.sleep(0.05)
            assert len(said) < 300, said
            assert resident(process) < BOUND
            sink.mend()
            wanted = {body for _, body in many}
            await until(lambda: wanted <= set(sink.taken), "everything arrives")
            assert await process.stop() == 0


async def test_events_that_nobody_reads_are_held_once(broker: Mosquitto, tmp_path: Path) -> None:
    """A sink that takes the connection and no byte of 1 MiB: no more than the window's bytes."""
    many = [("plant/x", b"%d" % number + b"x" * MIB) for number in range(150)]
    async with HostileSink(takes_no_body) as sink:
        text = routes(f"name: all, filter: plant/#, sink: '{sink.url}', {DELIVERY}")
        options = ("--status", str(tmp_path / "status"), "--grace", "0.5")
        async with AdaptorProcess(broker.url, text, tmp_path, *options) as process:
            await until(lambda: broker.subscribed(client_id("weir", sink.url)), "subscribed")
            await broker.publish(many)
            await until(
                lambda: read_status(tmp_path / "status")["sinks"][0]["reason"], "it is blocked"
            )
            assert resident(process) < BOUND
            sink.mend()
            await until(lambda: {b for _, b in many} <= set(sink.taken), "everything arrives")
            assert resident(process) < BOUND
