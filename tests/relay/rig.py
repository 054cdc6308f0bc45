"""A user container that does what a test says, and a client that says exactly what it is told.

Both speak raw bytes over sockets, so that nothing but the relay decides what HTTP looks like.
"""

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from weir.proxy.contract import Probe, RevisionSettings
from weir.proxy.probes import Prober
from weir.proxy.relay import Relay
from weir.proxy.wire.dial import dial_here

PATIENCE = 20.0
"""Seconds after which a test that waits for something is stuck; proves nothing about speed."""


def _first(fields: list[tuple[str, str]], name: str) -> str | None:
    return next((value for key, value in fields if key.lower() == name.lower()), None)


def parse_fields(head: bytes) -> tuple[str, list[tuple[str, str]]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = [line.split(":", 1) for line in lines if line]
    return first, [(name, value.strip()) for name, value in pairs]


@dataclass
class Request:
    """What the user container received."""

    line: str
    fields: list[tuple[str, str]]
    body: bytes
    head: bytes
    trailers: bytes = b""

    @property
    def path(self) -> str:
        return self.line.split(" ")[1]

    def field(self, name: str) -> str | None:
        return _first(self.fields, name)


@dataclass
class Response:
    """What the client read; `head` is its bytes."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes
    head: bytes
    trailers: bytes = b""
    chunks: list[bytes] = field(default_factory=list)

    def field(self, name: str) -> str | None:
        return _first(self.fields, name)


class Closed(Exception):
    """The other side closed (or reset) before what was wanted had come."""


class Peer:
    """One end of a TCP connection, read by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Raises Closed when the other side is gone."""
        if self.writer.is_closing():
            raise Closed("closed before it was sent")
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> bytes:
        try:
            async with asyncio.timeout(PATIENCE):
                return await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Closed(repr(error)) from None

    async def exactly(self, size: int) -> bytes:
        try:
            async with asyncio.timeout(PATIENCE):
                return await self.reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Closed(repr(error)) from None

    async def chunked(self) -> tuple[list[bytes], bytes]:
        chunks = []
        while True:
            line = await self.until(b"\r\n")
            size = int(line, 16)
            if not size:
                break
            chunks.append(await self.exactly(size))
            assert await self.exactly(2) == b"\r\n"
        trailers = b""
        while (line := await self.until(b"\r\n")) != b"\r\n":
            trailers += line
        return chunks, trailers

    async def until(self, mark: bytes) -> bytes:
        try:
            async with asyncio.timeout(PATIENCE):
                return await self.reader.readuntil(mark)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Closed(repr(error)) from None

    async def rest(self) -> bytes:
        """Everything until the other side closes; a reset counts as closing."""
        data = b""
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionError):
                while piece := await self.reader.read(65536):
                    data += piece
        return data

    async def closed(self) -> bool:
        """Wait for the other side to close; False if it said something instead."""
        return not await self.rest()

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Close with a RST, as a process does that dies with unread data."""
        sock = self.writer.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    @property
    def port(self) -> int:
        return int(self.writer.get_extra_info("sockname")[1])


class Client(Peer):
    """A client of the relay."""

    async def response(self, method: str = "GET") -> Response:
        """The next response, interim ones included. Raises Closed."""
        head = await self.head()
        line, fields = parse_fields(head)
        status = int(line.split(" ")[1])
        response = Response(status, fields, b"", head)
        if method == "HEAD" or status < 200 or status in (204, 304):
            return response
        if response.field("transfer-encoding") == "chunked":
            response.chunks, response.trailers = await self.chunked()
            response.body = b"".join(response.chunks)
        elif (length := response.field("content-length")) is not None:
            response.body = await self.exactly(int(length))
        else:
            response.body = await self.rest()
        return response

    async def ask(self, data: str | bytes) -> Response:
        """Send a whole request and read its response."""
        data = data.encode("latin-1") if isinstance(data, str) else data
        await self.send(data)
        return await self.response(data.split(b" ", 1)[0].strip().decode())

    async def get(self, path: str = "/", *fields: str) -> Response:
        return await self.ask(get(path, *fields))


def get(path: str = "/", *fields: str) -> bytes:
    return request("GET", path, *fields)


def post(path: str, body: bytes, *fields: str) -> bytes:
    return request("POST", path, f"Content-Length: {len(body)}", *fields) + body


def request(method: str, path: str, *fields: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: example.com", "User-Agent: curl/8", *fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def ok(body: bytes = b"", *fields: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


Answer = Callable[["Peer", Request], Awaitable[None]]


class UserContainer:
    """Listens on loopback. `on("/path", answer)`; paths nobody set are echoed."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.open = 0
        self.changed = asyncio.Condition()
        self._answers: dict[str, Answer] = {}
        self._unread: set[str] = set()
        self._server: asyncio.Server | None = None
        self._peers: set[asyncio.StreamWriter] = set()
        self.port = 0

    def on(self, path: str, answer: Answer | bytes, *, unread: bool = False) -> None:
        """`unread`: the answer comes as soon as the head is there, and reads the body if at all."""
        if isinstance(answer, bytes):
            data = answer

            async def say(peer: Peer, _: Request) -> None:
                await peer.send(data)

            answer = say
        self._answers[path] = answer
        if unread:
            self._unread.add(path)

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._peers):
            writer.transport.abort()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE), self.changed:
            await self.changed.wait_for(condition)

    async def received(self, count: int) -> None:
        """Wait for that many requests, since the start."""
        await self.wait_for(lambda: len(self.requests) >= count)

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self._peers.add(writer)
        peer = Peer(reader, writer)
        try:
            while True:
                await self._one(peer)
        except (Closed, ConnectionError, asyncio.CancelledError, TimeoutError):
            pass
        finally:
            self.open -= 1
            self._peers.discard(writer)
            writer.close()
            with contextlib.suppress(asyncio.CancelledError):
                await self._tell()

    async def _one(self, peer: Peer) -> None:
        head = await peer.head()
        line, fields = parse_fields(head)
        got = Request(line, fields, b"", head)
        path = got.path.partition("?")[0]
        if path not in self._unread:
            if got.field("transfer-encoding") == "chunked":
                chunks, got.trailers = await peer.chunked()
                got.body = b"".join(chunks)
            elif length := got.field("content-length"):
                got.body = await peer.exactly(int(length))
        self.requests.append(got)
        await self._tell()
        answer = self._answers.get(path)
        if answer is not None:
            await answer(peer, got)
            return
        body = b"" if line.startswith("HEAD ") else got.head + got.body
        await peer.send(ok(body, "X-Backend: raw", "Content-Type: text/plain"))


async def hang(peer: Peer, _: Request) -> None:
    """An answer that never comes."""
    await peer.rest()
    raise Closed


async def die(peer: Peer, _: Request) -> None:
    peer.close()
    raise Closed


class Hold:
    """An answer that is given when the test says `release()`, to every request that waits."""

    def __init__(self, response: bytes = ok(b"held")) -> None:
        self._response = response
        self._released = asyncio.Semaphore(0)
        self.waiting = 0

    async def __call__(self, peer: Peer, _: Request) -> None:
        self.waiting += 1
        await self._released.acquire()
        self.waiting -= 1
        await peer.send(self._response)

    def release(self, times: int = 1) -> None:
        for _ in range(times):
            self._released.release()


class Rig:
    """Client, relay and user container, all in one process on loopback."""

    def __init__(self, user: UserContainer, relay: Relay, server: asyncio.Server) -> None:
        self.user = user
        self.relay = relay
        self.offer: str | None = None
        self._server = server
        self._clients: list[Client] = []

    @classmethod
    async def start(cls, *, probe: Probe | None = None, **settings: Any) -> "Rig":
        user = UserContainer()
        await user.start()
        revision = RevisionSettings(
            user_port=user.port, probes=(probe or Probe(port=user.port, period=10),), **settings
        )
        made: list[Rig] = []
        relay = Relay(
            revision,
            dial=dial_here,
            prober=Prober(revision, dial_here),
            offer=lambda: made[0].offer,
        )
        loop = asyncio.get_running_loop()
        server = await loop.create_server(relay.protocol, "127.0.0.1", 0)
        made.append(cls(user, relay, server))
        return made[0]

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    async def client(self, *, receive_buffer: int = 0) -> Client:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        client = Client(*await asyncio.open_connection(sock=sock, limit=1 << 22))
        self._clients.append(client)
        return client

    async def settled(self, condition: Callable[[], bool]) -> None:
        """Wait until the relay's own state is as wanted."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.001)

    async def counted(self, requests: int) -> None:
        """Wait until the relay has taken that many requests."""
        await self.settled(lambda: self.relay.counters().requests >= requests)

    async def stop(self) -> None:
        for client in self._clients:
            client.reset()
        self.relay.abort()
        self._server.close()
        await self.user.stop()


def without_date(head: bytes) -> bytes:
    """A response head whose Date is a dash, to compare the rest byte for byte."""
    return re.sub(rb"\r\nDate: [A-Z][a-z]{2}, [0-9A-Za-z :]+ GMT\r\n", b"\r\nDate: -\r\n", head)
