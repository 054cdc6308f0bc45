"""Whatever a container answers, a probe ends in a verdict."""

import asyncio
import itertools
import struct
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from weir.proxy.probe_grpc import _serving_status
from weir.proxy.probe_http import ProbeFailed
from weir.proxy.probe_http2 import Response, _Call, _plain
from weir.proxy.wire.connection import TransportError


class Wire(asyncio.Transport):
    """Takes what is written, and remembers that it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


payloads = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"\x88", b"\x08\x03200", b"\x08\x82\x64\x02", b"\x3f\xe1\x1f", b""]),
    st.lists(st.sampled_from([b"\x88", b"\x00\x01a\x01b", b"\x0f\x0d\x010"])).map(b"".join),
)
frames = st.builds(
    lambda kind, flags, stream, payload: (
        struct.pack("!BHBBI", 0, len(payload), kind, flags, stream) + payload
    ),
    st.integers(0, 10),
    st.integers(0, 255),
    st.sampled_from([0, 1, 1, 1, 3, 0x80000001]),
    payloads,
)
answers = st.tuples(st.sampled_from([struct.pack("!BHBBI", 0, 0, 4, 0, 0), b""]), st.lists(frames))


@given(
    answers.map(lambda pair: pair[0] + b"".join(pair[1])),
    st.booleans(),
    st.lists(st.integers(1, 60), min_size=1),
)
@settings(max_examples=500, deadline=None)
def test_any_frames_end_in_a_response_or_an_error(
    data: bytes, whole: bool, sizes: list[int]
) -> None:
    loop = asyncio.new_event_loop()
    done: asyncio.Future[Response] = loop.create_future()
    call = _Call(b"", whole, done)
    wire = Wire()
    call.connection_made(wire)
    for size in itertools.cycle(sizes):
        call.data_received(data[:size])
        data = data[size:]
        if not data:
            break
    call.eof_received()
    assert done.done()
    error = done.exception()
    if error is None:
        assert 200 <= done.result().status <= 999
    else:
        assert isinstance(error, TransportError) and str(error)
    call.leave()
    assert wire.closed
    call.connection_lost(None)
    loop.close()


@given(st.binary(max_size=64))
@settings(max_examples=500, deadline=None)
def test_any_string_has_a_meaning_or_is_an_error(coded: bytes) -> None:
    try:
        text = _plain(coded)
    except TransportError:
        return
    # no code is shorter than 5 bits or longer than 30, and at most 7 bits are padding
    assert len(text) * 5 <= len(coded) * 8 <= len(text) * 30 + 7


@given(
    st.one_of(
        st.binary(max_size=40),
        st.binary(max_size=20).map(lambda body: b"\0" + len(body).to_bytes(4, "big") + body),
    )
)
@settings(max_examples=500, deadline=None)
def test_any_message_has_a_status_or_is_an_error(body: bytes) -> None:
    try:
        assert _serving_status(body) >= 0
    except ProbeFailed as error:
        assert str(error)
