"""TLS on pieces of any size, with pauses, and on bytes that are no TLS."""

import asyncio
import contextlib
import itertools
import ssl
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.relay.certificates import Pair, make_pair, needs_openssl
from weir.proxy.wire.secure import SecureServer

pytestmark = needs_openssl


class Wire(asyncio.Transport):
    """The transport below: keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False
        self.paused = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.written += data

    def write_eof(self) -> None: ...

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False


class Echo(asyncio.Protocol):
    """Says everything back, and pauses now and then."""

    def __init__(self, pauses: list[bool]) -> None:
        self.pauses = itertools.cycle(pauses)
        self.got = b""
        self.ended = False
        self.lost = 0
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert data
        self.got += data
        self.transport.write(data)
        if next(self.pauses):
            self.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self.transport.resume_reading)

    def eof_received(self) -> None:
        assert not self.ended
        self.ended = True

    def connection_lost(self, error: Exception | None) -> None:
        self.lost += 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(Path(tmp_path_factory.mktemp("certs")))


@given(
    st.lists(st.binary(min_size=1, max_size=40_000), min_size=1, max_size=5),
    st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    st.lists(st.booleans(), min_size=1, max_size=4),
    st.sampled_from([ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]),
)
@settings(max_examples=100, deadline=None)
def test_what_goes_in_comes_back_whatever_the_pieces(
    pair: Pair, said: list[bytes], sizes: list[int], pauses: list[bool], version: ssl.TLSVersion
) -> None:
    async def talk() -> None:
        context = pair.server_context()
        context.minimum_version = context.maximum_version = version
        echo = Echo([*pauses, False])
        settled: list[SecureServer] = []
        server = SecureServer(context, lambda: echo, settled.append)
        wire = Wire()
        server.connection_made(wire)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = pair.trusted().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        cuts = itertools.cycle(sizes)

        async def exchange() -> None:
            data = outgoing.read()
            while data:
                while wire.paused:
                    await asyncio.sleep(0)
                size = next(cuts)
                server.data_received(data[:size])
                data = data[size:]
            await asyncio.sleep(0)
            incoming.write(wire.written)
            wire.written = b""

        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
                break
            await exchange()
        heard = b""
        for piece in said:
            client.write(piece)
            await exchange()
            with contextlib.suppress(ssl.SSLWantReadError):
                while True:
                    heard += client.read(1 << 16)
        for _ in range(1000):  # what a pause has put off
            if len(heard) == sum(map(len, said)):
                break
            await exchange()
            with contextlib.suppress(ssl.SSLWantReadError):
                while True:
                    heard += client.read(1 << 16)
        assert echo.got == b"".join(said)
        assert heard == b"".join(said)
        assert settled == [server]
        with contextlib.suppress(ssl.SSLWantReadError):
            client.unwrap()
        await exchange()
        while wire.paused:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert echo.ended and wire.closed
        server.connection_lost(None)
        assert echo.lost == 1

    asyncio.run(talk())


@given(
    st.binary(min_size=1, max_size=600), st.lists(st.integers(1, 100), min_size=1), st.booleans()
)
@settings(max_examples=300, deadline=None)
def test_what_is_no_tls_never_gets_through(
    pair: Pair, data: bytes, sizes: list[int], record: bool
) -> None:
    async def talk() -> None:
        settled: list[SecureServer] = []
        above = Unreached()
        server = SecureServer(pair.server_context(), lambda: above, settled.append)
        wire = Wire()
        server.connection_made(wire)
        rest = b"\x16\x03\x01" + data if record else data
        for size in itertools.cycle(sizes):
            if wire.closed or not rest:
                break
            server.data_received(rest[:size])
            rest = rest[size:]
            while wire.paused and not wire.closed:
                await asyncio.sleep(0)
        if not wire.closed:
            server.eof_received()
        assert wire.closed
        server.connection_lost(None)
        assert settled == [server]
        assert above.told == [None], "it came to nothing"

    class Unreached(asyncio.Protocol):
        def __init__(self) -> None:
            self.told: list[Exception | None] = []

        def connection_made(self, _: asyncio.BaseTransport) -> None:
            raise AssertionError("the handshake succeeded")

        def connection_lost(self, error: Exception | None) -> None:
            self.told.append(error)

    asyncio.run(talk())
