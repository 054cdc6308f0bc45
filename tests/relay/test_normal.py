"""Plain requests, as the recordings of the real queue-proxy show them (contract 3.3, 3.5).

Header order and spelling are the client's own with us; upstream sorts and canonicalises, so what
the user container gets is compared as a set of fields.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from tests.relay.rig import Rig, request, without_date

MakeRig = Callable[..., Awaitable[Rig]]


@dataclass(frozen=True)
class Case:
    name: str
    sent: str
    received: str
    """Request line and fields at the user container, one a line, behind the usual ones."""
    usual: bool = True


USUAL = ("Host: bench.example.com", "User-Agent: curl/8")

CASES = [
    Case("a plain GET", "GET / HTTP/1.1", "GET / HTTP/1.1\nX-Forwarded-For: 127.0.0.1"),
    Case(
        "connection headers stay here",
        "GET / HTTP/1.1\nConnection: close",
        "GET / HTTP/1.1\nX-Forwarded-For: 127.0.0.1",
    ),
    Case(
        "X-Forwarded-* become Forwarded, before the peer is appended",
        "GET / HTTP/1.1\nX-Forwarded-For: 10.1.2.3, fd00::1\nX-Forwarded-Proto: https\n"
        "X-Forwarded-Host: a.example.com",
        "GET / HTTP/1.1\nX-Forwarded-For: 10.1.2.3, fd00::1, 127.0.0.1\n"
        "X-Forwarded-Proto: https\nX-Forwarded-Host: a.example.com\n"
        'Forwarded: for=10.1.2.3;host=a.example.com;proto=https, for="[fd00::1]"',
    ),
    Case(
        "a Forwarded that is there is left alone",
        "GET / HTTP/1.1\nForwarded: for=1.2.3.4\nX-Forwarded-For: 10.1.2.3",
        "GET / HTTP/1.1\nForwarded: for=1.2.3.4\nX-Forwarded-For: 10.1.2.3, 127.0.0.1",
    ),
    Case(
        "several X-Forwarded-For lines are one list",
        "GET / HTTP/1.1\nX-Forwarded-For: 10.0.0.1\nx-forwarded-for: 10.0.0.2\nForwarded: x",
        "GET / HTTP/1.1\nX-Forwarded-For: 10.0.0.1, 10.0.0.2, 127.0.0.1\nForwarded: x",
    ),
    Case(
        "Knative's own headers: two pruned, Host restored, the rest passed",
        "GET / HTTP/1.1\nHost: bench.example.com\nUser-Agent: curl/8\n"
        "Knative-Serving-Namespace: default\nKnative-Serving-Revision: bench-00001\n"
        "K-Proxy-Request: activator\nK-Original-Host: orig.example.com\n"
        "Knative-Serving-Tag: blue\nKnative-Serving-Default-Route: true\n"
        "K-Passthrough-Lb: true\nK-Network-Hash: abc",
        "GET / HTTP/1.1\nHost: orig.example.com\nUser-Agent: curl/8\nK-Proxy-Request: activator\n"
        "Knative-Serving-Tag: blue\nKnative-Serving-Default-Route: true\n"
        "K-Passthrough-Lb: true\nK-Network-Hash: abc\nX-Forwarded-For: 127.0.0.1",
        usual=False,
    ),
    Case(
        "an activator that blanks Host",
        "GET / HTTP/1.1\nHost:\nK-Original-Host: orig.example.com",
        "GET / HTTP/1.1\nHost: orig.example.com\nX-Forwarded-For: 127.0.0.1",
        usual=False,
    ),
    Case(
        "hop-by-hop headers go, also those that Connection names; TE: trailers stays",
        "GET / HTTP/1.1\nConnection: keep-alive, X-Hop\nX-Hop: 1\nKeep-Alive: timeout=5\n"
        "TE: trailers\nProxy-Authorization: Basic x\nProxy-Connection: close\n"
        "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n"
        "X-B3-TraceId: 80f198ee56343ba8",
        "GET / HTTP/1.1\nTe: trailers\nX-Forwarded-For: 127.0.0.1\n"
        "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n"
        "X-B3-TraceId: 80f198ee56343ba8",
    ),
    Case(
        "Connection can't name the framing away",
        "GET / HTTP/1.1\nConnection: Host, Content-Length\nContent-Length: 0",
        "GET / HTTP/1.1\nContent-Length: 0\nX-Forwarded-For: 127.0.0.1",
    ),
    Case(
        "no User-Agent is invented",
        "GET / HTTP/1.1\nHost: x",
        "GET / HTTP/1.1\nHost: x\nX-Forwarded-For: 127.0.0.1",
        usual=False,
    ),
    Case(
        "the request target is kept byte for byte",
        "GET /a%2Fb//c/../d?x=%zz;y=1&z HTTP/1.1",
        "GET /a%2Fb//c/../d?x=%zz;y=1&z HTTP/1.1\nX-Forwarded-For: 127.0.0.1",
    ),
    Case(
        "the host of an absolute target is the Host",
        "GET http://other.example.com:81/p?q HTTP/1.1",
        "GET /p?q HTTP/1.1\nHost: other.example.com:81\nUser-Agent: curl/8\n"
        "X-Forwarded-For: 127.0.0.1",
    ),
    Case(
        "an absolute target without a path asks for the root",
        "GET http://other.example.com HTTP/1.1",
        "GET / HTTP/1.1\nHost: other.example.com\nUser-Agent: curl/8\nX-Forwarded-For: 127.0.0.1",
    ),
    Case(
        "CONNECT is a request like any other",
        "CONNECT host:443 HTTP/1.1",
        "CONNECT host:443 HTTP/1.1\nHost: host:443\nUser-Agent: curl/8\nX-Forwarded-For: 127.0.0.1",
    ),
    Case(
        "a method that nobody has heard of",
        "FETCH-ALL / HTTP/1.1",
        "FETCH-ALL / HTTP/1.1\nX-Forwarded-For: 127.0.0.1",
    ),
    Case(
        "headers that look alike but are others",
        "GET / HTTP/1.1\nTeapot: x\nK-Original-Hosts: y\nKnative-Serving-Revisions: z",
        "GET / HTTP/1.1\nTeapot: x\nK-Original-Hosts: y\nKnative-Serving-Revisions: z\n"
        "X-Forwarded-For: 127.0.0.1",
    ),
    Case(
        "h2c by upgrade is ignored, the request is served",
        "GET / HTTP/1.1\nConnection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: AAMA",
        "GET / HTTP/1.1\nX-Forwarded-For: 127.0.0.1",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_what_the_user_container_gets(rig: MakeRig, case: Case) -> None:
    first, *fields = case.sent.split("\n")
    if case.usual:
        fields = [*USUAL, *fields]
    expected_first, *expected = case.received.split("\n")
    if case.usual and not any(line.startswith("Host:") for line in expected):
        expected = [*USUAL, *expected]

    made = await rig()
    client = await made.client()
    response = await client.ask("\r\n".join([first, *fields, "", ""]))

    assert response.status == 200
    (got,) = made.user.requests
    assert got.line == expected_first
    assert sorted(f"{name}: {value}" for name, value in got.fields) == sorted(expected)


async def test_spelling_order_and_spacing_of_headers_stay_the_clients(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    await client.ask(
        "GET / HTTP/1.1\r\nx-LOWER:1\r\nHOST:   example.com\r\nX-Empty:\r\nAccept: \t a \t\r\n\r\n"
    )
    assert made.user.requests[0].head == (
        b"GET / HTTP/1.1\r\nx-LOWER:1\r\nHOST:   example.com\r\nX-Empty:\r\nAccept: \t a \t\r\n"
        b"X-Forwarded-For: 127.0.0.1\r\n\r\n"
    )


async def test_a_response_passes_with_date_added_and_hop_by_hop_headers_removed(
    rig: MakeRig,
) -> None:
    made = await rig()
    made.user.on(
        "/r",
        b"HTTP/1.1 418 I'm a teapot\r\nContent-Length: 2\r\nKeep-Alive: timeout=5\r\n"
        b"Connection: keep-alive, X-Private\r\nX-Private: 1\r\nx-odd_Name:  kept \r\n"
        b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n\r\nhi",
    )
    client = await made.client()
    response = await client.get("/r")
    assert without_date(response.head) == (
        b"HTTP/1.1 418 I'm a teapot\r\nContent-Length: 2\r\nx-odd_Name:  kept \r\n"
        b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nDate: -\r\n\r\n"
    )
    assert response.body == b"hi"


async def test_a_date_that_is_there_stays(rig: MakeRig) -> None:
    made = await rig()
    made.user.on("/r", b"HTTP/1.1 200 OK\r\ndate: yesterday\r\nContent-Length: 0\r\n\r\n")
    client = await made.client()
    for _ in range(2):  # the second comes from the memory of known heads
        response = await client.get("/r")
        assert response.head == b"HTTP/1.1 200 OK\r\ndate: yesterday\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("status", ["404 Not Found", "503 Service Unavailable", "500 Oh No"])
async def test_errors_of_the_user_container_are_its_own(rig: MakeRig, status: str) -> None:
    made = await rig()
    made.user.on("/e", f"HTTP/1.1 {status}\r\nContent-Length: 3\r\n\r\nbad".encode())
    client = await made.client()
    response = await client.get("/e")
    assert response.head.startswith(f"HTTP/1.1 {status}\r\n".encode())
    assert response.body == b"bad"
    assert response.field("x-content-type-options") is None


async def test_a_client_that_wants_to_close_reads_close_and_eof(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    response = await client.get("/", "Connection: close")
    assert response.fields[-1] == ("Connection", "close")
    assert await client.closed()


async def test_an_http_1_0_client_is_served_in_its_version_and_closed(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    response = await client.ask("GET / HTTP/1.0\r\nHost: x\r\n\r\n")
    assert response.head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert response.field("connection") is None
    assert response.body.startswith(b"GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 127.0.0.1")
    assert await client.closed()


async def test_an_http_1_0_client_without_host_gets_one(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    await client.ask("GET / HTTP/1.0\r\n\r\n")
    assert made.user.requests[0].field("host") == f"127.0.0.1:{made.user.port}"


async def test_an_http_1_0_client_may_keep_the_connection(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    for _ in range(2):
        response = await client.ask("GET / HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n")
        assert response.field("connection") == "keep-alive"


async def test_options_star_is_answered_by_the_relay_itself(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    response = await client.ask(request("OPTIONS", "*"))
    assert response.status == 200
    assert response.field("content-length") == "0"
    assert made.user.requests == []


async def test_many_requests_use_one_connection_on_either_side(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    for number in range(10):
        assert (await client.get(f"/{number}")).status == 200
    assert made.user.connections == 1


async def test_pipelined_requests_are_answered_in_order(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    await client.send(b"".join(request("GET", f"/{number}") for number in range(50)))
    for number in range(50):
        response = await client.response()
        assert response.body.startswith(f"GET /{number} ".encode())


async def test_a_pipelined_probe_waits_for_the_request_before_it(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    await client.send(
        request("GET", "/first")
        + request("GET", "/", "K-Network-Probe: probe", "K-Network-Hash: h")
        + request("GET", "/last")
    )
    assert (await client.response()).body.startswith(b"GET /first ")
    assert (await client.response()).field("k-network-hash") == "h"
    assert (await client.response()).body.startswith(b"GET /last ")


async def test_an_empty_line_before_a_request_is_skipped(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    assert (await client.ask(b"\r\n" + request("GET", "/"))).status == 200
