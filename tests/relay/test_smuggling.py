"""No request hides behind another one: what the user container reads is what was one request to us.

Attacks are put together from the fragments that smugglers use, in front of a request that must not
get through on its own. The relay stands between two wires (tests/relay/test_fuzz.py); what came
out of it is read by llhttp's and by aiohttp's own parser, neither of which frames for the relay.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import httptools
import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParserPy
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.relay.test_fuzz import Bench, bench, cuts, damaged, many, split
from weir.proxy.contract import FAILURE_CLIENT
from weir.proxy.exchange import Client, Exchange, Head

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"
AFTER = b"GET /after HTTP/1.1\r\nHost: h\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Message(NamedTuple):
    method: bytes
    target: bytes
    body: bytes


class Reading:
    """llhttp's view of a stream: its whole messages, and whether it broke."""

    def __init__(self, stream: bytes) -> None:
        self.messages: list[Message] = []
        self.broken = False
        self._target = self._body = b""
        self._parser = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(stream)
        except httptools.HttpParserUpgrade:
            pass  # the message is complete; what follows is none
        except httptools.HttpParserError:
            self.broken = True

    def on_message_begin(self) -> None:
        self._target = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.messages.append(Message(self._parser.get_method(), self._target, self._body))


def counted_by_aiohttp(stream: bytes) -> int:
    """How many heads aiohttp finds. Raises HttpProcessingError."""
    loop = asyncio.get_running_loop()
    parser = HttpRequestParserPy(BaseProtocol(loop), loop, 1 << 16)
    messages, _, _ = parser.feed_data(stream)
    return len(messages)


class Witness:
    """Observes the relay: the requests as it understood them."""

    def __init__(self) -> None:
        self.begun_: list[Exchange] = []
        self.over_: list[Exchange] = []

    def begun(self, exchange: Exchange) -> None:
        self.begun_.append(exchange)

    def over(self, exchange: Exchange, now: float) -> None:
        self.over_.append(exchange)

    def probed(self, client: Client, head: Head, status: int, size: int, seconds: float) -> None:
        raise AssertionError("no probe was sent")


def known_to_llhttp(exchange: Exchange) -> bool:
    """Not all that may be passed on is: any token is a method, and Go lets bytes be in a target."""
    return exchange.head.method in (b"GET", b"POST") and exchange.head.target.isascii()


class Told(NamedTuple):
    """What became of a client's stream."""

    client: bytes
    user: list[bytes]
    witness: Witness
    done: bool


def tell(pieces: list[bytes]) -> Told:
    """A client says this, and then one more request that is beyond reproach."""
    witness = Witness()
    with bench() as made:
        made.relay.observers.append(witness)
        for piece in pieces:
            _step(made, piece)
        answered = bytes(made.client.written)
        _step(made, AFTER)
        done = bytes(made.client.written) == answered
        return Told(answered, [bytes(wire.written) for wire in made.user], witness, done)


def _step(made: Bench, piece: bytes) -> None:
    made.say(piece)
    made.answer(lambda: [OK])


def bytewise(stream: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in stream]


POST = b"POST /p HTTP/1.1\r\nHost: h\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"

REFUSED: dict[str, bytes] = {
    # which of two lengths?
    "two different lengths": POST + b"Content-Length: 4\r\nContent-Length: 0\r\n\r\nabcd",
    "the same length twice": POST + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": POST + b"Content-Length: 4, 4\r\n\r\nabcd",
    "an empty length": POST + b"Content-Length: \r\n\r\n",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "a signed length": POST + b"Content-Length: +4\r\n\r\nabcd",
    "a hexadecimal length": POST + b"Content-Length: 0x4\r\n\r\nabcd",
    "a length with a blank inside": POST + b"Content-Length: 1 0\r\n\r\n0123456789",
    "a length with an underscore": POST + b"Content-Length: 1_0\r\n\r\n0123456789",
    "a length of Arabic digits": POST + "Content-Length: ٤\r\n\r\nabcd".encode(),
    "a length of more than 64 bits": POST + b"Content-Length: 18446744073709551617\r\n\r\na",
    # a length or a coding?
    "a length beside a coding": CHUNKED + b"Content-Length: 4\r\n\r\n0\r\n\r\n",
    "a coding behind a length": POST
    + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two codings": CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked, then identity": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "identity": POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "an unknown coding": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "nearly chunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked in quotes": POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "a vertical tab before chunked": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "an empty coding": POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n",
    "a coding in HTTP/1.0": CHUNKED.replace(b"/1.1", b"/1.0") + b"\r\n0\r\n\r\n",
    # which line is it?
    "a blank before the colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a tab before the colon": POST + b"Content-Length\t: 4\r\n\r\nabcd",
    "a folded coding": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a folded length": POST + b"Content-Length:\r\n\t4\r\n\r\nabcd",
    "a folded line": POST + b"X: a\r\n Content-Length: 4\r\n\r\nabcd",
    "a first line that is folded": b"POST /p HTTP/1.1\r\n Content-Length: 4\r\nHost: h\r\n\r\nabcd",
    "a bare LF between lines": POST + b"X: a\nContent-Length: 4\r\n\r\nabcd",
    "a bare CR between lines": POST + b"X: a\rContent-Length: 4\r\n\r\nabcd",
    "a bare LF behind the request line": b"POST /p HTTP/1.1\nHost: h\r\n\r\n",
    "a bare LF as the end of the head": POST + b"Content-Length: 0\r\n\n" + b"\r\n\r\n",
    "CR CR LF": POST + b"X: a\r\r\nContent-Length: 4\r\n\r\nabcd",
    "a NUL in a value": POST + b"X: a\0b\r\n\r\n",
    "a NUL in a name": POST + b"Content-Length\0: 4\r\n\r\nabcd",
    "a NUL before a value": POST + b"Content-Length: \x004\r\n\r\nabcd",
    "a name that is no token": POST + b"Content Length: 4\r\n\r\nabcd",
    "a name outside ASCII": POST + b"Content-Length\xff: 4\r\n\r\nabcd",
    "a line without a colon": POST + b"Content-Length\r\n\r\n",
    "a line without a name": POST + b": 4\r\n\r\n",
    # which request is it?
    "two hosts": POST + b"Host: other\r\n\r\n",
    "the same host twice": POST + b"Host: h\r\n\r\n",
    "a host with a blank": b"GET / HTTP/1.1\r\nHost: h x\r\n\r\n",
    "a host with a path": b"GET / HTTP/1.1\r\nHost: h/x\r\n\r\n",
    "a host with user information": b"GET / HTTP/1.1\r\nHost: a@h\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "a target with a blank": b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n",
    "a target with a tab": b"GET /a\tHTTP/1.1\r\nHost: h\r\n\r\n",
    "a target with a NUL": b"GET /\0 HTTP/1.1\r\nHost: h\r\n\r\n",
    "two blanks": b"GET  / HTTP/1.1\r\nHost: h\r\n\r\n",
    "a blank behind the version": b"GET / HTTP/1.1 \r\nHost: h\r\n\r\n",
    "no version": b"GET /\r\nHost: h\r\n\r\n",
    "a version of two digits": b"GET / HTTP/1.10\r\nHost: h\r\n\r\n",
    "a small version": b"GET / http/1.1\r\nHost: h\r\n\r\n",
}
BROKEN_BODIES: dict[str, bytes] = {
    "no size": b"\r\n0\r\n\r\n",
    "a size that is no number": b"g\r\n",
    "a negative size": b"-1\r\na\r\n0\r\n\r\n",
    "a signed size": b"+1\r\na\r\n0\r\n\r\n",
    "a size with a prefix": b"0x1\r\na\r\n0\r\n\r\n",
    "a size with an underscore": b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "a size of 64 bits": b"8000000000000000\r\n",
    "a size that overflows to 1": b"10000000000000001\r\na\r\n0\r\n\r\n",
    "a size behind a blank": b" 1\r\na\r\n0\r\n\r\n",
    "a size before a blank and more": b"1 a\r\na\r\n0\r\n\r\n",
    "a bare LF behind the size": b"1\na\r\n0\r\n\r\n",
    "a bare CR behind the size": b"1\ra\r\n0\r\n\r\n",
    "a bare LF behind an extension": b"1;x\na\r\n0\r\n\r\n",
    "a bare LF behind the data": b"1\r\na\n0\r\n\r\n",
    "data longer than its size": b"1\r\nab\r\n0\r\n\r\n",
    "data without an end": b"1\r\na0\r\n\r\n",
    "a NUL in an extension": b"1;\0\r\na\r\n0\r\n\r\n",
    "a bare LF behind the last chunk": b"0\n\r\n",
    "a trailer that is folded": b"0\r\nX: a\r\n b\r\n\r\n",
    "a trailer with a blank before its colon": b"0\r\nX : a\r\n\r\n",
    "a trailer with a bare LF": b"0\r\nX: a\nGET / HTTP/1.1\r\n\r\n",
    "a trailer with a NUL": b"0\r\nX: \0\r\n\r\n",
    "a trailer without a colon": b"0\r\nGET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("pieces", [lambda s: [s], bytewise], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("attack", REFUSED.values(), ids=REFUSED.keys())
async def test_a_head_that_can_be_read_in_two_ways_is_refused(attack: bytes, pieces: Any) -> None:
    told = tell(pieces(attack + SMUGGLED))
    assert told.client.startswith((b"HTTP/1.1 400 Bad Request", b"HTTP/1.1 501 Not Implemented"))
    assert told.client.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in told.client
    assert told.done, "the connection went on"
    assert told.witness.begun_ == []
    assert not any(told.user)


@pytest.mark.parametrize("pieces", [lambda s: [s], bytewise], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("attack", BROKEN_BODIES.values(), ids=BROKEN_BODIES.keys())
async def test_a_chunked_body_that_breaks_ends_its_request_and_the_connection(
    attack: bytes, pieces: Any
) -> None:
    told = tell(pieces(CHUNKED + b"\r\n" + attack + SMUGGLED))
    assert told.client.startswith(b"HTTP/1.1 400 Bad Request")
    assert told.client.count(b"HTTP/1.1 ") == 1
    assert told.done, "the connection went on"
    assert [exchange.failure for exchange in told.witness.over_] in ([], [FAILURE_CLIENT])
    assert [message for user in told.user for message in Reading(user).messages] == []
    assert not any(b"smuggled" in user or b"/after" in user for user in told.user)


# --- put together at random -----------------------------------------------------------------------

line = st.sampled_from(
    [
        b"POST /p HTTP/1.1\r\n",
        b"GET /g HTTP/1.1\r\n",
        b"GET /old HTTP/1.0\r\n",
        b"POST /p  HTTP/1.1\r\n",
        b"GET /lf HTTP/1.1\n",
    ]
)
field = st.sampled_from(
    [
        b"Content-Length: 0\r\n",
        b"Content-Length: 3\r\n",
        b"Content-Length: 38\r\n",
        b"content-length:3\r\n",
        b"Content-Length : 3\r\n",
        b"Content-Length: 03\r\n",
        b"Content-Length:\t3 \r\n",
        b"Content-Length: 3, 3\r\n",
        b"Content-Length: 3\n",
        b"Transfer-Encoding: chunked\r\n",
        b"transfer-encoding:CHUNKED\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding:\r\n chunked\r\n",
        b"Transfer-Encoding: \x0bchunked\r\n",
        b"X-Transfer-Encoding: chunked\r\n",
        b"X: a\rTransfer-Encoding: chunked\r\n",
        b"X: a\nTransfer-Encoding: chunked\r\n",
        b"X: \0\r\n",
        b"Host: h\r\n",
        b"Host: other\r\n",
        b"Connection: close\r\n",
        b"Connection: keep-alive, Content-Length\r\n",
        b"Connection: Transfer-Encoding\r\n",
        b"Connection: X\r\n",
        b"Expect: 100-continue\r\n",
        b"X-Forwarded-For: 1.2.3.4\r\n",
        b" folded: x\r\n",
    ]
)
rest = st.sampled_from(
    [
        b"",
        b"abc",
        b"3\r\nabc\r\n0\r\n\r\n",
        b"0\r\n\r\n",
        b"0\r\nX: t\r\n\r\n",
        b"0\r\nHost: other\r\nX: t\r\n\r\n",
        b"3;x=y\r\nabc\r\n00\r\n\r\n",
        b"000000000000003\r\nabc\r\n0\r\n\r\n",
        b"ffffffffffffffff\r\nabc\r\n0\r\n\r\n",
        b"3\nabc\n0\n\n",
        b"0\r\n\r\n0\r\n\r\n",
        SMUGGLED,
        b"26\r\n" + SMUGGLED + b"\r\n0\r\n\r\n",
    ]
)


@st.composite
def dubious(draw: st.DrawFn) -> bytes:
    """A request as a smuggler would put it together, of which many are valid."""
    fields = draw(st.lists(field, max_size=3))
    host = draw(st.sampled_from([b"Host: h\r\n", b"Host: h\r\n", b"Host: h\r\n", b""]))
    end = draw(st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r\r\n"]))
    return draw(line) + host + b"".join(fields) + end + draw(rest)


streams = st.one_of(
    st.lists(dubious(), min_size=1, max_size=3).map(b"".join),
    damaged(st.lists(dubious(), min_size=1, max_size=2).map(b"".join)),
)


async def test_what_the_user_container_reads_is_exactly_what_was_one_request_to_us() -> None:
    passed = 0

    @many
    @given(streams, cuts)
    def check(stream: bytes, where: list[int]) -> None:
        nonlocal passed
        told = tell(split(stream, where))
        understood = told.witness.begun_
        assume(all(map(known_to_llhttp, understood)))
        readings = [Reading(user) for user in told.user]
        assert not any(reading.broken for reading in readings)
        messages = [message for reading in readings for message in reading.messages]
        whole = [exchange for exchange in understood if exchange.failure != FAILURE_CLIENT]
        assert [(m.method, m.target, len(m.body)) for m in messages] == [
            (exchange.head.method, exchange.head.target, exchange.received) for exchange in whole
        ]
        assert sum(map(counted_by_aiohttp, told.user)) == len(understood)
        passed += len(messages)

    check()
    assert passed, "nothing got through, so nothing was proven"


async def test_whoever_reads_the_clients_stream_strictly_finds_the_same_requests() -> None:
    """As a strict proxy before us would: it forwards no more requests than we serve, nor others."""

    @many
    @given(streams, cuts)
    def check(stream: bytes, where: list[int]) -> None:
        told = tell(split(stream, where))
        assume(all(map(known_to_llhttp, told.witness.begun_)))
        served = [message for user in told.user for message in Reading(user).messages]
        strict = [m._replace(target=_origin(m.target)) for m in Reading(stream + AFTER).messages]
        assert served == strict[: len(served)]

    check()


def _origin(target: bytes) -> bytes:
    scheme, found, behind = target.partition(b"://")
    return b"/" + behind.partition(b"/")[2] if found and b"/" not in scheme else target


@pytest.mark.parametrize("pieces", [lambda s: [s], bytewise], ids=["at once", "byte by byte"])
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /\r\n", b"400 Bad Request"),
        (b"GET /\n", b"400 Bad Request"),
        (b"GET / HTTP/3.0\r\nHost: a\r\n\r\n", b"505 HTTP Version Not Supported"),
        (b"GET / HTTP/0.9\r\n", b"505 HTTP Version Not Supported"),
    ],
)
async def test_another_version_is_told_so_however_it_comes(
    sent: bytes, status: bytes, pieces: Any
) -> None:
    assert tell(pieces(sent)).client.startswith(b"HTTP/1.1 " + status)
