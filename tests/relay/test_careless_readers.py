"""A user container with bad habits reads the same requests that a strict one reads.

Smuggling lives on the difference between two readers. Attacks as in tests/relay/test_smuggling.py
are relayed, and what comes out is read by readers that take a bare LF for the end of a line, the
first or the last of two lengths, anything with `chunked` in it for a coding, or overlook blanks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.relay.test_fuzz import a_request, cuts, many, split
from tests.relay.test_smuggling import AFTER, SMUGGLED, Message, Reading, streams, tell


@dataclass(frozen=True)
class Careless:
    """`last`: of two lengths, the last one counts, else the first. `within`: any coding that has
    the word in it is chunked."""

    line_end: bytes
    last: bool
    within: bool
    blanks: bool

    def read(self, stream: bytes) -> list[Message]:
        """Whole messages, up to where nothing can be made of the rest."""
        found = []
        while stream:
            lines, rest = self._lines(stream)
            if rest is None:
                break
            body, after = self._body(lines[1:], rest)
            if after is None:
                break
            method, _, target = lines[0].rpartition(b" ")[0].partition(b" ")
            found.append(Message(method, target, body))
            stream = after
        return found

    def _lines(self, stream: bytes) -> tuple[list[bytes], bytes | None]:
        lines: list[bytes] = []
        while True:
            line, end, stream = stream.partition(self.line_end)
            if not end:
                return lines, None
            line = line.rstrip(b"\r")
            if not line:
                return lines, stream
            lines.append(line)

    def _body(self, lines: list[bytes], rest: bytes) -> tuple[bytes, bytes | None]:
        codings, lengths = [], []
        for line in lines:
            name, _, value = line.partition(b":")
            name = (name.strip(b" \t\x0b\0") if self.blanks else name).lower()
            if name == b"transfer-encoding":
                codings.append(value.strip().lower())
            elif name == b"content-length":
                lengths.append(value.strip())
        if any(b"chunked" in c if self.within else c == b"chunked" for c in codings):
            return self._chunks(rest)
        if not lengths:
            return b"", rest
        length = int(lengths[-1 if self.last else 0])
        return rest[:length], rest[length:] if len(rest) >= length else None

    def _chunks(self, rest: bytes) -> tuple[bytes, bytes | None]:
        body = b""
        while True:
            line, end, rest = rest.partition(self.line_end)
            if not end:
                return body, None
            size = int(line.split(b";")[0], 16)
            if not size:
                return body, self._lines(rest)[1]
            if len(rest) < size + 2:
                return body, None
            body += rest[:size]
            rest = rest[size:].removeprefix(b"\r").removeprefix(b"\n")


CARELESS = [
    Careless(line_end, *habits)
    for line_end in (b"\r\n", b"\n")
    for habits in itertools.product((True, False), repeat=3)
]


def read_by_all(user: list[bytes]) -> list[Message]:
    """The whole requests of these streams, which all readers agree on."""
    found = []
    for stream in user:
        strict = Reading(stream)
        for reader in CARELESS:
            assert reader.read(stream) == strict.messages, (reader, stream)
        found += strict.messages
    return found


def readable(user: list[bytes]) -> bool:
    """llhttp doesn't know every method that may be passed on; test_smuggling is about that."""
    return not any(Reading(stream).broken for stream in user)


attacks = st.one_of(streams, st.builds(bytes.__add__, a_request(), streams))
"""Some behind a request that is in order, from which they must not take anything, nor add to it."""


async def test_careless_readers_read_what_a_strict_one_reads() -> None:
    read = 0

    @many
    @given(attacks, cuts)
    def check(stream: bytes, where: list[int]) -> None:
        nonlocal read
        user = tell(split(stream, where)).user
        assume(readable(user))
        read += len(read_by_all(user))

    check()
    assert read > 50, "hardly anything got through, so nothing was proven"


async def test_the_careless_readers_are_really_careless() -> None:
    """They fall for what the relay refuses, each in its own way."""
    attack = b"POST / HTTP/1.1\r\nContent-Length: 0\r\nContent-Length : %d\r\nX: a\nY: b\r\n\r\n"
    told = {
        tuple(message.body for message in reader.read(attack % len(SMUGGLED) + SMUGGLED))
        for reader in CARELESS
    }
    assert len(told) > 1


async def test_where_an_attack_is_cut_decides_nothing() -> None:
    @many
    @given(attacks, cuts)
    def check(stream: bytes, where: list[int]) -> None:
        whole, pieces = tell([stream]), tell(split(stream, where))
        assert whole.client.count(b"HTTP/1.1 200 ") == pieces.client.count(b"HTTP/1.1 200 ")
        assert whole.done == pieces.done
        assume(readable(whole.user))
        assert read_by_all(whole.user) == read_by_all(pieces.user)

    check()


@pytest.mark.parametrize("field", [b"Content-Length: 5", b"Host: other", b"Connection: close"])
async def test_a_trailer_never_becomes_a_field_of_the_head(field: bytes) -> None:
    head = b"POST /p HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    told = tell([head + b"0\r\n" + field + b"\r\nX-T: v\r\n\r\n" + AFTER])
    assert read_by_all(told.user)[:2] == [
        Message(b"POST", b"/p", b""),
        Message(b"GET", b"/after", b""),
    ]
    assert field not in b"".join(told.user)
    assert b"X-T: v" in b"".join(told.user)


@pytest.mark.parametrize("token", [b"Content-Length", b"Host", b"Transfer-Encoding"])
async def test_connection_strips_nothing_that_frames_the_message(token: bytes) -> None:
    """Without its length, this request would be two."""
    head = b"POST /p HTTP/1.1\r\nHost: h\r\nConnection: %s\r\nContent-Length: %d\r\n\r\n"
    told = tell([head % (token, len(SMUGGLED)) + SMUGGLED])
    assert read_by_all(told.user) == [
        Message(b"POST", b"/p", SMUGGLED),
        Message(b"GET", b"/after", b""),
    ]


@pytest.mark.parametrize("authority", [b"other", b"other:80", b"user@other"])
async def test_an_absolute_target_decides_which_host_is_meant(authority: bytes) -> None:
    told = tell([b"GET http://%s/p?q HTTP/1.1\r\nHost: h\r\n\r\n" % authority])
    sent = b"".join(told.user).partition(b"\r\n\r\n")[0]
    host = authority.removeprefix(b"user@")
    assert sent.startswith(b"GET /p?q HTTP/1.1\r\n")
    assert [line for line in sent.split(b"\r\n") if line.lower().startswith(b"host:")] == [
        b"Host: " + host
    ]
