"""When one side breaks, dies or lies (contract 3.12), and input that smells of smuggling."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable

import pytest

from tests.relay.rig import (
    Closed,
    Hold,
    Peer,
    Request,
    Rig,
    die,
    hang,
    ok,
    post,
    request,
    without_date,
)
from weir.proxy import contract

MakeRig = Callable[..., Awaitable[Rig]]


def bad_gateway(text: bytes) -> bytes:
    return (
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"X-Content-Type-Options: nosniff\r\nDate: -\r\nContent-Length: %d\r\n\r\n" % len(text)
    )


@pytest.mark.parametrize("data", [request("GET", "/"), post("/", b"x" * 100)])
async def test_nobody_listens_on_the_user_port(rig: MakeRig, data: bytes) -> None:
    made = await rig()
    await made.user.stop()
    client = await made.client()
    response = await client.ask(data)
    text = b"dial tcp 127.0.0.1:%d: connect: connection refused\n" % made.user.port
    assert without_date(response.head) == bad_gateway(text)
    assert response.body == text
    await made.user.start(made.user.port)
    assert (await client.get("/")).status == 200  # the client's connection was kept


@pytest.mark.parametrize("data", [request("GET", "/die"), post("/die", b"x")])
async def test_the_user_container_closes_without_an_answer(rig: MakeRig, data: bytes) -> None:
    made = await rig()
    made.user.on("/die", die)
    client = await made.client()
    response = await client.ask(data)
    assert without_date(response.head) == bad_gateway(b"EOF\n")
    assert response.body == b"EOF\n"


async def test_the_user_container_resets(rig: MakeRig) -> None:
    made = await rig()

    async def reset(peer: Peer, _: Request) -> None:
        peer.reset()
        raise Closed

    made.user.on("/reset", reset)
    client = await made.client()
    response = await client.get("/reset")
    assert (response.status, response.body) == (502, b"read: connection reset by peer\n")


async def test_an_idempotent_request_on_a_connection_gone_stale_is_sent_once_more(
    rig: MakeRig,
) -> None:
    made = await rig()
    made.user.on("/die", die)
    client = await made.client()
    assert (await client.get("/")).status == 200
    assert (await client.get("/die")).status == 502
    assert [got.path for got in made.user.requests] == ["/", "/die", "/die"]
    assert made.user.connections == 2


async def test_a_post_is_never_sent_twice(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/die", die)
    client = await made.client()
    assert (await client.get("/")).status == 200
    assert (await client.ask(post("/die", b"x"))).status == 502
    assert [got.path for got in made.user.requests] == ["/", "/die"]


async def test_nothing_is_repeated_once_bytes_of_a_response_have_come(rig: MakeRig) -> None:
    made = await rig()

    async def half_a_head(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-")
        peer.close()
        raise Closed

    made.user.on("/half", half_a_head)
    client = await made.client()
    assert (await client.get("/")).status == 200
    assert (await client.get("/half")).status == 502
    assert [got.path for got in made.user.requests] == ["/", "/half"]


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 100\r\n\r\nab", b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"]
)
async def test_the_user_container_dies_in_the_middle_of_a_body(
    rig: MakeRig, framing: bytes
) -> None:
    made = await rig()

    async def half(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\n" + framing)
        peer.close()
        raise Closed

    made.user.on("/half", half)
    client = await made.client()
    await client.send(request("GET", "/half"))
    await client.head()
    assert not (await client.rest()).endswith(b"0\r\n\r\n")
    assert made.relay.counters().in_flight == 0


async def test_an_unframed_body_that_ends_in_a_reset_is_no_whole_body(rig: MakeRig) -> None:
    made = await rig()
    begun = asyncio.Event()

    async def half(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nab")
        await begun.wait()
        peer.reset()
        raise Closed

    made.user.on("/half", half)
    client = await made.client()
    await client.send(request("GET", "/half"))
    await client.head()
    assert await client.exactly(7) == b"2\r\nab\r\n"
    begun.set()
    assert await client.rest() == b""  # above all no last chunk


async def test_kill_9_of_the_user_container_in_the_middle_of_a_body(rig: MakeRig) -> None:
    made = await rig()
    await made.user.stop()
    program = (
        "import socket,sys,time\n"
        f"s=socket.create_server(('127.0.0.1',{made.user.port}))\n"
        "print('up',flush=True)\n"
        "c,_=s.accept(); c.recv(65536)\n"
        "c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 1000000\\r\\n\\r\\n'+b'x'*1000)\n"
        "time.sleep(1000)\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"up\n"
        client = await made.client()
        await client.send(request("GET", "/"))
        await client.head()
        assert await client.exactly(1000) == b"x" * 1000
        os.kill(process.pid, signal.SIGKILL)
        assert await client.rest() == b""
        assert made.relay.counters().in_flight == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize(
    "response",
    [
        b"garbage\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 99 Low\r\n\r\n",
    ],
)
async def test_a_response_that_is_not_http_is_502_and_its_connection_is_not_used_again(
    rig: MakeRig, response: bytes
) -> None:
    made = await rig()
    made.user.on("/bad", response)
    client = await made.client()
    got = await client.get("/bad")
    assert got.status == 502
    assert got.body.startswith(b"malformed HTTP response: ")
    assert (await client.get("/")).status == 200
    assert made.user.connections == 2


async def test_bytes_behind_a_response_never_become_the_next_one(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/more", ok(b"first") + ok(b"poison"))
    client = await made.client()
    assert (await client.get("/more")).body == b"first"
    assert (await client.get("/")).body.startswith(b"GET / ")
    assert made.user.connections == 2


class TestTheClientLeaves:
    async def test_its_request_is_cut_off_at_the_user_container(self, rig: MakeRig) -> None:
        made = await rig()
        made.user.on("/hang", hang)
        client = await made.client()
        await client.send(request("GET", "/hang"))
        await made.user.received(1)
        client.close()
        await made.user.wait_for(lambda: made.user.open == 0)
        await made.settled(lambda: made.relay.counters().in_flight == 0)
        assert made.relay.counters().aborted == 1

    async def test_in_the_middle_of_its_upload(self, rig: MakeRig) -> None:
        made = await rig()
        made.user.on("/up", hang, unread=True)
        client = await made.client()
        await client.send(request("POST", "/up", "Content-Length: 1000") + b"x")
        await made.user.received(1)
        client.reset()
        await made.user.wait_for(lambda: made.user.open == 0)

    async def test_in_the_middle_of_its_download(self, rig: MakeRig) -> None:
        made = await rig()

        async def flood(peer: Peer, _: Request) -> None:
            await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                await peer.send(b"x" * 65536)

        made.user.on("/flood", flood)
        client = await made.client()
        await client.send(request("GET", "/flood"))
        await client.exactly(1_000_000)
        client.reset()
        await made.user.wait_for(lambda: made.user.open == 0)
        await made.settled(lambda: made.relay.counters().in_flight == 0)

    async def test_while_the_user_container_is_being_dialled(self, rig: MakeRig) -> None:
        """A listener with a full backlog answers no SYN."""
        made = await rig()
        port = made.user.port
        await made.user.stop()
        full = socket.create_server(("127.0.0.1", port), backlog=0)
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            client = await made.client()
            await client.send(request("GET", "/"))
            await made.settled(lambda: made.relay.counters().in_flight == 1)
            client.close()
            await made.settled(lambda: made.relay.counters().in_flight == 0)
        finally:
            for sock in (full, *fillers):
                sock.close()

    async def test_a_full_backlog_is_waited_for(self, rig: MakeRig) -> None:
        made = await rig()
        port = made.user.port
        await made.user.stop()
        full = socket.create_server(("127.0.0.1", port), backlog=0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        client = await made.client()
        await client.send(request("GET", "/"))
        await made.settled(lambda: made.relay.counters().in_flight == 1)
        for sock in (full, *fillers):
            sock.close()
        await made.user.start(port)
        assert (await client.response()).status in (200, 502)  # 502: a SYN met the closed port


BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Connection: close\r\n\r\n400 Bad Request"
)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nBad Header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\nb: c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: \x00\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET nothing HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n",
        b"GET /\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\na\n0\n\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1000000000000000\r\n",
        b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_smells_of_smuggling_is_400_and_the_end_of_the_connection(
    rig: MakeRig, data: bytes
) -> None:
    made = await rig()
    client = await made.client()
    await client.send(data + request("GET", "/smuggled"))
    assert await client.rest() == BAD_REQUEST
    assert made.user.requests == []
    assert made.relay.counters().in_flight == 0


async def test_a_body_that_breaks_later_cuts_the_request_off(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/up", hang, unread=True)
    client = await made.client()
    await client.send(request("POST", "/up", "Transfer-Encoding: chunked") + b"1\r\na\r\n")
    await made.user.received(1)
    await client.send(b"zz\r\n")
    assert await client.rest() == BAD_REQUEST
    await made.user.wait_for(lambda: made.user.open == 0)


async def test_a_transfer_coding_we_do_not_know_is_refused(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    await client.send(request("POST", "/", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n")
    assert (await client.rest()).startswith(b"HTTP/1.1 501 Not Implemented\r\n")


async def test_a_request_without_host_is_told_so(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    await client.send(b"GET / HTTP/1.1\r\n\r\n")
    assert await client.rest() == (
        b"HTTP/1.1 400 Bad Request: missing required Host header\r\n"
        b"Content-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
        b"400 Bad Request: missing required Host header"
    )


async def test_a_head_of_20_kb_passes_and_one_of_1_2_mb_is_431(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    response = await client.get("/", "X-Big: " + "a" * 20_000)
    assert b"X-Big: " + b"a" * 20_000 in response.body
    client.writer.write(request("GET", "/", "X-Big: " + "a" * 1_200_000))
    assert await client.rest() == (
        b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
        b"Content-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
        b"431 Request Header Fields Too Large"
    )


async def test_a_head_that_never_ends_is_431(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    client.writer.write(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200_000)
    assert (await client.rest()).startswith(b"HTTP/1.1 431 ")


async def test_a_client_that_dawdles_over_its_head_is_dropped(
    rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "READ_HEAD_SECONDS", 0.2)
    made = await rig()
    silent, slow, later = await made.client(), await made.client(), await made.client()
    assert (await later.get("/")).status == 200
    await later.send(b"GET / HT")

    async def dawdle() -> None:
        for letter in request("GET", "/"):
            await slow.send(bytes([letter]))
            await asyncio.sleep(0.05)

    dawdling = asyncio.create_task(dawdle())
    for client in (silent, slow, later):
        assert await client.closed()
    dawdling.cancel()
    assert len(made.user.requests) == 1


async def test_an_idle_connection_may_stay_after_its_first_request(
    rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "READ_HEAD_SECONDS", 0.1)
    made = await rig()
    idle, marker = await made.client(), await made.client()
    assert (await idle.get("/")).status == 200
    assert await marker.closed()  # opened later, dropped for saying nothing: the time is over
    assert (await idle.get("/")).status == 200


async def test_abort_ends_everything_at_once(rig: MakeRig) -> None:
    made = await rig(container_concurrency=1)
    hold = Hold()
    made.user.on("/hold", hold)
    running, waiting, idle = [await made.client() for _ in range(3)]
    await running.send(request("GET", "/hold"))
    await made.user.received(1)
    await waiting.send(request("GET", "/"))
    await made.settled(lambda: made.relay.counters().waiting == 1)
    made.relay.abort()
    made.relay.abort()
    for client in (running, waiting, idle):
        assert await client.closed()
    assert made.relay.counters().in_flight == 0
    hold.release()
