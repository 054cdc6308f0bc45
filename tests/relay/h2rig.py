"""Both ends of HTTP/2 by hand: frames as a test says, headers by the `hpack` package.

The client talks to the relay of a Rig; the user container is a scripted server with prior
knowledge. Nothing of Weir's own HTTP/2 is used, so a mistake is not made twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import hpack

from tests.relay.rig import PATIENCE, Closed

DATA, HEADERS, PRIORITY, RST, SETTINGS = 0, 1, 2, 3, 4
PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL = 5, 6, 7, 8
COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 9, 11

Fields = list[tuple[str, str]]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def window(stream: int, more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", more))


def reset(stream: int, code: int = CANCEL) -> bytes:
    return frame(RST, 0, stream, struct.pack(">I", code))


def request(path: str = "/", method: str = "GET", *more: tuple[str, str]) -> Fields:
    pseudo = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "a.b")]
    return [*pseudo, *more]


@dataclass
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def code(self) -> int:
        """Of an RST_STREAM or a GOAWAY."""
        at = 4 if self.kind == GOAWAY else 0
        return int(struct.unpack_from(">I", self.payload, at)[0])


@dataclass
class Message:
    """A request or response that was put together again."""

    heads: list[dict[str, str]] = field(default_factory=list)
    fields: list[Fields] = field(default_factory=list)
    body: bytes = b""
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        return int(self.final[":status"])

    @property
    def final(self) -> dict[str, str]:
        return next(head for head in self.heads if head.get(":status", "200") >= "200")

    @property
    def trailers(self) -> dict[str, str]:
        return self.heads[-1] if ":status" not in self.heads[-1] else {}

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None


class Speaker:
    """One end of a connection. `answering`: pings and settings are acknowledged by themselves."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.messages: dict[int, Message] = {}
        self.frames: list[Frame] = []
        self.answering = True
        self.credits = True
        self.goaway: Frame | None = None
        self._block = b""

    def send(self, *data: bytes) -> None:
        if not self.writer.is_closing():
            self.writer.write(b"".join(data))

    def headers(self, stream: int, fields: Fields, ended: bool = False) -> bytes:
        flags = END_HEADERS | (END_STREAM if ended else 0)
        return frame(HEADERS, flags, stream, self.encoder.encode(fields))

    def data(self, stream: int, piece: bytes, ended: bool = False) -> bytes:
        return frame(DATA, END_STREAM if ended else 0, stream, piece)

    async def frame(self) -> Frame:
        """The next frame, put together into its message as well. Raises Closed."""
        try:
            async with asyncio.timeout(PATIENCE):
                head = await self.reader.readexactly(9)
                size = int.from_bytes(head[:3], "big")
                payload = await self.reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Closed(repr(error)) from None
        got = Frame(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
        self.frames.append(got)
        self._take(got)
        return got

    def _take(self, got: Frame) -> None:
        message = self.messages.setdefault(got.stream, Message()) if got.stream else Message()
        if got.kind in (HEADERS, CONTINUATION):
            self._block += got.payload
            if got.flags & END_HEADERS:
                decoded = self.decoder.decode(self._block)
                self._block = b""
                fields = [(str(name), str(value)) for name, value in decoded]
                message.fields.append(fields)
                message.heads.append(dict(fields))
            if got.kind == HEADERS and got.flags & END_STREAM:
                message.ended = True
        elif got.kind == DATA:
            message.body += got.payload
            message.ended = message.ended or bool(got.flags & END_STREAM)
            if self.credits and got.payload:
                self.send(window(0, len(got.payload)), window(got.stream, len(got.payload)))
        elif got.kind == RST:
            message.reset = got.code
        elif got.kind == GOAWAY:
            self.goaway = got
        elif got.kind == SETTINGS and not got.flags & ACK and self.answering:
            self.send(frame(SETTINGS, ACK, 0))
        elif got.kind == PING and not got.flags & ACK and self.answering:
            self.send(frame(PING, ACK, 0, got.payload))

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.frame()

    async def message(self, stream: int) -> Message:
        """The whole message of a stream, or what came of it before its reset."""
        await self.until(lambda: stream in self.messages and self.messages[stream].over)
        return self.messages[stream]

    async def closed(self) -> Frame | None:
        """Read until the other side closes; its GOAWAY, if it said one."""
        with contextlib.suppress(Closed):
            while True:
                await self.frame()
        return self.goaway

    def abort(self) -> None:
        self.writer.transport.abort()


class Client(Speaker):
    def begin(self, *pairs: tuple[int, int]) -> None:
        self.send(PREFACE, settings(*pairs))

    def ask(self, stream: int, fields: Fields, body: bytes | None = None) -> None:
        if body is None:
            self.send(self.headers(stream, fields, True))
        else:
            self.send(self.headers(stream, fields), self.data(stream, body, True))

    async def get(self, stream: int, *more: tuple[str, str], path: str = "/") -> Message:
        self.ask(stream, request(path, "GET", *more))
        return await self.message(stream)


Answer = Callable[[Speaker, int, Message], Awaitable[None]]


class Server:
    """A user container with prior knowledge. `on(path, answer)`; others are told what came."""

    def __init__(self) -> None:
        self.port = 0
        self.connections: list[Speaker] = []
        self.requests: list[Message] = []
        self.settings: list[tuple[int, int]] = []
        self.credits = True
        self.ended = 0
        self._answers: dict[str, tuple[Answer, bool]] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Future[None]] = set()

    def on(self, path: str, answer: Answer, *, early: bool = False) -> None:
        """`early`: as soon as the head is there."""
        self._answers[path] = (answer, early)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for speaker in self.connections:
            speaker.abort()
        for task in list(self._tasks):
            task.cancel()

    async def received(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.requests) < count:
                await asyncio.sleep(0.002)

    async def was_reset(self, number: int) -> None:
        """Until the client gave up that request."""
        async with asyncio.timeout(PATIENCE):
            while self.requests[number].reset is None:
                await asyncio.sleep(0.002)

    async def gone(self, count: int) -> None:
        """Until that many connections have ended, from the other side or ours."""
        async with asyncio.timeout(PATIENCE):
            while self.ended < count:
                await asyncio.sleep(0.002)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        speaker = Speaker(reader, writer)
        speaker.credits = self.credits
        self.connections.append(speaker)
        begun: set[int] = set()
        with contextlib.suppress(Closed, asyncio.IncompleteReadError, asyncio.CancelledError):
            assert await reader.readexactly(len(PREFACE)) == PREFACE
            speaker.send(settings(*self.settings))
            while True:
                got = await speaker.frame()
                message = speaker.messages.get(got.stream)
                if message is None or got.stream in begun or not message.heads:
                    continue
                answer, early = self._answers.get(message.heads[0][":path"], (told, False))
                if message.ended or early:
                    begun.add(got.stream)
                    self.requests.append(message)
                    task = asyncio.ensure_future(answer(speaker, got.stream, message))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        writer.close()
        self.ended += 1


async def told(speaker: Speaker, stream: int, message: Message) -> None:
    """200, and the body that came."""
    head: Fields = [(":status", "200"), ("content-type", "text/plain")]
    speaker.send(speaker.headers(stream, head), speaker.data(stream, message.body, True))


async def never(speaker: Speaker, stream: int, message: Message) -> None:
    """No answer."""
