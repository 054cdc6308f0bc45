"""What aiohttp can't carry through the test gateway: upgraded connections, and streams of HTTP/2.

Owns how bytes and streams are copied; where they go is asked of the gateway. One connection to the
backend for each upgraded connection and each stream.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from h2.connection import ConnectionInputs, ConnectionState

PREFACE = b"PRI * HTTP/2.0\r\n\r\n"
Fields = list[tuple[str, str]]


@dataclass(frozen=True)
class Way:
    """A backend, and the header fields that a request gets on its way to it, by lower-case name."""

    address: str
    port: int
    fields: Mapping[str, str]


Choose = Callable[[str, str, Mapping[str, str], str], Way | str]
"""From host, path, header fields and the client's address: a backend, or why there is none."""
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Front(asyncio.Protocol):
    """A connection whose first bytes decide who serves it: `ordinary` is aiohttp's factory."""

    def __init__(self, ordinary: Callable[[], Any], choose: Choose) -> None:
        self._ordinary = ordinary
        self._choose = choose
        self._data = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        if len(self._data) < len(PREFACE) and PREFACE.startswith(self._data):
            return
        head, end, _ = self._data.partition(b"\r\n\r\n")
        if self._data.startswith(PREFACE):
            self._hand_over(self._stream(self._serve_http2))
        elif end and b"\r\nupgrade:" in head.lower():
            self._hand_over(self._stream(self._tunnel))
        else:
            self._hand_over(self._ordinary())

    def _hand_over(self, protocol: Any) -> None:
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        protocol.data_received(self._data)

    @staticmethod
    def _stream(handler: Handler) -> asyncio.Protocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), handler)

    async def _serve_http2(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        client = End(reader, writer, client=False)
        client.opened = lambda stream: _forward(client, stream, self._choose)
        try:
            await client.pump()
        finally:
            writer.close()

    async def _tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await _tunnel(reader, writer, self._choose)
        finally:
            writer.close()


# --- upgraded connections ---------------------------------------------------------------------


async def _tunnel(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, choose: Choose
) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")[:-2]
    fields = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    way = choose(fields.get("host", ""), first.split(" ")[1], fields, _peer(writer))
    if isinstance(way, str):
        writer.write(f"HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n{way}\n".encode())
        return
    try:
        inner, backend = await asyncio.open_connection(way.address, way.port)
    except OSError as error:
        writer.write(f"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n{error}\n".encode())
        return
    fields |= way.fields
    lines = [first, *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    backend.write("\r\n".join(lines).encode("latin-1"))
    await _both(_copy(reader, backend), _copy(inner, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _both(*ways: Awaitable[None]) -> None:
    """Until both have ended: each ends the other's connection."""
    await asyncio.gather(*ways)


def _peer(writer: asyncio.StreamWriter) -> str:
    name = writer.get_extra_info("peername")
    return str(name[0]) if name else ""


# --- streams ----------------------------------------------------------------------------------


_TOLD_TO_GO = (ConnectionState.CLIENT_OPEN, ConnectionInputs.RECV_GOAWAY)


def client_connection(encoding: str) -> h2.connection.H2Connection:
    """With h2 a GOAWAY ends a connection, but the streams that are open go on (RFC 9113, 6.8)."""
    config = h2.config.H2Configuration(header_encoding=encoding)
    connection = h2.connection.H2Connection(config)
    machine = connection.state_machine
    machine._transitions = {**machine._transitions, _TOLD_TO_GO: (None, _TOLD_TO_GO[0])}
    return connection


class End:
    """One HTTP/2 connection; what comes on a stream goes into its inbox. `pump` it."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, client: bool
    ) -> None:
        config = h2.config.H2Configuration(client_side=False, header_encoding="latin-1")
        server = h2.connection.H2Connection(config)
        self.connection = client_connection("latin-1") if client else server
        self.connection.initiate_connection()
        self.inboxes: dict[int, asyncio.Queue[Any]] = {}
        self.opened: Callable[[int], Awaitable[None]] | None = None
        self.writer = writer
        self._reader = reader
        self._window = asyncio.Event()
        self._tasks: set[asyncio.Future[None]] = set()
        self.flush()

    def flush(self) -> None:
        if not self.writer.is_closing():
            self.writer.write(self.connection.data_to_send())

    def inbox(self, stream: int) -> "asyncio.Queue[Any]":
        return self.inboxes.setdefault(stream, asyncio.Queue())

    async def pump(self) -> None:
        """Read until the connection ends; every stream is reset then."""
        with contextlib.suppress(ConnectionError, h2.exceptions.ProtocolError):
            while data := await self._reader.read(1 << 16):
                for event in self.connection.receive_data(data):
                    self._take(event)
                self.flush()
        for inbox in self.inboxes.values():
            inbox.put_nowait(None)
        self._window.set()

    def _take(self, event: h2.events.Event) -> None:
        stream = getattr(event, "stream_id", 0) or 0
        match event:
            case h2.events.RequestReceived() if self.opened is not None:
                self.inbox(stream).put_nowait(event)
                task = asyncio.ensure_future(self.opened(stream))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                self._window.set()
            case h2.events.StreamReset():
                self.inbox(stream).put_nowait(None)
                self._window.set()
            case (
                h2.events.ResponseReceived()
                | h2.events.TrailersReceived()
                | h2.events.DataReceived()
                | h2.events.StreamEnded()
            ):
                self.inbox(stream).put_nowait(event)

    async def data(self, stream: int, data: bytes) -> None:
        while data:
            room = min(
                self.connection.local_flow_control_window(stream),
                self.connection.max_outbound_frame_size,
            )
            if not room:
                self._window.clear()
                await self._window.wait()
                continue
            self.connection.send_data(stream, data[:room])
            data = data[room:]
            self.flush()


async def _forward(client: End, stream: int, choose: Choose) -> None:
    request = await client.inbox(stream).get()
    fields = dict(request.headers)
    host, path = fields.get(":authority", ""), fields.get(":path", "/")
    way = choose(host, path, fields, _peer(client.writer))
    if isinstance(way, str):
        client.connection.send_headers(stream, [(":status", "404")], end_stream=True)
        client.flush()
        return
    more = dict(way.fields)
    pseudo = {**{k: v for k, v in fields.items() if k[0] == ":"}, ":authority": more.pop("host")}
    kept = [pair for pair in request.headers if pair[0][0] != ":" and pair[0] not in more]
    reader, writer = await asyncio.open_connection(way.address, way.port)
    backend = End(reader, writer, client=True)
    pumping = asyncio.ensure_future(backend.pump())
    try:
        backend.connection.send_headers(1, [*pseudo.items(), *kept, *more.items()])
        backend.flush()
        up = asyncio.ensure_future(_pass_on(client, stream, backend, 1))
        await _pass_on(backend, 1, client, stream)
        up.cancel()
    finally:
        writer.close()
        await pumping


async def _pass_on(source: End, number: int, target: End, stream: int) -> None:
    """Everything of one direction of a stream, up to its end or its reset."""
    with contextlib.suppress(h2.exceptions.ProtocolError):
        while True:
            event = await source.inbox(number).get()
            connection = target.connection
            match event:
                case None:
                    connection.reset_stream(stream, 2)
                case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                    ended = event.stream_ended is not None
                    connection.send_headers(stream, list(event.headers or ()), end_stream=ended)
                case h2.events.DataReceived():
                    await target.data(stream, event.data or b"")
                    size = event.flow_controlled_length or 0
                    source.connection.acknowledge_received_data(size, number)
                    source.flush()
                case h2.events.StreamEnded():
                    with contextlib.suppress(h2.exceptions.StreamClosedError):
                        connection.end_stream(stream)
            target.flush()
            if event is None or isinstance(event, h2.events.StreamEnded):
                return
