"""A broker that says what a test tells it to, byte by byte, in either version of MQTT."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from tests.broker.harness import free_port

Script = Callable[["Talk"], Awaitable[None]]


def packet(kind: int, body: bytes) -> bytes:
    """With its first byte and its length."""
    size, length = b"", len(body)
    while True:
        size += bytes([length & 0x7F | (0x80 if length > 0x7F else 0)])
        length >>= 7
        if not length:
            return bytes([kind]) + size + body


class Talk:
    """One connection to it. `acknowledged`: packet ids of the client's PUBACKs, in order."""

    def __init__(
        self, version: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._five, self._reader, self.writer = version == "5", reader, writer
        self.acknowledged: list[int] = []
        self.written = 0
        self.stuck_since = 0.0

    async def next_packet(self) -> tuple[int, bytes]:
        """Raises IncompleteReadError when the client has gone."""
        kind = (await self._reader.readexactly(1))[0]
        length = shift = 0
        while True:
            byte = (await self._reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        body = await self._reader.readexactly(length)
        if kind == 0x40:
            self.acknowledged.append(int.from_bytes(body[:2], "big"))
        return kind, body

    async def until_subscribed(self) -> bytes:
        """CONNECT, our CONNACK, SUBSCRIBE; returns the SUBACK that is to be sent."""
        await self.next_packet()
        self.writer.write(self.connack())
        while True:
            kind, body = await self.next_packet()
            if kind == 0x82:
                return packet(0x90, body[:2] + (b"\0\1" if self._five else b"\1"))

    async def established(self) -> None:
        self.writer.write(await self.until_subscribed())

    def connack(self, *, present: bool = False) -> bytes:
        return packet(0x20, bytes([present, 0]) + (b"\0" if self._five else b""))

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, number: int = 1) -> bytes:
        body = len(topic).to_bytes(2, "big") + topic.encode()
        if qos:
            body += number.to_bytes(2, "big")
        return packet(0x30 | qos << 1, body + (b"\0" if self._five else b"") + payload)

    async def flood(self, data: bytes) -> None:
        """Returns when the client has taken it, as far as TCP tells."""
        self.writer.write(data)
        self.stuck_since = asyncio.get_running_loop().time()
        await self.writer.drain()
        self.stuck_since = 0.0
        self.written += len(data)

    def stuck(self, seconds: float) -> bool:
        """Whether the client has taken nothing for so long."""
        now = asyncio.get_running_loop().time()
        return self.stuck_since > 0.0 and now - self.stuck_since > seconds

    async def listen(self) -> None:
        """Read, and answer pings, until the client goes."""
        while True:
            kind, _ = await self.next_packet()
            if kind == 0xC0:
                self.writer.write(b"\xd0\x00")


class HostileBroker:
    """Listens while in its `async with`; `script` is run for every connection."""

    def __init__(self, version: str, script: Script, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.talks: list[Talk] = []
        self._version, self._script = version, script
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for talk in self.talks:
            talk.writer.transport.abort()

    async def __aenter__(self) -> HostileBroker:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(1 << 16)
        talk = Talk(self._version, reader, writer)
        self.talks.append(talk)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await self._script(talk)
        writer.transport.abort()
