"""The user container of the differential test: a server that does what a scenario says.

It speaks raw bytes (tests/relay/rig.py) and remembers what it was asked, in the order it came.
Every path that no scenario has set answers `hello`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

from tests.relay.rig import PATIENCE, Closed, Peer, Request, parse_fields

Answer = Callable[[Peer, Request], Awaitable[None]]


def ok(body: bytes = b"", *fields: str, status: str = "200 OK", kind: str = "text/plain") -> bytes:
    """A response. What has no Content-Type (`kind`) is given one by the queue-proxy."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    if kind:
        lines.append(f"Content-Type: {kind}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


HELLO = ok(b"hello", "X-Backend: raw")


class User:
    """`on("/path", answer)`; `unread` paths answer as soon as the head is there."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.open = 0
        self.cut: list[str] = []
        """Paths of requests whose connection was closed by the other side before an answer."""
        self._answers: dict[str, Answer] = {}
        self._unread: set[str] = set()
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._peers: set[Peer] = set()

    def on(self, path: str, answer: Answer | bytes, *, unread: bool = False) -> None:
        if isinstance(answer, bytes):
            data = answer

            async def say(peer: Peer, _: Request) -> None:
                await peer.send(data)

            answer = say
        self._answers[path] = answer
        if unread:
            self._unread.add(path)

    async def start(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._serve, sock=listener, limit=1 << 22)

    async def stop(self) -> None:
        """Nobody listens from now on; connections that are open stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def abort(self) -> None:
        for peer in list(self._peers):
            peer.reset()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE), self._changed:
            await self._changed.wait_for(condition)

    async def received(self, count: int) -> None:
        """Wait for that many requests, since the start."""
        await self.wait_for(lambda: len(self.requests) >= count)

    async def left(self, path: str) -> None:
        """Wait until the other side has given up a request of this path."""
        await self.wait_for(lambda: path in self.cut)

    async def tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        peer = Peer(reader, writer)
        self._peers.add(peer)
        try:
            while True:
                await self._one(peer)
        except (Closed, ConnectionError, asyncio.CancelledError, TimeoutError):
            pass
        finally:
            self.open -= 1
            self._peers.discard(peer)
            writer.close()
            with contextlib.suppress(asyncio.CancelledError):
                await self.tell()

    async def _one(self, peer: Peer) -> None:
        head = await peer.head()
        line, fields = parse_fields(head)
        if line.count(" ") < 2:
            raise Closed  # the rest of an HTTP/2 preface
        got = Request(line, fields, b"", head)
        path = got.path.partition("?")[0]
        if path not in self._unread:
            if got.field("transfer-encoding") == "chunked":
                chunks, got.trailers = await peer.chunked()
                got.body = b"".join(chunks)
            elif length := got.field("content-length"):
                got.body = await peer.exactly(int(length))
        self.requests.append(got)
        await self.tell()
        answer = self._answers.get(path)
        if answer is not None:
            await answer(peer, got)
        elif line.startswith("HEAD "):
            await peer.send(HELLO.removesuffix(b"hello"))
        else:
            await peer.send(HELLO)

    # --- answers ---------------------------------------------------------------------------------
    async def hang(self, peer: Peer, request: Request) -> None:
        """No answer, until the other side gives up."""
        await self._given_up(peer, request)

    def slow(self, seconds: float, answer: bytes = HELLO) -> Answer:
        """An answer that takes its time; it is given up if the other side is."""

        async def wait(peer: Peer, request: Request) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._given_up(peer, request)
            await peer.send(answer)

        return wait

    async def _given_up(self, peer: Peer, request: Request) -> None:
        with contextlib.suppress(ConnectionError):
            while await peer.reader.read(65536):
                pass
        self.cut.append(request.path)
        raise Closed
