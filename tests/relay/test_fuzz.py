"""The relay between two transports that are not there: any split of the streams gives the same
result, and garbage closes connections instead of breaking the process."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.relay.rig import without_date
from weir.proxy.contract import RevisionSettings
from weir.proxy.relay import Relay
from weir.proxy.wire.body import ChunkedBody
from weir.proxy.wire.connection import Connection
from weir.proxy.wire.dial import dial_here
from weir.proxy.wire.protocol import as_protocol

many = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


class Wire(asyncio.Transport):
    """Collects what is written; closing tells the protocol on the spot."""

    def __init__(self, protocol: asyncio.Protocol, sock: socket.socket) -> None:
        super().__init__()
        self.protocol = protocol
        self.sock = sock
        self.written = bytearray()
        self.closing = False
        protocol.connection_made(self)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.sock if name == "socket" else ("10.0.0.9", 4711)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = cast(asyncio.Protocol, protocol)

    def write(self, data: Any) -> None:
        self.written += data

    def writelines(self, list_of_data: Any) -> None:
        self.written += b"".join(list_of_data)

    def write_eof(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self.protocol.connection_lost(None)

    abort = close


class Bench:
    """A relay with one client wire, and an idle connection to the user container in stock."""

    def __init__(self, sock: socket.socket, limit: int = 0) -> None:
        self.sock = sock
        settings = RevisionSettings(user_port=1, container_concurrency=limit)
        self.relay = Relay(settings, dial=dial_here, prober=Always())
        self.client = Wire(self.relay.protocol(), sock)
        self.user: list[Wire] = []

    def stock(self) -> None:
        """Let the relay find a connection instead of dialling."""
        upstream = self.relay._user
        if not len(upstream._pool):
            connection = Connection(upstream._gone)
            self.user.append(Wire(as_protocol(connection), self.sock))
            upstream.put(connection, self.relay._clock())

    def say(self, data: bytes) -> None:
        if not self.client.closing:
            self.stock()
            self.client.protocol.data_received(data)

    def asked(self) -> Wire | None:
        """The wire of a request that was sent whole and waits for its response."""
        for wire in self.user:
            exchange = wire.protocol._asker  # type: ignore[attr-defined]
            if exchange is not None and exchange._ended:
                return wire
        return None

    def answer(self, pieces: Callable[[], list[bytes]]) -> None:
        while (wire := self.asked()) is not None:
            for piece in pieces():
                if not wire.closing:
                    self.stock()
                    wire.protocol.data_received(piece)


class Always:
    async def ready(self) -> bool:
        return True


@contextmanager
def bench(limit: int = 0) -> Iterator[Bench]:
    ours, theirs = socket.socketpair()
    made = Bench(ours, limit)
    try:
        yield made
    finally:
        made.relay.abort()
        ours.close()
        theirs.close()


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


def normal(stream: bytes) -> list[tuple[bytes, bytes, list[bytes]]]:
    """Messages of a stream, chunks put together: where they were cut is nobody's promise."""
    messages = []
    while stream:
        head, _, stream = stream.partition(b"\r\n\r\n")
        head = without_date(head + b"\r\n\r\n")
        body, trailers = b"", list[bytes]()
        if b"Transfer-Encoding: chunked" in head:
            reader = ChunkedBody()
            body, rest = reader.feed(stream)
            assert rest is not None, "a chunked body without end"
            stream, trailers = rest, reader.trailers
        else:
            length = next(
                (
                    int(line[15:])
                    for line in head.split(b"\r\n")
                    if line.startswith(b"Content-Length:")
                ),
                0,
            )
            body, stream = stream[:length], stream[length:]
        messages.append((head, body, trailers))
    return messages


header = st.sampled_from(
    [
        b"X-Forwarded-For: 1.2.3.4\r\n",
        b"X-Forwarded-Proto: https\r\n",
        b"Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\n",
        b"K-Original-Host: other\r\n",
        b"Ce-Id: 4711\r\n",
        b"Knative-Serving-Revision: r\r\n",
    ]
)
payload = st.binary(max_size=60)


@st.composite
def body(draw: st.DrawFn) -> bytes:
    """Framing fields, end of the head, body."""
    kind = draw(st.sampled_from(["none", "length", "chunked"]))
    if kind == "none":
        return b"Content-Length: 0\r\n\r\n"
    if kind == "length":
        data = draw(payload)
        return b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
    chunks = draw(st.lists(st.binary(min_size=1, max_size=30), max_size=4))
    trailer = draw(st.sampled_from([b"", b"X-T: v\r\n"]))
    framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"Transfer-Encoding: chunked\r\n\r\n%s0\r\n%s\r\n" % (framed, trailer)


@st.composite
def a_request(draw: st.DrawFn) -> bytes:
    fields = b"".join(draw(st.lists(header, max_size=3, unique=True)))
    method = draw(st.sampled_from([b"GET", b"POST", b"PUT"]))
    return method + b" /p HTTP/1.1\r\nHost: h\r\n" + fields + draw(body())


@st.composite
def a_response(draw: st.DrawFn) -> bytes:
    interim = draw(st.sampled_from([b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"]))
    status = draw(st.sampled_from([b"200 OK", b"404 Not Found", b"503 Nope"]))
    return interim + b"HTTP/1.1 " + status + b"\r\nServer: s\r\n" + draw(body())


def exchange(request_pieces: list[bytes], response_pieces: list[bytes]) -> tuple[Any, Any]:
    """What the user container and the client got, in the end."""
    with bench() as made:
        for piece in request_pieces:
            made.say(piece)
            made.answer(lambda: response_pieces)
        assert made.relay.counters().in_flight == 0
        received = b"".join(bytes(wire.written) for wire in made.user)
        return normal(received), normal(bytes(made.client.written))


cuts = st.lists(st.integers(0, 5000), max_size=40)


async def test_any_split_of_requests_and_responses_gives_the_same_result() -> None:
    @many
    @given(st.lists(a_request(), min_size=1, max_size=4), a_response(), cuts, cuts)
    def check(
        requests: list[bytes], response: bytes, request_cuts: list[int], response_cuts: list[int]
    ) -> None:
        stream = b"".join(requests)
        whole = exchange([stream], [response])
        assert len(whole[0]) == len(requests)
        assert exchange(split(stream, request_cuts), split(response, response_cuts)) == whole

    check()


async def test_byte_by_byte_is_a_split_as_well() -> None:
    @settings(many, max_examples=30)
    @given(st.lists(a_request(), min_size=1, max_size=3), a_response())
    def check(requests: list[bytes], response: bytes) -> None:
        stream = b"".join(requests)
        bytewise = exchange(
            [bytes([byte]) for byte in stream], [bytes([byte]) for byte in response]
        )
        assert bytewise == exchange([stream], [response])

    check()


def damaged(message: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A message with some bytes replaced, dropped or doubled."""

    def damage(data: bytes, places: list[tuple[int, bytes, int]]) -> bytes:
        for place, junk, drop in places:
            at = place % (len(data) + 1)
            data = data[:at] + junk + data[at + drop :]
        return data

    place = st.tuples(st.integers(0, 5000), st.binary(max_size=3), st.integers(0, 3))
    return st.builds(damage, message, st.lists(place, min_size=1, max_size=4))


async def test_damaged_and_random_requests_break_nothing() -> None:
    @many
    @given(st.one_of(st.binary(max_size=200), damaged(a_request())), cuts)
    def check(stream: bytes, where: list[int]) -> None:
        with bench() as made:
            for piece in split(stream, where):
                made.say(piece)
                made.answer(lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"])
            if not made.client.closing:
                made.client.protocol.eof_received()
            made.client.close()
            assert made.relay.counters().in_flight == 0
            assert made.relay.counters().connections == 0

    check()


async def test_damaged_and_random_responses_break_nothing() -> None:
    @many
    @given(st.one_of(st.binary(max_size=200), damaged(a_response())), cuts)
    def check(stream: bytes, where: list[int]) -> None:
        with bench() as made:
            made.say(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx")
            wire = made.asked()
            assert wire is not None
            for piece in split(stream, where):
                if not wire.closing:
                    wire.protocol.data_received(piece)
            wire.close()
            assert made.relay.counters().in_flight == 0

    check()


async def test_where_a_damaged_stream_is_cut_decides_nothing() -> None:
    """However the client's bytes are damaged, where the network cut them decides nothing: no
    request is smuggled in between two others by arriving in another piece."""

    @many
    @given(damaged(st.lists(a_request(), min_size=2, max_size=3).map(b"".join)), cuts)
    def check(stream: bytes, where: list[int]) -> None:
        assert served([stream]) == served(split(stream, where))

    check()


def served(pieces: list[bytes]) -> int:
    """How many requests of the stream got their response."""
    with bench() as made:
        for piece in pieces:
            made.say(piece)
            made.answer(lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"])
        return made.relay.counters().statuses[1]


async def test_a_connection_that_is_accepted_but_not_made_yet_can_be_closed() -> None:
    """The loop makes a protocol first and tells it of its transport later; a drain may be first."""
    for close in (Relay.close_idle, Relay.abort):
        with bench() as made:
            protocol = made.relay.protocol()
            close(made.relay)
            wire = Wire(protocol, made.sock)
            assert wire.closing
            assert made.relay.counters().connections == 0
