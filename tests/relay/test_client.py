"""HttpClient: many small requests to one address; nothing is ever sent twice."""

import asyncio
import socket
from collections.abc import AsyncIterator
from functools import partial

import pytest

from tests.relay.rig import Closed, Hold, Peer, Request, UserContainer, die, hang, ok
from weir.proxy.wire.client import HttpClient, TransportError
from weir.proxy.wire.connection import Connection
from weir.proxy.wire.pool import IdlePool
from weir.proxy.wire.protocol import as_protocol

HEAD = b"POST %s HTTP/1.1\r\nHost: sink\r\nCe-Id: 1\r\n"


@pytest.fixture
async def sink() -> AsyncIterator[UserContainer]:
    container = UserContainer()
    await container.start()
    yield container
    await container.stop()


async def test_a_request_and_its_response(sink: UserContainer) -> None:
    sink.on("/", ok(b"thanks", "X-One:  1 ", "x-two: 2", status="202 Accepted"))
    client = HttpClient("127.0.0.1", sink.port)
    response = await client.request(HEAD % b"/", b"hello", 5)
    assert (response.status, response.body) == (202, b"thanks")
    assert response.headers == ((b"content-length", b"6"), (b"x-one", b"1"), (b"x-two", b"2"))
    assert response.header(b"x-two") == b"2"
    assert response.header(b"x-three") is None
    (got,) = sink.requests
    assert got.head == HEAD % b"/" + b"Content-Length: 5\r\n\r\n"
    assert got.body == b"hello"
    await client.close()


async def test_a_host_may_be_a_name(sink: UserContainer) -> None:
    client = HttpClient("localhost", sink.port)
    assert (await client.request(HEAD % b"/", b"", 5)).status == 200
    await client.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ok(b"abcde"),
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nabcde",
    ],
)
async def test_every_framing_is_read_whole_and_the_connection_kept(
    sink: UserContainer, answer: bytes
) -> None:
    sink.on("/", answer)
    client = HttpClient("127.0.0.1", sink.port)
    for _ in range(3):
        assert (await client.request(HEAD % b"/", b"", 5)).body == b"abcde"
    assert sink.connections == 1
    await client.close()


async def test_a_body_that_the_end_of_the_connection_ends(sink: UserContainer) -> None:
    async def answer(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
        peer.close()
        raise Closed

    sink.on("/", answer)
    client = HttpClient("127.0.0.1", sink.port)
    for _ in range(2):
        assert (await client.request(HEAD % b"/", b"", 5)).body == b"abc"
    await client.close()


async def test_when_all_connections_are_busy_requests_wait_first_in_first_out(
    sink: UserContainer,
) -> None:
    hold = Hold()
    sink.on("/", hold)
    client = HttpClient("127.0.0.1", sink.port, limit=2)
    futures = [client.request(HEAD % b"/", b"%d" % number, 30) for number in range(20)]
    await sink.received(2)
    for served in range(20):
        hold.release()
        await sink.received(min(served + 3, 20))
    assert {(await future).body for future in futures} == {b"held"}
    assert sink.connections == 2
    order = [int(got.body) for got in sink.requests]
    assert sorted(order[:2]) == [0, 1]
    assert order[2:] == list(range(2, 20))
    await client.close()


async def test_nobody_listens_so_nothing_was_sent(sink: UserContainer) -> None:
    await sink.stop()
    client = HttpClient("127.0.0.1", sink.port)
    with pytest.raises(TransportError, match="connection refused") as caught:
        await client.request(HEAD % b"/", b"", 5)
    assert caught.value.refused
    assert not caught.value.sent
    await client.close()


async def test_each_waiting_request_fails_by_its_own_dial(sink: UserContainer) -> None:
    await sink.stop()
    client = HttpClient("127.0.0.1", sink.port, limit=1)
    futures = [client.request(HEAD % b"/", b"", 30) for _ in range(5)]
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert all(isinstance(result, TransportError) for result in results)
    await client.close()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (die, "EOF"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "malformed"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "switched protocols"),
        (ok(b"x" * 2000), "longer than 1000 bytes"),
    ],
)
async def test_answers_that_are_none_may_have_been_sent(
    sink: UserContainer, answer: bytes, text: str
) -> None:
    sink.on("/", answer)
    client = HttpClient("127.0.0.1", sink.port, body_limit=1000)
    with pytest.raises(TransportError, match=text) as caught:
        await client.request(HEAD % b"/", b"", 5)
    assert caught.value.sent
    assert (await client.request(HEAD % b"/fine", b"", 5)).status == 200
    await client.close()


async def test_a_peer_that_takes_too_long_is_let_go(sink: UserContainer) -> None:
    sink.on("/", hang)
    client = HttpClient("127.0.0.1", sink.port, limit=1)
    slow = client.request(HEAD % b"/", b"", 0.1)
    behind = client.request(HEAD % b"/behind", b"", 0.05)
    with pytest.raises(TransportError, match="in time") as caught:
        await behind
    assert not caught.value.sent
    with pytest.raises(TransportError, match="in time") as caught:
        await slow
    assert caught.value.sent
    await sink.wait_for(lambda: sink.open == 0)
    assert (await client.request(HEAD % b"/fine", b"", 5)).status == 200
    await client.close()


async def test_a_cancelled_request_that_waits_is_never_sent(sink: UserContainer) -> None:
    hold = Hold()
    sink.on("/", hold)
    client = HttpClient("127.0.0.1", sink.port, limit=1)
    first = client.request(HEAD % b"/", b"1", 30)
    second = client.request(HEAD % b"/", b"2", 30)
    third = client.request(HEAD % b"/", b"3", 30)
    await sink.received(1)
    second.cancel()
    hold.release(2)
    await first
    await third
    assert [got.body for got in sink.requests] == [b"1", b"3"]
    await client.close()


async def test_a_cancelled_request_that_was_sent_does_not_spoil_the_next(
    sink: UserContainer,
) -> None:
    hold = Hold()
    sink.on("/", hold)
    client = HttpClient("127.0.0.1", sink.port, limit=1)
    first = client.request(HEAD % b"/", b"1", 30)
    await sink.received(1)
    first.cancel()
    hold.release()
    assert (await client.request(HEAD % b"/echo", b"2", 30)).body.endswith(b"2")
    await client.close()


async def test_a_sink_that_closes_after_each_answer_costs_connections_and_no_requests(
    sink: UserContainer,
) -> None:
    async def answer(peer: Peer, got: Request) -> None:
        await peer.send(ok(got.body, "Connection: close"))
        peer.close()
        raise Closed

    sink.on("/", answer)
    client = HttpClient("127.0.0.1", sink.port, limit=2)
    futures = [client.request(HEAD % b"/", b"%d" % number, 30) for number in range(20)]
    assert [int((await future).body) for future in futures] == list(range(20))
    await client.close()


async def test_an_idle_connection_is_closed_after_its_time(sink: UserContainer) -> None:
    client = HttpClient("127.0.0.1", sink.port, idle=0.1)
    await client.request(HEAD % b"/", b"", 5)
    await sink.wait_for(lambda: sink.open == 0)
    await client.close()


async def test_closing_fails_what_runs_and_what_waits_and_may_be_repeated(
    sink: UserContainer,
) -> None:
    sink.on("/", hang)
    client = HttpClient("127.0.0.1", sink.port, limit=1)
    futures = [client.request(HEAD % b"/", b"", 30) for _ in range(3)]
    await sink.received(1)
    await client.close()
    await client.close()
    for future, sent in zip(futures, (True, False, False), strict=True):
        with pytest.raises(TransportError, match="closed") as caught:
            await future
        assert caught.value.sent is sent
    with pytest.raises(TransportError, match="closed"):
        await client.request(HEAD % b"/", b"", 30)
    await sink.wait_for(lambda: sink.open == 0)


async def test_a_connection_whose_peer_has_closed_is_not_taken_before_the_loop_has_seen_it() -> (
    None
):
    """The FIN is in the kernel, connection_lost was not called: the pool asks the kernel."""
    listener = socket.create_server(("127.0.0.1", 0))
    loop = asyncio.get_running_loop()
    pool = IdlePool(10, 60.0, loop.time)
    peers = []
    for _ in range(2):
        sock = socket.create_connection(listener.getsockname())
        sock.setblocking(False)
        peers.append(listener.accept()[0])
        connection = Connection(pool.drop)
        await loop.create_connection(partial(as_protocol, connection), sock=sock)
        pool.put(connection, loop.time())
    newest = pool.take(careful=True)
    assert newest is not None
    pool.put(newest, loop.time())
    peers[1].close()
    older = pool.take(careful=True)
    assert older is not None
    assert older is not newest
    peers[0].sendall(b"HTTP/1.1 408 Request Timeout\r\n\r\n")  # said unasked: as good as closed
    pool.put(older, loop.time())
    assert pool.take(careful=True) is None
    pool.close()
    for sock in (*peers, listener):
        sock.close()
