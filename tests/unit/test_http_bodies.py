"""Reading bodies: any split of a stream gives the same result, and lies are found out."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.proxy.wire.body import ChunkedBody, LengthBody, chunk, last_chunk, reader
from weir.proxy.wire.fields import Malformed


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


def read(length: int | None, pieces: list[bytes]) -> tuple[bytes, bytes, list[bytes]]:
    body = reader(length)
    payload = b""
    for index, piece in enumerate(pieces):
        got, rest = body.feed(piece)
        payload += got
        if rest is not None:
            return payload, rest + b"".join(pieces[index + 1 :]), body.trailers
    raise AssertionError("the body did not end")


@given(
    payloads=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    trailer=st.booleans(),
    behind=st.binary(max_size=20),
    cuts=st.lists(st.integers(0, 10_000), max_size=30),
)
def test_chunks_are_read_the_same_however_they_are_cut(
    payloads: list[bytes], trailer: bool, behind: bytes, cuts: list[int]
) -> None:
    trailers = [b"X-T: v"] if trailer else []
    stream = b"".join(b"".join(chunk(payload)) for payload in payloads) + last_chunk(trailers)
    assert read(None, split(stream + behind, cuts)) == (b"".join(payloads), behind, trailers)


@given(
    payload=st.binary(min_size=1, max_size=100),
    behind=st.binary(max_size=20),
    cuts=st.lists(st.integers(0, 1000), max_size=20),
)
def test_a_length_is_read_the_same_however_it_is_cut(
    payload: bytes, behind: bytes, cuts: list[int]
) -> None:
    pieces = split(payload + behind, cuts)
    assert read(len(payload), pieces) == (payload, behind, [])


@pytest.mark.parametrize(
    "stream",
    [
        b"x\r\n",
        b"\r\n",
        b"-1\r\n",
        b"1 \r\na\r\n",
        b" 1\r\na\r\n",
        b"0x1\r\na\r\n",
        b"1\na\n",
        b"1\r\nab\r\n",
        b"1\r\na\n",
        b"1\r\na\rb",
        b"1;a\x00b\r\n",
        b"1" * 16 + b"\r\n",
        b"1;" + b"x" * 5000,
        b"0\r\nBad Trailer\r\n\r\n",
        b"0\r\n folded: x\r\n\r\n",
    ],
)
def test_chunks_that_lie_are_malformed_however_they_are_cut(stream: bytes) -> None:
    for pieces in ([stream], [bytes([byte]) for byte in stream]):
        body = ChunkedBody()
        with pytest.raises(Malformed):
            for piece in pieces:
                body.feed(piece)


def test_trailers_never_carry_framing_or_routing() -> None:
    body = ChunkedBody()
    payload, rest = body.feed(b"0\r\nHost: x\r\nConnection: close\r\nX-Ok: 1\r\n\r\n")
    assert (payload, rest, body.trailers) == (b"", b"", [b"X-Ok: 1"])


def test_trailers_without_end_are_malformed() -> None:
    body = ChunkedBody()
    body.feed(b"0\r\n")
    with pytest.raises(Malformed, match="too long"):
        for _ in range(100):
            body.feed(b"X: " + b"y" * 1000 + b"\r\n")


def test_an_empty_payload_is_no_chunk_because_that_would_be_the_last() -> None:
    assert chunk(b"") == []


@given(st.lists(st.binary(max_size=30), max_size=20))
def test_garbage_is_read_or_refused_but_nothing_else(pieces: list[bytes]) -> None:
    for body in (ChunkedBody(), LengthBody(50)):
        try:
            for piece in pieces:
                _, rest = body.feed(piece)
                if rest is not None:
                    break
        except Malformed:
            pass
