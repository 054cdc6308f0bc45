"""A server of HTTP/2 that says exactly what a test tells it, frame by frame."""

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM, END_HEADERS = 0x1, 0x4


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 1) -> bytes:
    head = struct.pack("!BHBBI", len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream)
    return head + payload


def settings() -> bytes:
    return frame(SETTINGS, stream=0)


def block(*fields: tuple[str, str]) -> bytes:
    """All of it in literals with new names."""
    out = b""
    for name, value in fields:
        out += b"\0" + bytes([len(name)]) + name.encode()
        out += bytes([len(value)]) + value.encode()
    return out


def headers(*fields: tuple[str, str], end: bool = False) -> bytes:
    return frame(HEADERS, block(*fields), END_HEADERS | (END_STREAM if end else 0))


def literals(data: bytes) -> list[tuple[str, str]]:
    """Fields of a block as the prober writes it: literals with new names, no Huffman code."""
    fields = []
    while data:
        assert data[0] == 0
        data = data[1:]
        pair = []
        for _ in range(2):
            length, at = data[0], 1
            assert length < 128
            if length == 127:
                shift = 0
                while True:
                    length += (data[at] & 0x7F) << shift
                    shift += 7
                    at += 1
                    if data[at - 1] < 128:
                        break
            pair.append(data[at : at + length].decode())
            data = data[at + length :]
        fields.append((pair[0], pair[1]))
    return fields


class Conversation:
    """One connection: what came, and what is said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.fields: list[tuple[str, str]] = []
        self.body = b""
        self.others: list[tuple[int, int, bytes]] = []

    def field(self, name: str) -> str | None:
        return dict(self.fields).get(name)

    async def request(self) -> None:
        """Read up to the end of the request on stream 1."""
        assert await self.reader.readexactly(len(PREFACE)) == PREFACE
        header_block = b""
        ended = whole = False
        while not (ended and whole):
            kind, flags, stream, payload = await self.frame()
            if kind in (HEADERS, CONTINUATION):
                assert stream == 1
                header_block += payload
                whole = bool(flags & END_HEADERS)
                if whole:
                    self.fields = literals(header_block)
            elif kind == DATA:
                self.body += payload
            else:
                self.others.append((kind, flags, payload))
            if kind in (HEADERS, DATA) and flags & END_STREAM:
                ended = True

    async def frame(self) -> tuple[int, int, int, bytes]:
        high, low, kind, flags, stream = struct.unpack("!BHBBI", await self.reader.readexactly(9))
        return kind, flags, stream, await self.reader.readexactly(high << 16 | low)

    def say(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))


Answer = Callable[[Conversation], Awaitable[None]]


def saying(*frames: bytes) -> Answer:
    """Settings, then these."""

    async def answer(conversation: Conversation) -> None:
        conversation.say(settings(), *frames)

    return answer


class Http2Server:
    """Gives the answers in turn, one for each connection; the last one again and again."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.conversations: list[Conversation] = []
        self._server: asyncio.Server | None = None
        self.port = 0

    async def __aenter__(self) -> "Http2Server":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for conversation in self.conversations:
            conversation.writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = Conversation(reader, writer)
        self.conversations.append(conversation)
        answer = self._answers[min(len(self.conversations), len(self._answers)) - 1]
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await conversation.request()
            await answer(conversation)
            await reader.read(-1)
        writer.close()
