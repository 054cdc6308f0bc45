"""`weir sidecar` answers as the queue-proxy of August 2026 was recorded to (recordings/).

The recordings are bytes of a later release than the one that the differential test builds. What
they tell is compared but for Date, the order and the spelling of fields, and what is in WEIR.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.contract.campaign import WEIR
from tests.contract.user import User, ok
from tests.contract.world import LATE, Caller, World
from tests.pods import why_no_pods
from tests.relay.rig import Closed, Peer, Request, die, parse_fields, request

USER = 8081
MAIN = {
    "USER_PORT": str(USER),
    "SERVING_REQUEST_METRICS_BACKEND": None,
    "OBSERVABILITY_CONFIG": '{"requestMetrics":{"protocol":"none"},"tracing":{"protocol":"none"}}',
}
GROUPS = [
    group
    for path in sorted(Path(__file__).with_name("recordings").glob("*.yaml"))
    for group in yaml.safe_load(path.read_text())
]
WEIR_SAYS: dict[str, tuple[str, dict[str, tuple[Any, Any]]]] = {
    "POST chunked with trailer": (
        "trailers of requests are relayed; the recording has none",
        {"trailers": ("", "X-T: v\r\n")},
    ),
    "CL + TE": (
        "two lengths can be read in two ways, so they are refused",
        {
            "status": ("HTTP/1.1 200 OK", "HTTP/1.1 400 Bad Request"),
            "then": ("open", "closed"),
            "content-type": ("text/plain", "text/plain; charset=utf-8"),
            "x-backend": ("raw", None),
            "date": ("-", None),
            "connection": (None, "close"),
            "body": (None, "400 Bad Request"),
            "user": ("POST / HTTP/1.1", None),
            "user host": ("x", None),
            "user transfer-encoding": ("chunked", None),
            "user x-forwarded-for": ("127.0.0.1", None),
            "user body": ("a", None),
            "trailers": ("", None),
        },
    ),
}
"""Named differences: why, and fact -> (recorded, Weir's)."""

pytestmark = pytest.mark.skipif(why_no_pods() is not None, reason=str(why_no_pods()))


async def echo(peer: Peer, got: Request) -> None:
    body = b"" if got.line.startswith("HEAD ") else got.head + got.body
    status = "200 OK"
    if "code=" in got.path:
        code = got.path.partition("code=")[2]
        status = f"{code} {({'404': 'Not Found', '503': 'Service Unavailable'}).get(code, 'Oh')}"
    if got.field("upgrade") == "echo":
        await peer.send(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
        )
        await peer.rest()
        raise Closed
    await peer.send(ok(body, "X-Backend: raw", status=status))


async def stream(peer: Peer, _: Request) -> None:
    await peer.send(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    for number in range(3):
        await asyncio.sleep(0.1)
        await peer.send(b"9\r\ndata: %d\n\n\r\n" % number)
    await peer.send(b"0\r\n\r\n")


async def half(peer: Peer, _: Request) -> None:
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 10\r\n\r\nabc")
    peer.close()
    raise Closed


def recorded_user(user: User) -> None:
    """The user container of the recordings."""
    for path in ("/", "/status", "/a%2Fb//c/../d", "host:443", "/healthz", "/noread"):
        user.on(path, echo, unread=path == "/noread")
    user.on("/stream", stream)
    user.on("/die", die)
    user.on("/half", half)
    user.on("/sleep", user.slow(1.5))
    user.on("/hang", user.hang)


@pytest.mark.parametrize("group", GROUPS, ids=[group["group"] for group in GROUPS])
async def test_weir_answers_as_recorded_with(group: dict[str, Any]) -> None:
    async with World(WEIR, {**MAIN, **group["settings"]}) as world:
        if group.get("listens", True):
            await world.user.start(world.place.listen(USER))
        recorded_user(world.user)
        busy = [await world.client() for _ in range(group.get("busy", 0))]
        for client in busy:
            await client.send(request("GET", "/hang"))
        while busy and (await world.windows(1))[0]["average_concurrent_requests"] < len(busy):
            pass
        wrong = [line for each in group["exchanges"] for line in await compared(world, each)]
        assert not wrong, "\n" + "\n".join(wrong)


async def compared(world: World, recorded: dict[str, Any]) -> list[str]:
    name = recorded["name"]
    before = len(world.user.requests)
    facts = await exchange(world, recorded)
    asked = [got for got in world.user.requests[before:] if got.path.startswith(("/", "host"))]
    expected = expectation(recorded)
    if "user" in recorded or name in WEIR_SAYS:
        facts.update(seen(asked[0]) if asked else {})
    _, named = WEIR_SAYS.get(name, ("", {}))
    wrong = []
    for fact in sorted({*facts, *expected}):
        pair = (expected.get(fact), facts.get(fact))
        if fact == "content-length" and ("user" in recorded or name == "HEAD"):
            continue  # of an echo, which has the names as they were spelled
        if fact in named:
            if pair != named[fact] or pair[0] == pair[1]:
                wrong.append(f"{name}: {fact}: named {named[fact]}, is {pair}")
        elif pair[0] != pair[1]:
            wrong.append(f"{name}: {fact}: recorded {pair[0]!r}, Weir says {pair[1]!r}")
    return wrong


def expectation(recorded: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"then": recorded["then"], "after": recorded.get("after", 0)}
    if "status" in recorded:
        facts["status"] = recorded["status"]
    facts |= {key.lower(): value for key, value in recorded.get("fields", {}).items()}
    facts["body"] = recorded.get("body")
    user = recorded.get("user")
    if user:
        fields = {f"user {key.lower()}": value for key, value in user["fields"].items()}
        facts |= {"user": user["line"], **fields, "user body": user.get("body", "")}
        facts["trailers"] = ""
        del facts["body"]
    return facts


def seen(got: Request) -> dict[str, Any]:
    fields = {f"user {key.lower()}": value for key, value in got.fields}
    if len(fields.get("user x-big", "")) > 1000:
        fields["user x-big"] = "pad"
    body = "" if got.path == "/noread" else got.body.decode()
    return {"user": got.line, **fields, "user body": body, "trailers": got.trailers.decode()}


async def exchange(world: World, recorded: dict[str, Any]) -> dict[str, Any]:
    """Say what was said then, and what comes of it."""
    client = await world.client()
    if "pad" in recorded:
        data = request("GET", "/", f"X-Big: {'a' * recorded['pad']}")
        data = data.replace(b"example.com", b"bench.default.example.com", 1)
    else:
        head, _, body = recorded["sent"].partition("\n\n")
        chunked = "chunked" in head
        data = (head + "\n\n" + (body if chunked else "")).replace("\n", "\r\n").encode()
        data += b"" if chunked else body.encode()
    data += b"x" * recorded.get("sent_body", 0)
    client.writer.write(data)
    begun = time.monotonic()
    facts: dict[str, Any] = {"after": 0, "then": "open", "body": None}
    client.patience = 12.0
    try:
        response = await client.response(data.split(b" ", 1)[0].decode())
    except Closed:
        facts["then"] = "closed"
        return facts
    elapsed = time.monotonic() - begun
    due = recorded.get("after", 0)
    facts["after"] = due if due - 0.06 < elapsed < due + LATE else elapsed
    facts["status"] = response.head.split(b"\r\n", 1)[0].decode()
    facts |= {key.lower(): value for key, value in response.fields}
    if "date" in facts:
        facts["date"] = "-"
    if "user" not in recorded or not world.user.requests:
        facts["body"] = response.body.decode() or None
    elif recorded["name"] != "CL + TE":
        del facts["body"]
        parse_fields(response.body.partition(b"\r\n\r\n")[0])
    else:
        facts["body"] = response.body.decode()
    facts["then"] = "closed" if await ends(client) else "open"
    return facts


async def ends(client: Caller) -> bool:
    """Is the connection closed behind the response? An open one says nothing for a moment."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.15):
            return await client.reader.read(1) == b""
    return False
