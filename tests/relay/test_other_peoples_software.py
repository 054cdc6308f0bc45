"""Real clients through the relay to a real server: curl, a websocket client, an aiohttp app.

The other tests speak raw bytes, which proves what is on the wire; this proves that software that
nobody wrote for Weir gets along with it.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from weir.proxy.contract import RevisionSettings
from weir.proxy.probes import Prober
from weir.proxy.relay import Relay
from weir.proxy.wire.dial import dial_here

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
LARGE = 3_000_000


async def echo_socket(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(max_msg_size=2 * LARGE)
    await socket.prepare(request)
    async for message in socket:
        if message.type is aiohttp.WSMsgType.TEXT:
            await socket.send_str(message.data)
        else:
            await socket.send_bytes(message.data)
    return socket


async def describe(request: web.Request) -> web.Response:
    body = await request.read()
    version = f"{request.version.major}.{request.version.minor}"
    return web.json_response(
        {"version": version, "size": len(body), "host": request.host, "path": request.raw_path}
    )


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    async for piece in request.content.iter_any():
        await response.write(piece)
    return response


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """Of the relay, which stands in front of the app."""
    app = web.Application(client_max_size=2 * LARGE)
    app.router.add_get("/socket", echo_socket)
    app.router.add_route("*", "/stream", stream)
    app.router.add_route("*", "/{any:.*}", describe)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    revision = RevisionSettings(user_port=runner.addresses[0][1])
    relay = Relay(revision, dial=dial_here, prober=Prober(revision, dial_here))
    server = await asyncio.get_running_loop().create_server(relay.protocol, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        relay.abort()
        await runner.cleanup()


async def curl(*arguments: str) -> str:
    # not by the loop: uvloop forks, and in a fork the SDKs of other tests start their threads anew
    command = ["curl", "-sS", "--max-time", "30", *arguments]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_curl
@pytest.mark.parametrize(("version", "seen"), [("--http1.0", "1"), ("--http1.1", "1.1")])
async def test_curl_is_answered_in_its_own_version(url: str, version: str, seen: str) -> None:
    show = ("-o", "/dev/null", "-w", "%{http_version} %{http_code}")
    assert await curl(version, *show, f"{url}/a//b?c=%2F") == f"{seen} 200"
    told = await curl(version, f"{url}/a//b?c=%2F")
    assert '"version": "1.1"' in told, "the user container is always asked in 1.1"
    assert '"path": "/a//b?c=%2F"' in told


@needs_curl
async def test_curl_uploads_with_expect_and_gets_its_answer(url: str) -> None:
    data = "x" * 100_000
    arguments = ("-H", "Expect: 100-continue", "--data-binary", data, f"{url}/upload")
    assert '"size": 100000' in await curl(*arguments)


@needs_curl
async def test_curl_uploads_chunked(url: str) -> None:
    arguments = ("-H", "Transfer-Encoding: chunked", "--data-binary", "hello", f"{url}/upload")
    assert '"size": 5' in await curl(*arguments)


@needs_curl
async def test_curl_reuses_its_connection(url: str) -> None:
    show = ("-w", "%{num_connects} ", "-o", "/dev/null")
    told = await curl(*show, f"{url}/1", "--next", *show, f"{url}/2", "--next", *show, f"{url}/3")
    assert told.split() == ["1", "0", "0"]


async def test_a_websocket_echoes_texts_and_large_binaries_and_closes_cleanly(url: str) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{url}/socket", max_msg_size=2 * LARGE, autoclose=True) as socket,
    ):
        await socket.send_str("hello")
        assert await socket.receive_str() == "hello"
        data = bytes(range(256)) * (LARGE // 256)
        await socket.send_bytes(data)
        assert await socket.receive_bytes() == data
        await socket.ping(b"are you there")
        await socket.close(code=1000)
        assert socket.close_code == 1000


async def test_a_body_streams_both_ways_at_once(url: str) -> None:
    """Full duplex: each piece comes back before the next one is sent."""
    returned = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            returned.clear()
            yield b"p" * 10_000
            await returned.wait()

    size = 0
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/stream", data=pieces()) as response,
    ):
        async for piece in response.content.iter_any():
            size += len(piece)
            if size % 10_000 == 0:
                returned.set()
    assert size == 200_000
