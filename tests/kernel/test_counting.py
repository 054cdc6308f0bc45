"""Requests are counted exactly: from the first byte in to the last byte out, whatever the cuts."""

from __future__ import annotations

import socket
from itertools import pairwise
from random import Random

import pytest

from tests.kernel.direct import (
    CHUNKED_OK,
    CHUNKED_POST,
    CONTINUE,
    GET,
    HEAD,
    HEAD_OK,
    NO_CONTENT,
    OK,
    POST,
    Direct,
)
from tests.pods import needs_kernel, until

pytestmark = needs_kernel

SO_SNDBUFFORCE = 32  # root need not care how much the machine allows (net.core.wmem_max)
CHUNKED_HEAD = CHUNKED_POST[: CHUNKED_POST.index(b"\r\n\r\n") + 4]
LONG_FIELDS = b"".join(b"C%d: %s\r\n" % (i, b"t" * 300) for i in range(30))
LONG_ANSWER_FIELDS = b"".join(b"Tr%d: %s\r\n" % (i, b"c" * 900) for i in range(40))


def test_a_request_counts_from_its_first_byte(direct: Direct) -> None:
    exchange = direct.connect()
    direct.expect(0, 0, 0, 0)
    exchange.ask(POST[:1])
    direct.expect(1, 1, 0, 0)


def test_a_request_and_its_answer_may_come_byte_by_byte(direct: Direct) -> None:
    exchange = direct.connect()
    for number in range(1, 3):
        for byte in POST:
            exchange.ask(bytes([byte]))
        direct.expect(1, number, number - 1, 0)
        for byte in OK[:-1]:
            exchange.answer(bytes([byte]))
        direct.expect(1, number, number - 1, 0)
        exchange.answer(OK[-1:])
        direct.expect(0, number, number, 0)


def test_a_chunked_message_may_come_byte_by_byte(direct: Direct) -> None:
    exchange = direct.connect()
    for byte in CHUNKED_POST:
        exchange.ask(bytes([byte]))
    for byte in CHUNKED_OK[:-1]:
        exchange.answer(bytes([byte]))
    direct.expect(1, 1, 0, 0)
    exchange.answer(CHUNKED_OK[-1:])
    direct.expect(0, 1, 1, 0)
    exchange.ask(GET)
    exchange.answer(OK)
    direct.expect(0, 2, 2, 0)


def test_pipelined_requests_keep_one_connection_in_flight_and_start_one_by_one(
    direct: Direct,
) -> None:
    exchange = direct.connect()
    exchange.ask(GET * 3)
    direct.expect(1, 1, 0, 0)
    exchange.answer(OK)
    direct.expect(1, 2, 1, 0)
    exchange.answer(OK + OK)
    direct.expect(0, 3, 3, 0)


def test_a_pipelined_request_may_be_complete_only_after_earlier_answers(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(POST + GET + POST[:20])
    exchange.answer(OK + OK)
    direct.expect(1, 3, 2, 0)
    exchange.ask(POST[20:])
    exchange.answer(OK)
    direct.expect(0, 3, 3, 0)


def test_a_hundred_pipelined_requests_are_fine_without_a_head_among_them(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET * 100)
    exchange.answer(OK * 100)
    direct.expect(0, 100, 100, 0)
    assert direct.since("over_budget") == 0


def test_a_chunked_request_may_be_cut_anywhere(direct: Direct) -> None:
    exchange, random = direct.connect(), Random(1)
    for number, cut in enumerate(range(1, len(CHUNKED_POST)), start=1):
        exchange.ask(CHUNKED_POST[:cut])
        exchange.ask(CHUNKED_POST[cut:])
        answer_cut = random.randrange(1, len(CHUNKED_OK))
        exchange.answer(CHUNKED_OK[:answer_cut])
        direct.expect(1, number, number - 1, 0)
        exchange.answer(CHUNKED_OK[answer_cut:])
        direct.expect(0, number, number, 0)


@pytest.mark.parametrize(
    ("request_bytes", "answer", "requests"),
    [
        pytest.param(GET, NO_CONTENT, 1, id="204 has no body"),
        pytest.param(
            GET,
            b"HTTP/1.1 304 Not Modified\r\nContent-Length: 100\r\n\r\n",
            1,
            id="304 has no body whatever its Content-Length",
        ),
        pytest.param(HEAD, HEAD_OK, 1, id="the answer to HEAD has no body"),
        pytest.param(HEAD + GET, HEAD_OK + OK, 2, id="HEAD then GET, pipelined"),
        pytest.param(GET + HEAD + GET, OK + HEAD_OK + OK, 3, id="HEAD between GETs"),
        pytest.param(POST, CONTINUE + OK, 1, id="100 then 200"),
        pytest.param(
            POST,
            b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + CONTINUE + OK,
            1,
            id="103, 100 and 200",
        ),
        pytest.param(
            GET, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 1, id="Content-Length: 0"
        ),
        pytest.param(GET.replace(b"\r", b""), OK.replace(b"\r", b""), 1, id="LF line ends"),
        pytest.param(b"\r\n\r\n" + GET, OK, 1, id="blank lines first"),
        pytest.param(
            b"GET / HTTP/1.1\r\n" + LONG_FIELDS + b"Content-Length: 3\r\n\r\nabc",
            OK,
            1,
            id="a long head in the request",
        ),
        pytest.param(
            GET,
            b"HTTP/1.1 200 OK\r\n" + LONG_ANSWER_FIELDS + b"Content-Length: 3\r\n\r\nabc",
            1,
            id="a long head in the answer",
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\nContent-Lengthy: 9\r\nContent-Length-X: 4\r\n"
            b"Transfer-Encodings: chunked\r\nX-Content-Length: 5\r\n\r\n",
            OK,
            1,
            id="names that nearly match",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nxx",
            OK,
            1,
            id="another coding and a length",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nxx",
            OK,
            1,
            id="the same length twice",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nContent-Length:2\r\ncontent-length:2\r\n\r\nxx",
            OK,
            1,
            id="the same length twice, without a space",
        ),
        pytest.param(CHUNKED_POST, CHUNKED_OK[:-2] + b"T: 1\r\nU: 2\r\n\r\n", 1, id="trailers"),
    ],
)
def test_every_kind_of_message_is_framed(
    direct: Direct, request_bytes: bytes, answer: bytes, requests: int
) -> None:
    exchange = direct.connect()
    exchange.ask(request_bytes)
    exchange.answer(answer[:-1])
    assert direct.counts().in_flight == 1
    exchange.answer(answer[-1:])
    direct.expect(0, requests, requests, 0)
    exchange.ask(GET)  # framing is where it should be: the next one is counted, too
    exchange.answer(OK)
    direct.expect(0, requests + 1, requests + 1, 0)
    assert direct.since("malformed") == direct.since("framing_lost") == 0


def test_an_interim_answer_ends_nothing(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(POST)
    exchange.answer(CONTINUE)
    direct.expect(1, 1, 0, 0)
    exchange.close()
    direct.expect(0, 1, 0, 1)


def test_an_early_answer_leaves_the_rest_of_the_body_uncounted(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc")
    exchange.answer(OK)
    direct.expect(0, 1, 1, 0)
    exchange.ask(b"defghij" + GET)
    direct.expect(1, 2, 1, 0)
    exchange.answer(OK)
    direct.expect(0, 2, 2, 0)


def test_an_unsolicited_answer_counts_nothing(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.answer(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
    direct.expect(0, 0, 0, 0)
    exchange.ask(GET)
    exchange.answer(OK)
    direct.expect(0, 1, 1, 0)


def test_a_close_delimited_answer_ends_with_the_connection(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET)
    exchange.answer(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1000)
    exchange.answer(b"y")
    direct.expect(1, 1, 0, 0)
    exchange.server.close()
    direct.expect(0, 1, 1, 0)


def test_a_close_delimited_answer_ends_when_the_app_shuts_its_side_down(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET)
    exchange.answer(b"HTTP/1.1 200 OK\r\n\r\nbody")
    exchange.server.shutdown()
    direct.expect(0, 1, 1, 0)
    assert direct.counters.open_connections == 1


def test_an_upgraded_connection_is_one_request_until_it_closes(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET)
    exchange.answer(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n")
    exchange.ask(GET)
    exchange.answer(OK)
    direct.expect(1, 1, 0, 0)
    assert direct.since("upgraded") == 1
    exchange.close()
    direct.expect(0, 1, 1, 0)


def test_a_method_that_begins_like_the_preface_is_an_ordinary_request(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(b"PRINT / HTTP/1.1\r\nHost: x\r\n\r\n")
    exchange.answer(OK)
    exchange.ask(b"PATCH / HTTP/1.1\r\nContent-Length: 1\r\n\r\nx")
    exchange.answer(OK)
    direct.expect(0, 2, 2, 0)
    assert direct.since("http2") == 0


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\xfc\x03", id="TLS"),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: 9999999999999999\r\n\r\n", id="length"),
        pytest.param(CHUNKED_HEAD + b"fffffffffffff\r\n", id="chunk size"),
        pytest.param(CHUNKED_HEAD + b"1\r\na\rX\n", id="a chunk that does not end"),
        pytest.param(CHUNKED_HEAD + b"1\r\naX", id="a chunk that is too long"),
    ],
)
def test_what_is_not_http_counts_as_one_request_until_it_closes(
    direct: Direct, request_bytes: bytes
) -> None:
    exchange = direct.connect()
    exchange.ask(request_bytes)
    direct.expect(1, 1, 0, 0)
    assert direct.since("malformed") == 1
    exchange.answer(OK)
    exchange.ask(GET)
    direct.expect(1, 1, 0, 0)
    exchange.close()
    direct.expect(0, 1, 1, 0)


def test_an_answer_that_is_not_http_counts_until_it_closes(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET)
    exchange.answer(b"<html>")
    direct.expect(1, 1, 0, 0)
    assert direct.since("malformed") == 1
    exchange.close()
    direct.expect(0, 1, 1, 0)


def test_a_caller_that_resets_aborts_its_request(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET)
    exchange.reset()
    direct.expect(0, 1, 0, 1)


def test_an_app_that_resets_aborts_the_request(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET)
    exchange.server.reset()
    direct.expect(0, 1, 0, 1)


def test_an_app_that_closes_within_the_answer_aborts_the_request(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET)
    exchange.answer(OK[:-2])
    exchange.server.close()
    direct.expect(0, 1, 0, 1)


def test_a_half_closed_caller_is_still_owed_its_answer(direct: Direct) -> None:
    exchange = direct.connect()
    exchange.ask(GET)
    exchange.client.shutdown(socket.SHUT_WR)
    assert exchange.server.recv() == b""
    direct.expect(1, 1, 0, 0)
    exchange.answer(OK)
    direct.expect(0, 1, 1, 0)


@pytest.mark.parametrize("framing", [b"Content-Length: 3000000\r\n", b""])
def test_an_answer_that_leaves_after_the_app_closed_is_finished_with_its_last_byte(
    direct: Direct, framing: bytes
) -> None:
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + framing + b"\r\n" + b"x" * 3_000_000
    exchange = direct.connect(receive_buffer=65536)
    exchange.server.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 << 20)
    exchange.ask(GET)
    sent = exchange.server.send_nonblocking(answer)
    assert sent == len(answer), "the send buffer takes all of it"
    exchange.server.close()
    direct.expect(1, 1, 0, 0)
    assert exchange.receive(len(answer)) == answer
    assert exchange.client.recv(1) == b""
    direct.expect(0, 1, 1, 0)


def test_partial_nonblocking_sends_count_one_answer(direct: Direct) -> None:
    exchange = direct.connect(receive_buffer=4096)
    exchange.server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    body = Random(3).randbytes(400_000)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 400000\r\n\r\n" + body
    for number in range(1, 4):
        exchange.ask(GET)
        sent, got, refused = 0, b"", 0
        while sent < len(answer):
            accepted = exchange.server.send_nonblocking(answer[sent : sent + 100_000])
            sent += accepted
            refused += not accepted
            if accepted < 100_000 and len(got) < sent:
                got += exchange.client.recv(3000)
        assert direct.counts().in_flight == 1
        got += exchange.receive(len(answer) - len(got))
        assert got == answer
        direct.expect(0, number, number, 0)


@pytest.mark.parametrize("seed", range(25))
def test_any_mix_of_messages_cut_anywhere_is_counted_exactly(direct: Direct, seed: int) -> None:
    random = Random(seed)
    requests, answers = [], []
    for _ in range(random.randrange(1, 12)):
        kind = random.choice([GET, POST, CHUNKED_POST, HEAD])
        requests.append(kind)
        plain = [OK, CHUNKED_OK, NO_CONTENT, CONTINUE + OK, CHUNKED_OK[:-2] + b"T: 1\r\n\r\n"]
        answers.append(HEAD_OK if kind == HEAD else random.choice(plain))
    exchange = direct.connect()
    for part in cut(random, b"".join(requests)):
        exchange.ask(part)
    for part in cut(random, b"".join(answers)):
        exchange.answer(part)
    direct.expect(0, len(requests), len(requests), 0)
    assert direct.since("malformed") == direct.since("framing_lost") == 0


@pytest.mark.parametrize("seed", range(25))
def test_whatever_bytes_come_nothing_stays_behind_when_the_connection_ends(
    direct: Direct, seed: int
) -> None:
    random = Random(1000 + seed)
    exchange = direct.connect()
    for _ in range(random.randrange(1, 6)):
        piece = random.choice([GET, POST, CHUNKED_POST, random.randbytes(random.randrange(1, 400))])
        exchange.ask(piece[: random.randrange(1, len(piece) + 1)])
        if random.random() < 0.5:
            piece = random.choice([OK, CHUNKED_OK, random.randbytes(200)])
            exchange.answer(piece[: random.randrange(1, len(piece) + 1)])
    if random.random() < 0.5:
        exchange.reset()
    exchange.close()
    until(lambda: direct.counts().in_flight == 0 and direct.counters.open_connections == 0)
    counts = direct.counts()
    assert counts.started == counts.finished + counts.aborted


def cut(random: Random, data: bytes) -> list[bytes]:
    places = {random.randrange(1, len(data)) for _ in range(random.randrange(1, 10))}
    return [data[i:j] for i, j in pairwise([0, *sorted(places), len(data)])]
