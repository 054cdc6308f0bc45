"""HTTP/2 by prior knowledge, from both ends: a client that says what it is told, a user container
that does what a scenario says.

Frames and HPACK are the h2 package's; what is sent and when is the scenario's, so nothing is
validated or put in order on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from tests.relay.rig import PATIENCE

Fields = list[tuple[str, str]]
WINDOW = 65535


@dataclass
class Answer:
    """All that came on a stream.

    `reset` is an error code, -1 when the connection was lost, -2 when what came was against the
    protocol: a body shorter or longer than its length, say.
    """

    fields: Fields = field(default_factory=list)
    interim: list[Fields] = field(default_factory=list)
    body: bytes = b""
    trailers: Fields = field(default_factory=list)
    reset: int | None = None


class Stream:
    """One request and its response, seen from one side."""

    def __init__(self, side: Side, number: int) -> None:
        self.side = side
        self.number = number
        self.got = Answer()
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.more = asyncio.Event()

    async def headers(self, fields: Fields, *, end: bool = False) -> None:
        self.side.connection.send_headers(self.number, fields, end_stream=end)
        await self.side.flush()

    async def data(self, data: bytes, *, end: bool = False) -> None:
        """As the other side's windows allow."""
        connection = self.side.connection
        while True:
            room = min(
                connection.local_flow_control_window(self.number),
                connection.max_outbound_frame_size,
            )
            if room or not data:
                piece, data = data[:room], data[room:]
                connection.send_data(self.number, piece, end_stream=end and not data)
                await self.side.flush()
                if not data:
                    return
            else:
                await self.side.window()

    async def reset(self, code: int) -> None:
        self.side.connection.reset_stream(self.number, code)
        await self.side.flush()

    async def head(self) -> Fields:
        """The final head, or nothing if it never comes."""
        async with asyncio.timeout(PATIENCE):
            await self.begun.wait()
        return self.got.fields

    async def all(self) -> Answer:
        async with asyncio.timeout(PATIENCE):
            await self.ended.wait()
        return self.got

    async def until(self, size: int) -> bytes:
        """The body so far, once it is that long (or has ended)."""
        async with asyncio.timeout(PATIENCE):
            while len(self.got.body) < size and not self.ended.is_set():
                self.more.clear()
                await self.more.wait()
        return self.got.body


class Side:
    """A connection; `pump` it in a task. New streams of the other side go to `opened`."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        client: bool,
        opened: Callable[[Stream], None] | None = None,
    ) -> None:
        config = h2.config.H2Configuration(
            client_side=client,
            header_encoding="latin-1",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
            validate_inbound_headers=False,
            normalize_inbound_headers=False,
        )
        self.connection = h2.connection.H2Connection(config)
        self.streams: dict[int, Stream] = {}
        self.lost = asyncio.Event()
        self.gone_away: int | None = None
        self._reader = reader
        self._writer = writer
        self._opened = opened
        self._window = asyncio.Event()

    async def begin(self) -> None:
        self.connection.initiate_connection()
        await self.flush()

    async def stream(self, fields: Fields, *, end: bool = True) -> Stream:
        """A request of ours."""
        stream = Stream(self, self.connection.get_next_available_stream_id())
        self.streams[stream.number] = stream
        await stream.headers(fields, end=end)
        return stream

    async def flush(self) -> None:
        with contextlib.suppress(ConnectionError):
            self._writer.write(self.connection.data_to_send())
            await self._writer.drain()

    async def window(self) -> None:
        self._window.clear()
        async with asyncio.timeout(PATIENCE):
            await self._window.wait()

    def close(self) -> None:
        self._writer.close()

    async def go_away(self) -> None:
        self.connection.close_connection()
        await self.flush()

    async def pump(self) -> None:
        """Read until the connection ends."""
        why = -1
        try:
            with contextlib.suppress(ConnectionError):
                while data := await self._reader.read(65536):
                    for event in self.connection.receive_data(data):
                        self._take(event)
                    await self.flush()
        except h2.exceptions.ProtocolError:
            why = -2
        finally:
            self.lost.set()
            for stream in self.streams.values():
                if not stream.ended.is_set():
                    stream.got.reset = why
                    self._end(stream)
            self._window.set()

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            stream = self.streams[event.stream_id] = Stream(self, event.stream_id)
            stream.got.fields = _fields(event.headers)
            stream.begun.set()
            if self._opened is not None:
                self._opened(stream)
            return
        if isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            self._window.set()
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.gone_away = int(event.error_code or 0)
        known = self.streams.get(getattr(event, "stream_id", 0) or 0)
        if known is None:
            return
        if isinstance(event, h2.events.ResponseReceived):
            known.got.fields = _fields(event.headers)
            known.begun.set()
        elif isinstance(event, h2.events.InformationalResponseReceived):
            known.got.interim.append(_fields(event.headers))
        elif isinstance(event, h2.events.DataReceived):
            known.got.body += event.data
            self.connection.acknowledge_received_data(event.flow_controlled_length, known.number)
            known.more.set()
        elif isinstance(event, h2.events.TrailersReceived):
            known.got.trailers = _fields(event.headers)
        elif isinstance(event, h2.events.StreamReset):
            known.got.reset = int(event.error_code)
            self._end(known)
        elif isinstance(event, h2.events.StreamEnded):
            self._end(known)

    @staticmethod
    def _end(stream: Stream) -> None:
        stream.begun.set()
        stream.more.set()
        stream.ended.set()


def _fields(headers: object) -> Fields:
    assert isinstance(headers, list)
    return [(str(name), str(value)) for name, value in headers]


Play = Callable[[Stream], Awaitable[None]]


class Http2User:
    """A user container of HTTP/2 only. `on("/path", play)`; other paths answer `hello`."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.connections: list[Side] = []
        self._plays: dict[str, Play] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def on(self, path: str, play: Play) -> None:
        self._plays[path] = play

    async def start(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._serve, sock=listener)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side = Side(reader, writer, client=False, opened=self._opened)
        self.connections.append(side)
        await side.begin()
        try:
            await side.pump()
        finally:
            writer.close()

    def _opened(self, stream: Stream) -> None:
        self.streams.append(stream)
        path = dict(stream.got.fields).get(":path", "").partition("?")[0]
        task = asyncio.create_task(self._answer(stream, self._plays.get(path, hello)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _answer(stream: Stream, play: Play) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError, TimeoutError):
            await play(stream)


async def hello(stream: Stream) -> None:
    await stream.all()
    await stream.headers([(":status", "200"), ("content-type", "text/plain")])
    await stream.data(b"hello", end=True)
