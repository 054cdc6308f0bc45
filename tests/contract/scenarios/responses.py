"""What becomes of the user container's response (contract sections 3.3 and 3.11)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tests.contract.scenario import Scenario, add, scenario
from tests.contract.user import HELLO, ok
from tests.contract.world import World
from tests.relay.rig import Closed, Peer, Request, get, request


def says(*lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass(frozen=True)
class Case:
    """The user container's bytes; `closes` behind them. Asked for by `method`."""

    name: str
    section: str
    response: bytes
    method: str = "GET"
    fields: tuple[str, ...] = ()
    minor: int = 1
    closes: bool = False

    async def play(self, world: World) -> None:
        async def answer(peer: Peer, _: Request) -> None:
            await peer.send(self.response)
            if self.closes:
                peer.close()
                raise Closed

        world.user.on("/", answer)
        client = await world.client()
        data = request(self.method, "/", *self.fields)
        if not self.minor:
            data = data.replace(b"HTTP/1.1", b"HTTP/1.0")
        got = await world.ask("answer", data, client=client)
        more = 0
        while got is not None and 100 < got.status < 200:
            more += 1
            got = await world.answer(f"then {more}", client, self.method)
        world.note("the rest", await world.rest(client))


CHUNKS = b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
CASES = [
    Case("a_404_is_passed_on", "3.12", ok(b"none", status="404 Not Found")),
    Case("a_503_is_passed_on", "3.12", ok(b"busy", status="503 Service Unavailable")),
    Case("a_reason_of_its_own", "3.3", ok(b"x", status="200 Fine")),
    Case("a_status_without_a_reason", "3.3", says("HTTP/1.1 200 ", "Content-Length: 0")),
    Case("a_status_nobody_has_heard_of", "3.3", ok(b"x", status="299 Strange")),
    Case("a_status_of_999", "3.3", ok(b"x", status="999 Odd")),
    Case("a_204", "3.3", says("HTTP/1.1 204 No Content")),
    Case("a_204_with_a_length", "3.3", says("HTTP/1.1 204 No Content", "Content-Length: 0")),
    Case("a_304_with_a_length", "3.3", says("HTTP/1.1 304 Not Modified", "Content-Length: 5")),
    Case("a_body_without_a_Content_Type", "3.3", ok(b"<html>", kind="")),
    Case("no_body_and_no_Content_Type", "3.3", ok(b"", kind="")),
    Case("a_Date_that_is_there_stays", "3.3", ok(b"x", "Date: Thu, 01 Jan 1970 00:00:00 GMT")),
    Case("a_Server_header_stays", "3.3", ok(b"x", "Server: user/1", "Via: 1.0 fred")),
    Case("cookies_stay_apart", "3.3", ok(b"x", "Set-Cookie: a=1", "Set-Cookie: b=2")),
    Case(
        "hop_by_hop_headers_of_a_response_stay_here",
        "3.3",
        ok(
            b"x",
            "Connection: X-Hop",
            "X-Hop: 1",
            "Keep-Alive: timeout=5",
            "Proxy-Authenticate: Basic",
            "Upgrade: h2c",
        ),
    ),
    Case("a_response_that_closes", "3.3", ok(b"x", "Connection: close"), closes=True),
    Case(
        "a_chunked_response",
        "3.11",
        says("HTTP/1.1 200 OK", "Content-Type: a/b", "Transfer-Encoding: chunked", body=CHUNKS),
    ),
    Case(
        "a_chunked_response_to_HTTP_1_0",
        "3.3",
        says("HTTP/1.1 200 OK", "Content-Type: a/b", "Transfer-Encoding: chunked", body=CHUNKS),
        minor=0,
    ),
    Case(
        "trailers_of_a_response_that_were_announced",
        "3.9",
        says(
            "HTTP/1.1 200 OK",
            "Content-Type: a/b",
            "Trailer: X-T",
            "Transfer-Encoding: chunked",
            body=b"3\r\nabc\r\n0\r\nX-T: v\r\n\r\n",
        ),
    ),
    Case(
        "trailers_of_a_response_that_were_not_announced",
        "3.9",
        says(
            "HTTP/1.1 200 OK",
            "Content-Type: a/b",
            "Transfer-Encoding: chunked",
            body=b"3\r\nabc\r\n0\r\nX-T: v\r\n\r\n",
        ),
    ),
    Case(
        "a_response_that_ends_with_its_connection",
        "3.11",
        says("HTTP/1.1 200 OK", "Content-Type: a/b", body=b"abc"),
        closes=True,
    ),
    Case(
        "an_HTTP_1_0_response",
        "3.11",
        says("HTTP/1.0 200 OK", "Content-Type: a/b", body=b"abc"),
        closes=True,
    ),
    Case("the_length_of_a_HEAD", "3.3", says("HTTP/1.1 200 OK", "Content-Length: 9"), "HEAD"),
    Case("a_HEAD_without_a_length", "3.3", says("HTTP/1.1 200 OK", "X-A: b"), "HEAD"),
    Case(
        "a_chunked_answer_to_HEAD",
        "3.3",
        says("HTTP/1.1 200 OK", "Transfer-Encoding: chunked"),
        "HEAD",
    ),
    # --- 1xx (3.11)
    Case(
        "early_hints_and_a_200",
        "3.11",
        says("HTTP/1.1 103 Early Hints", "Link: </a.css>; rel=preload") + HELLO,
    ),
    Case(
        "early_hints_and_a_404",
        "3.11",
        says("HTTP/1.1 103 Early Hints", "Link: </a.css>; rel=preload")
        + ok(b"none", status="404 Not Found"),
    ),
    Case("a_102_twice", "3.11", says("HTTP/1.1 102 Processing") * 2 + HELLO),
    Case("a_100_that_nobody_expects", "3.11", says("HTTP/1.1 100 Continue") + HELLO),
    Case(
        "early_hints_to_HTTP_1_0",
        "3.11",
        says("HTTP/1.1 103 Early Hints", "Link: </a.css>") + HELLO,
        minor=0,
    ),
    Case("a_101_that_nobody_asked_for", "3.10", says("HTTP/1.1 101 Switching Protocols")),
    # --- responses that are none (3.12)
    Case("an_answer_that_is_no_HTTP", "3.12", b"hello\r\n\r\n", closes=True),
    Case("an_answer_in_HTTP_2", "3.12", b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n"),
    Case(
        "an_answer_with_two_lengths",
        "3.12",
        says("HTTP/1.1 200 OK", "Content-Length: 1", "Content-Length: 2", body=b"ab"),
    ),
    Case(
        "an_answer_with_a_length_and_chunks",
        "3.12",
        says("HTTP/1.1 200 OK", "Content-Length: 1", "Transfer-Encoding: chunked", body=CHUNKS),
    ),
    Case(
        "an_answer_with_a_bad_header", "3.12", says("HTTP/1.1 200 OK", "Bad", "Content-Length: 0")
    ),
    Case(
        "more_than_its_length",
        "3.12",
        says("HTTP/1.1 200 OK", "Content-Type: a/b", "Content-Length: 1", body=b"ab"),
    ),
]
for case in CASES:
    add(Scenario(case.name, case.section, case.play))


@scenario("3.11")
async def a_stream_is_passed_on_event_by_event(world: World) -> None:
    go_on = asyncio.Event()

    async def stream(peer: Peer, _: Request) -> None:
        await peer.send(
            says("HTTP/1.1 200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
        )
        for number in range(3):
            await peer.send(b"9\r\ndata: %d\n\n\r\n" % number)
            await go_on.wait()
            go_on.clear()
        await peer.send(b"0\r\n\r\n")

    world.user.on("/", stream)
    client = await world.client()
    await client.send(get("/"))
    await client.head()
    for number in range(3):
        size = int(await client.until(b"\r\n"), 16)
        world.note(f"event {number}", await client.exactly(size + 2))
        go_on.set()
    world.note("the end", await client.exactly(5))


@scenario("3.11")
async def a_chunked_request_reaches_the_user_container_piece_by_piece(world: World) -> None:
    pieces: asyncio.Queue[bytes] = asyncio.Queue()

    async def read(peer: Peer, got: Request) -> None:
        for _ in range(2):
            size = int(await peer.until(b"\r\n"), 16)
            pieces.put_nowait((await peer.exactly(size + 2))[:size])
        world.note("its end", await peer.exactly(5))
        await peer.send(HELLO)

    world.user.on("/", read, unread=True)
    client = await world.client()
    await client.send(request("POST", "/", "Transfer-Encoding: chunked"))
    for piece in (b"first", b"second"):
        await client.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        async with asyncio.timeout(20):
            world.note(f"the user container got {piece!r}", await pieces.get())
    await world.ask("answer", b"0\r\n\r\n", client=client)


@scenario("3.11")
async def an_answer_before_the_body_was_read(world: World) -> None:
    world.user.on("/", HELLO, unread=True)
    client = await world.client()
    data = request("POST", "/", "Content-Length: 200000") + b"x" * 200_000
    await world.ask("answer", data, client=client)


@scenario("3.11", ENABLE_HTTP_FULL_DUPLEX="true")
async def full_duplex_talks_while_it_listens(world: World) -> None:
    async def echo(peer: Peer, _: Request) -> None:
        await peer.send(says("HTTP/1.1 200 OK", "Content-Type: a/b", "Transfer-Encoding: chunked"))
        while size := int(await peer.until(b"\r\n"), 16):
            piece = (await peer.exactly(size + 2))[:size]
            await peer.send(b"%x\r\n%s\r\n" % (size, piece))
        await peer.exactly(2)
        await peer.send(b"0\r\n\r\n")

    world.user.on("/", echo, unread=True)
    client = await world.client()
    await client.send(request("POST", "/", "Transfer-Encoding: chunked") + b"3\r\none\r\n")
    head = await client.head()
    world.note("status", head.split(b"\r\n")[0])
    world.note("first echo", await client.exactly(8))
    await client.send(b"3\r\ntwo\r\n")
    world.note("second echo", await client.exactly(8))
    await client.send(b"0\r\n\r\n")
    world.note("the end", await client.exactly(5))
    await world.ask("the next request on this connection", get("/other"), client=client)


@scenario("3.8")
async def a_client_that_expects_100_gets_the_user_containers(world: World) -> None:
    async def go_on(peer: Peer, _: Request) -> None:
        await peer.send(says("HTTP/1.1 100 Continue"))
        world.note("body", await peer.exactly(4))
        await peer.send(ok(b"made", status="201 Created"))

    world.user.on("/", go_on, unread=True)
    client = await world.client()
    fields = ("Expect: 100-continue", "Content-Length: 4")
    await world.ask("first", request("POST", "/", *fields), client=client)
    await world.ask("then", b"abcd", client=client)


@scenario("3.8")
async def a_client_that_expects_100_is_told_to_go_on_after_a_second(world: World) -> None:
    async def read(peer: Peer, _: Request) -> None:
        world.note("body", await peer.exactly(4))
        await peer.send(ok(b"made", status="201 Created"))

    world.user.on("/", read, unread=True)
    client = await world.client()
    fields = ("Expect: 100-continue", "Content-Length: 4")
    await world.ask("first", request("POST", "/", *fields), client=client, due=1.0)
    await world.ask("then", b"abcd", client=client)


@scenario("3.8")
async def a_client_that_expects_100_may_be_refused(world: World) -> None:
    world.user.on("/", ok(b"no", status="417 Expectation Failed"), unread=True)
    client = await world.client()
    fields = ("Expect: 100-continue", "Content-Length: 4")
    await world.ask("answer", request("POST", "/", *fields), client=client)


@scenario("3.3")
async def requests_of_one_connection_are_answered_in_order(world: World) -> None:
    world.user.on("/slow", world.user.slow(0.3, ok(b"slow")))
    client = await world.client()
    await client.send(get("/slow") + get("/") + request("HEAD", "/") + get("/slow"))
    for number, method in enumerate(("GET", "GET", "HEAD", "GET")):
        response = await client.response(method)
        world.told(f"answer {number}", response)


@scenario("3.8")
async def the_connection_to_the_user_container_is_kept(world: World) -> None:
    for number in range(3):
        await world.ask(f"answer {number}", get("/"))
    world.note("connections of the user container", world.user.connections)


@scenario("3.3")
async def order_and_spelling_of_headers(world: World) -> None:
    """Names are not case-sensitive and their order says nothing, but this is how they look."""
    world.user.on("/", ok(b"x", "x-b: 1", "X-a: 2", "x-b: 3", "Date: -"))
    client = await world.client()
    await client.send(get("/", "x-b: 1", "X-a: 2", "ETag: 3"))
    response = await client.response()
    world.note("head of the response", response.head)
    world.note("head of the request", world.user.requests[0].head)
