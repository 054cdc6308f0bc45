"""Bodies in both directions: framing, trailers, no body at all, full duplex, 100-continue."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.relay.rig import Closed, Hold, Peer, Request, Rig, ok, post, request
from weir.proxy import contract

MakeRig = Callable[..., Awaitable[Rig]]

CHUNKED = "Transfer-Encoding: chunked"


async def test_a_body_with_a_length_keeps_its_length(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    body = bytes(range(256)) * 4000
    response = await client.ask(post("/", body, "Content-Type: application/octet-stream"))
    (got,) = made.user.requests
    assert got.body == body
    assert got.field("content-length") == str(len(body))
    assert response.body == got.head + body


async def test_a_chunked_body_stays_chunked_with_its_trailers(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    await client.ask(
        request("POST", "/", CHUNKED, "Trailer: X-T")
        + b"4;ext=1\r\nabcd\r\n2\r\nef\r\n0\r\nX-T: v\r\nContent-Length: 9\r\n\r\n"
    )
    (got,) = made.user.requests
    assert got.body == b"abcdef"
    assert got.trailers == b"X-T: v\r\n"  # a length in a trailer is for nobody
    assert got.field("trailer") == "X-T"
    assert got.field("transfer-encoding") == "chunked"
    assert got.field("content-length") is None


async def test_a_chunked_response_stays_chunked_with_its_trailers(rig: MakeRig) -> None:
    made = await rig()
    made.user.on(
        "/c",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Grpc-Status\r\n\r\n"
        b"3\r\nabc\r\n1\r\nd\r\n0\r\nGrpc-Status: 0\r\n\r\n",
    )
    client = await made.client()
    for _ in range(2):
        response = await client.get("/c")
        assert response.body == b"abcd"
        assert response.trailers == b"Grpc-Status: 0\r\n"
        assert response.field("trailer") == "Grpc-Status"
    assert made.user.connections == 1


async def test_a_stream_reaches_the_client_piece_by_piece(rig: MakeRig) -> None:
    made = await rig()
    go_on = asyncio.Semaphore(0)

    async def stream(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for number in range(3):
            await go_on.acquire()
            await peer.send(b"data: %d\n\n" % number)
        peer.close()
        raise Closed

    made.user.on("/stream", stream)
    client = await made.client()
    await client.send(request("GET", "/stream"))
    head = await client.head()
    assert b"Transfer-Encoding: chunked\r\n" in head
    for number in range(3):
        go_on.release()
        assert await client.until(b"\r\n") == b"9\r\n"
        assert await client.exactly(11) == b"data: %d\n\n\r\n" % number
    assert await client.exactly(5) == b"0\r\n\r\n"
    assert (await client.get("/")).status == 200  # the client's connection outlives the other


async def test_an_http_1_0_client_gets_a_chunked_response_without_the_chunks(rig: MakeRig) -> None:
    made = await rig()
    made.user.on(
        "/c", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )
    client = await made.client()
    response = await client.ask("GET /c HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n")
    assert response.field("transfer-encoding") is None
    assert response.field("connection") is None
    assert response.body == b"abc"
    assert await client.closed()


@pytest.mark.parametrize("framing", ["Content-Length: 100", CHUNKED])
async def test_a_response_to_head_has_no_body_whatever_its_headers_say(
    rig: MakeRig, framing: str
) -> None:
    made = await rig()
    made.user.on("/h", f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode())
    client = await made.client()
    for _ in range(2):
        response = await client.ask(request("HEAD", "/h"))
        assert response.status == 200
    assert made.user.connections == 1


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_responses_that_never_have_a_body(rig: MakeRig, status: str) -> None:
    made = await rig()
    made.user.on("/n", f"HTTP/1.1 {status}\r\nETag: x\r\n\r\n".encode())
    client = await made.client()
    for _ in range(2):
        assert (await client.get("/n")).field("etag") == "x"
    assert made.user.connections == 1


async def test_the_same_head_means_a_body_for_get_and_none_for_head(rig: MakeRig) -> None:
    made = await rig()
    same = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"

    async def answer(peer: Peer, got: Request) -> None:
        await peer.send(same if got.line.startswith("HEAD") else same + b"abc")

    made.user.on("/", answer)
    client = await made.client()
    for method, body in (("GET", b"abc"), ("HEAD", b""), ("GET", b"abc"), ("HEAD", b"")):
        assert (await client.ask(request(method, "/"))).body == body


async def test_a_response_that_comes_before_the_body_was_sent_is_relayed(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/noread", ok(b"no thanks", status="413 Too Large"), unread=True)
    client = await made.client()
    await client.send(request("POST", "/noread", "Content-Length: 200000"))
    response = await client.response()
    assert response.status == 413
    await client.send(b"x" * 200_000)  # drained, so the connection is still good
    assert (await client.get("/")).status == 200


async def test_more_of_an_unwanted_body_than_is_drained_ends_the_connection(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/noread", ok(b"no thanks"), unread=True)
    client = await made.client()
    await client.send(request("POST", "/noread", "Content-Length: 10000000"))
    assert (await client.response()).status == 200
    for _ in range(10):
        client.writer.write(b"x" * 100_000)
    assert await client.closed()


async def test_request_and_response_may_stream_at_the_same_time(rig: MakeRig) -> None:
    made = await rig()

    async def echo(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while size := int(await peer.until(b"\r\n"), 16):
            piece = await peer.exactly(size + 2)
            await peer.send(b"%x\r\n%s" % (size, piece))
        await peer.exactly(2)
        await peer.send(b"0\r\n\r\n")

    made.user.on("/echo", echo, unread=True)
    client = await made.client()
    await client.send(request("POST", "/echo", CHUNKED))
    await client.head()
    for word in (b"ping", b"pong!"):
        await client.send(b"%x\r\n%s\r\n" % (len(word), word))
        assert await client.until(b"\r\n") == b"%x\r\n" % len(word)
        assert await client.exactly(len(word) + 2) == word + b"\r\n"
    await client.send(b"0\r\n\r\n")
    assert await client.exactly(5) == b"0\r\n\r\n"
    assert (await client.get("/")).status == 200
    assert made.user.connections == 1


async def test_a_body_sent_while_the_request_waits_for_its_turn_arrives_whole(
    rig: MakeRig,
) -> None:
    made = await rig(container_concurrency=1)
    hold = Hold()
    made.user.on("/hold", hold)
    first, second = await made.client(), await made.client()
    await first.send(request("GET", "/hold"))
    await made.user.received(1)
    body = bytes(range(256)) * 8000
    sending = asyncio.create_task(second.send(post("/later", body)))
    await made.settled(lambda: made.relay.counters().waiting == 1)
    hold.release()
    assert (await second.response()).status == 200
    await sending
    assert made.user.requests[1].body == body


class TestContinue:
    """Expect: 100-continue (contract 3.8)."""

    EXPECT = request("POST", "/", "Content-Length: 4", "Expect: 100-continue")

    async def test_the_user_containers_100_reaches_the_client_and_then_the_true_status(
        self, rig: MakeRig
    ) -> None:
        made = await rig()

        async def answer(peer: Peer, _: Request) -> None:
            await peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            assert await peer.exactly(4) == b"body"
            await peer.send(ok(b"done", status="201 Created"))

        made.user.on("/", answer, unread=True)
        client = await made.client()
        await client.send(self.EXPECT)
        assert await client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"body")
        response = await client.response()
        assert (response.status, response.body) == (201, b"done")
        assert made.user.requests[0].field("expect") == "100-continue"

    async def test_a_user_container_that_waits_for_the_body_gets_it_after_a_while(
        self, rig: MakeRig
    ) -> None:
        made = await rig()
        client = await made.client()
        await client.send(self.EXPECT)
        assert await client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"body")
        assert (await client.response()).body.endswith(b"body")

    async def test_an_http_1_0_client_is_told_nothing_before_the_answer(
        self, rig: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(contract, "CONTINUE_SECONDS", 0.01)
        made = await rig()
        client = await made.client()
        await client.send(self.EXPECT.replace(b"HTTP/1.1", b"HTTP/1.0"))
        await made.counted(1)
        await asyncio.sleep(0.05)  # the time in which a client of HTTP/1.1 is asked to go on
        await client.send(b"body")
        assert (await client.head()).startswith(b"HTTP/1.0 200 OK\r\n")

    async def test_a_client_that_was_refused_before_100_is_closed(self, rig: MakeRig) -> None:
        made = await rig()
        made.user.on("/", ok(status="417 Expectation Failed"), unread=True)
        client = await made.client()
        await client.send(self.EXPECT)
        response = await client.response()
        assert response.status == 417
        assert response.field("connection") == "close"
        assert await client.closed()


async def test_early_hints_are_relayed_and_the_final_status_is_the_users(rig: MakeRig) -> None:
    made = await rig()
    made.user.on(
        "/hints",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    )
    client = await made.client()
    await client.send(request("GET", "/hints"))
    assert await client.head() == b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"
    assert (await client.response()).status == 404
    assert made.relay.counters().statuses == (0, 0, 0, 1, 0)


async def test_an_http_1_0_client_never_sees_a_1xx(rig: MakeRig) -> None:
    made = await rig()
    made.user.on(
        "/hints",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    )
    client = await made.client()
    assert (await client.ask("GET /hints HTTP/1.0\r\nHost: x\r\n\r\n")).status == 200
