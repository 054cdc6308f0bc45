"""`Upgrade: h2c` (contract sections 1.5 and 3.9): a request of HTTP/1.1 goes on as stream 1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.relay.h2pair import Pair
from tests.relay.h2rig import CANCEL, INTERNAL_ERROR, Client, Message, Speaker, reset, window
from tests.relay.rig import PATIENCE, Hold, Peer, Request, Rig, UserContainer, hang

MakePair = Callable[..., Awaitable[Pair]]
MakeRig = Callable[..., Awaitable[Rig]]
INITIAL_WINDOW = 4
UPGRADE = (
    b"GET /first HTTP/1.1\r\nHost: a.b\r\nX-Y: z\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    b"Upgrade: h2c\r\nHTTP2-Settings: %s\r\n\r\n"
)
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"


async def test_an_upgrade_to_h2c_makes_the_request_the_first_stream(pair: MakePair) -> None:
    made = await pair(http2=True)
    client = await made.bare()
    client.send(UPGRADE % b"AAQAAABkAAMAAABk")  # an initial window of 100, and 100 streams
    assert await client.reader.readexactly(len(SWITCHING)) == SWITCHING
    client.begin((INITIAL_WINDOW, 1000))
    got = await client.message(1)
    assert got.status == 200
    (seen,) = made.user.requests
    assert (seen.heads[0][":path"], seen.heads[0]["x-y"]) == ("/first", "z")
    assert not {"upgrade", "http2-settings", "connection"} & {*seen.heads[0]}
    assert (await client.get(3)).status == 200
    await made.settled()
    assert made.relay.counters().requests == 2


async def test_the_settings_of_an_upgrade_count_from_the_first_stream(pair: MakePair) -> None:
    async def long(speaker: Speaker, stream: int, message: Message) -> None:
        head = speaker.headers(stream, [(":status", "200")])
        speaker.send(head, speaker.data(stream, b"x" * 150, True))

    made = await pair(http2=True)
    made.user.on("/first", long)
    client = await made.bare()
    client.credits = client.answering = False  # nothing comes before its preface
    client.send(UPGRADE % b"AAQAAABk")
    await client.reader.readexactly(len(SWITCHING))
    await client.until(lambda: 1 in client.messages and len(client.messages[1].body) == 100)
    client.begin((INITIAL_WINDOW, 150))
    assert len((await client.message(1)).body) == 150


async def test_a_probe_may_ask_for_an_upgrade(pair: MakePair) -> None:
    made = await pair(http2=True)
    client = await made.bare()
    asked = UPGRADE % b"AAMAAABk"
    probe = b"User-Agent: kube-probe/1\r\nK-Network-Probe: queue\r\nX-Y"
    client.send(asked.replace(b"X-Y", probe))
    await client.reader.readexactly(len(SWITCHING))
    client.begin()
    assert (await client.message(1)).body == b"queue"


@pytest.mark.parametrize("value", [b"AAQ", b"!", b"AAQAAABkAA"])
async def test_an_upgrade_with_bad_settings_is_not_taken(pair: MakePair, value: bytes) -> None:
    old = UserContainer()
    await old.start()
    made = await pair(http2=True, user_port=old.port)
    client = await made.bare()
    client.send(UPGRADE % value)
    assert await client.reader.readline() == b"HTTP/1.1 200 OK\r\n"
    await old.stop()


# ---- a user container of HTTP/1.1 ------------------------------------------------------------

Switch = Callable[..., Awaitable[Client]]


@pytest.fixture
async def switch() -> AsyncIterator[Switch]:
    """`await switch(rig, head, body)`: a client whose request was answered with 101."""
    clients: list[Client] = []

    async def make(made: Rig, asked: bytes = UPGRADE % b"AAMAAABk", body: bytes = b"") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", made.port))
        clients.append(client)
        client.send(asked + body)
        assert await client.reader.readexactly(len(SWITCHING)) == SWITCHING
        return client

    yield make
    for client in clients:
        client.abort()


async def test_where_the_user_container_speaks_http_1_the_first_request_stays_http_1(
    rig: MakeRig, switch: Switch
) -> None:
    made = await rig()
    client = await switch(made)
    client.begin()
    got = await client.message(1)
    assert (got.status, got.final["x-backend"]) == (200, "raw")
    assert "date" in got.final and "connection" not in got.final
    (seen,) = made.user.requests
    assert seen.line == "GET /first HTTP/1.1"
    assert (seen.field("connection"), seen.field("upgrade")) == ("Upgrade", "h2c")
    assert seen.field("http2-settings") is None
    assert (seen.field("x-y"), seen.field("x-forwarded-for")) == ("z", "127.0.0.1")
    await made.settled(lambda: made.relay.counters().in_flight == 0)
    assert made.relay.counters().requests == 1


async def test_a_body_that_came_with_the_head_goes_on(rig: MakeRig, switch: Switch) -> None:
    made = await rig()
    asked = UPGRADE.replace(b"GET", b"POST").replace(b"X-Y: z", b"Content-Length: 4")
    client = await switch(made, asked % b"AAMAAABk", b"body")
    client.begin()
    assert (await client.message(1)).body.endswith(b"body")
    assert made.user.requests[0].body == b"body"


async def test_a_body_goes_on_in_http_2_as_well(pair: MakePair) -> None:
    made = await pair(http2=True)
    client = await made.bare()
    asked = UPGRADE.replace(b"GET", b"POST").replace(b"X-Y: z", b"Content-Length: 4")
    client.send(asked % b"AAMAAABk" + b"body")
    await client.reader.readexactly(len(SWITCHING))
    client.begin()
    assert (await client.message(1)).body == b"body"
    assert made.user.requests[0].final["content-length"] == "4"


async def test_a_request_whose_body_is_still_to_come_stays_http_1(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    asked = UPGRADE.replace(b"GET", b"POST").replace(b"X-Y: z", b"Content-Length: 4")
    await client.send(asked % b"AAMAAABk" + b"bo")
    await made.counted(1)
    await client.send(b"dy")
    assert (await client.response()).status == 200
    assert made.user.requests[0].field("upgrade") is None


@pytest.mark.parametrize(
    ("connection", "upgrade"),
    [("HTTP2-Settings", "h2c"), ("Upgrade, HTTP2-Settings", "websocket, H2C")],
)
async def test_what_asks_for_an_upgrade(
    rig: MakeRig, switch: Switch, connection: str, upgrade: str
) -> None:
    asked = UPGRADE.replace(b"Upgrade, HTTP2-Settings", connection.encode())
    client = await switch(await rig(), asked.replace(b"h2c", upgrade.encode()) % b"AAMAAABk")
    client.begin()
    assert (await client.message(1)).status == 200


@pytest.mark.parametrize(
    "change",
    [(b", HTTP2-Settings", b""), (b"Upgrade: h2c", b"Upgrade: h3"), (b"HTTP/1.1", b"HTTP/1.0")],
)
async def test_what_does_not(rig: MakeRig, change: tuple[bytes, bytes]) -> None:
    made = await rig()
    client = await made.client()
    assert (await client.ask(UPGRADE.replace(*change) % b"AAMAAABk")).status == 200


async def test_a_health_check_that_asks_for_an_upgrade_gets_one(
    rig: MakeRig, switch: Switch
) -> None:
    probe = b"User-Agent: kube-probe/1\r\nK-Network-Probe: queue\r\nX-Y"
    client = await switch(await rig(), UPGRADE.replace(b"X-Y", probe) % b"AAMAAABk")
    client.begin()
    assert (await client.message(1)).body == b"queue"


async def test_chunks_and_trailers_become_frames(rig: MakeRig, switch: Switch) -> None:
    made = await rig()
    made.user.on(
        "/first",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n"
        b"3\r\nabc\r\n2\r\nde\r\n0\r\nX-T: v\r\n\r\n",
    )
    client = await switch(made)
    client.begin()
    got = await client.message(1)
    assert [head.get(":status") for head in got.heads] == ["103", "201", None]
    assert (got.heads[0]["link"], got.body, got.trailers) == ("</a>", b"abcde", {"x-t": "v"})
    assert "transfer-encoding" not in got.final
    assert made.relay.counters().statuses[1] == 1


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_a_response_without_a_body_ends_with_its_head(
    rig: MakeRig, switch: Switch, status: str
) -> None:
    made = await rig()
    made.user.on("/first", f"HTTP/1.1 {status}\r\n\r\n".encode())
    client = await switch(made)
    client.begin()
    got = await client.message(1)
    assert (got.final[":status"], got.body) == (status[:3], b"")


async def test_a_response_to_head_has_its_length_and_no_body(rig: MakeRig, switch: Switch) -> None:
    made = await rig()
    made.user.on("/first", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    client = await switch(made, UPGRADE.replace(b"GET", b"HEAD") % b"AAMAAABk")
    client.begin()
    got = await client.message(1)
    assert (got.final["content-length"], got.body) == ("5", b"")


async def test_a_client_that_does_not_read_holds_the_user_container(
    rig: MakeRig, switch: Switch
) -> None:
    size = 32 << 20
    sent = 0

    async def much(peer: Peer, _: Request) -> None:
        nonlocal sent
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while sent < size:
            await peer.send(bytes(1 << 16))
            sent += 1 << 16

    made = await rig()
    made.user.on("/first", much)
    client = await switch(made)
    client.credits = False
    client.begin()
    await client.until(lambda: 1 in client.messages and len(client.messages[1].body) == 65535)
    await made.settled(lambda: _held(made))
    assert sent < size
    client.credits = True
    client.send(window(0, 1 << 20), window(1, 1 << 20))
    received, message = 0, client.messages[1]
    while received < size:
        received += len(message.body)
        message.body = b""
        if received < size:
            await client.frame()
    assert received == size and message.ended


def _held(made: Rig) -> bool:
    (connection,) = made.relay._user._open
    return bool(connection.flow.held)


@pytest.mark.parametrize("begun", [False, True])
async def test_a_user_container_that_dies(rig: MakeRig, switch: Switch, begun: bool) -> None:
    async def die(peer: Peer, _: Request) -> None:
        if begun:
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
        peer.close()

    made = await rig()
    made.user.on("/first", die)
    client = await switch(made)
    client.begin()
    got = await client.message(1)
    if begun:
        assert (got.body, got.reset) == (b"abc", INTERNAL_ERROR)
    else:
        assert (got.status, got.body) == (502, b"EOF\n")


async def test_a_user_container_that_switches_is_refused(rig: MakeRig, switch: Switch) -> None:
    made = await rig()
    made.user.on("/first", SWITCHING)
    client = await switch(made)
    client.begin()
    assert (await client.message(1)).status == 502
    await made.settled(lambda: made.relay.counters().in_flight == 0)


async def test_nobody_there(rig: MakeRig, switch: Switch) -> None:
    made = await rig()
    await made.user.stop()
    client = await switch(made)
    client.begin()
    got = await client.message(1)
    assert got.status == 502 and b"connection refused" in got.body


async def test_a_client_that_resets_the_first_stream_ends_its_request(
    rig: MakeRig, switch: Switch
) -> None:
    made = await rig(container_concurrency=1)
    made.user.on("/first", hang)
    client = await switch(made)
    client.begin()
    await made.user.received(1)
    client.send(reset(1, CANCEL))
    await made.settled(lambda: made.relay.counters().in_flight == 0)
    await made.user.wait_for(lambda: made.user.open == 0)


async def test_the_first_request_waits_for_its_turn(rig: MakeRig, switch: Switch) -> None:
    made = await rig(container_concurrency=1)
    hold = Hold()
    made.user.on("/held", hold)
    other = await made.client()
    await other.send(b"GET /held HTTP/1.1\r\nHost: a.b\r\n\r\n")
    await made.settled(lambda: hold.waiting == 1)
    client = await switch(made)
    client.begin()
    await made.settled(lambda: made.relay.counters().waiting == 1)
    assert len(made.user.requests) == 1
    hold.release()
    assert (await client.message(1)).status == 200


@pytest.mark.parametrize("begun", ["", "length", "chunks"])
async def test_the_timeout_of_the_first_request(rig: MakeRig, switch: Switch, begun: str) -> None:
    async def stall(peer: Peer, got: Request) -> None:
        how = {"length": "Content-Length: 9", "chunks": "Transfer-Encoding: chunked"}
        if begun:
            piece = "abc" if begun == "length" else "3\r\nabc\r\n"
            await peer.send(f"HTTP/1.1 200 OK\r\n{how[begun]}\r\n\r\n{piece}".encode())
        await hang(peer, got)

    made = await rig(timeout=0.2)
    made.user.on("/first", stall)
    client = await switch(made)
    client.begin()
    got = await client.message(1)
    if not begun:
        assert (got.status, got.body) == (504, b"request timeout")
    elif begun == "length":
        assert (got.body, got.reset) == (b"abc", 1)
    else:
        assert (got.body, got.reset) == (b"abcrequest timeout", None)
    async with asyncio.timeout(PATIENCE):
        await made.user.wait_for(lambda: made.user.open == 0)


async def test_the_connection_of_the_first_request_serves_the_next_client(
    rig: MakeRig, switch: Switch
) -> None:
    made = await rig()
    client = await switch(made)
    client.begin()
    await client.message(1)
    other = await made.client()
    assert (await other.get("/next")).status == 200
    assert made.user.connections == 1
