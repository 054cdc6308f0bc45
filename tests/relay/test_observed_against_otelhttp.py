"""The metrics page beside that of the libraries which Knative's queue-proxy uses since 1.19.

The same requests go through the relay and through a reverse proxy that is instrumented with
otelhttp and OpenTelemetry's exporter for Prometheus; both pages have to show the same series.
"""

import asyncio
import os
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.pods import go_command, why_no_go
from tests.relay.rig import Client, UserContainer, die, get, ok, post, request
from tests.relay.watched import Watched

MODULE = Path(__file__).parent / "otelhttp"

pytestmark = pytest.mark.skipif(why_no_go() is not None, reason=why_no_go() or "")


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The proxy, built; the modules it needs may have to be fetched."""
    binary = tmp_path_factory.mktemp("otelhttp") / "witness"
    go = go_command()
    assert go is not None
    env = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([go, *arguments], cwd=MODULE, env=env, capture_output=True, text=True)

    fetched = run("mod", "download")
    if fetched.returncode:
        pytest.skip(f"the witness's Go modules can't be fetched: {fetched.stderr[-300:]}")
    built = run("build", "-o", str(binary), ".")
    assert not built.returncode, built.stderr
    return binary


class Both:
    """The relay and the witness, before one user container."""

    def __init__(self, watched: Watched, process: asyncio.subprocess.Process) -> None:
        self.watched = watched
        self.process = process
        self.port = self.metrics = 0

    async def listening(self) -> None:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        self.port, self.metrics = map(int, line.split())

    async def _witness(self, port: int) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, data: bytes) -> None:
        """Send it to both, on a connection of its own; their statuses agree."""
        theirs, ours = await self._witness(self.port), await self.watched.rig.client()
        statuses = {(await client.ask(data)).status for client in (theirs, ours)}
        theirs.close()
        ours.close()
        assert len(statuses) == 1

    async def pages(self) -> tuple[list[str], list[str]]:
        """Of the witness and of the relay: all that doesn't depend on how long things took."""
        client = await self._witness(self.metrics)
        page = (await client.get("/metrics")).body.decode()
        client.close()
        return _comparable(page.splitlines()), _comparable(self.watched.current.lines())


def _comparable(lines: list[str]) -> list[str]:
    kept = []
    for line in lines:
        if re.match(r"(# (HELP|TYPE) )?(kn_|target_|process_)", line):
            continue  # what otelhttp has no part in
        if re.match(r"\w+_seconds_(bucket|sum)", line):
            line = line.rpartition(" ")[0]
        kept.append(line)
    return kept


@pytest.fixture
async def both(watch: Callable[..., Awaitable[Watched]], witness: Path) -> AsyncIterator[Both]:
    watched = await watch()
    process = await asyncio.create_subprocess_exec(
        witness, str(watched.rig.user.port), stdout=asyncio.subprocess.PIPE
    )
    made = Both(watched, process)
    await made.listening()
    yield made
    process.kill()
    await process.wait()


def described(user: UserContainer) -> None:
    user.on("/created", ok(b"made it", status="201 Created"))
    user.on("/nothing", b"HTTP/1.1 204 No Content\r\n\r\n")
    user.on("/broken", ok(b"x" * 5000, status="500 Internal Server Error"))
    user.on(
        "/chunked", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )
    user.on("/head", b"HTTP/1.1 200 OK\r\nContent-Length: 77\r\n\r\n")
    user.on("/die", die)


REQUESTS = {
    "an ordinary request": get("/created"),
    "a body": post("/created", b"0123456789"),
    "a body in chunks": request("POST", "/created", "Transfer-Encoding: chunked")
    + b"3\r\nabc\r\n0\r\n\r\n",
    "no content": get("/nothing"),
    "an error": get("/broken"),
    "a response in chunks": get("/chunked"),
    "HEAD": request("HEAD", "/head"),
    "an odd method": request("FOO", "/created"),
    "a method in lower case": request("get", "/created"),
    "a port": get("/created").replace(b"example.com", b"example.com:8080"),
    "the default port": get("/created").replace(b"example.com", b"example.com:80"),
    "an IPv6 address": get("/created").replace(b"example.com", b"[::1]:81"),
    "upper case": get("/created").replace(b"example.com", b"EXAMPLE.com"),
    "HTTP/1.0": get("/created").replace(b"HTTP/1.1", b"HTTP/1.0"),
    "a user container that dies": post("/die", b"x"),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_is_in_the_same_series(both: Both, name: str) -> None:
    described(both.watched.rig.user)
    await both.ask(REQUESTS[name])
    await both.watched.lines()
    theirs, ours = await both.pages()
    assert ours == theirs


async def test_a_user_container_that_is_not_there_is_in_the_same_series(both: Both) -> None:
    await both.watched.rig.user.stop()
    await both.ask(get())
    await both.watched.lines()
    theirs, ours = await both.pages()
    assert ours == theirs


async def test_all_of_them_together(both: Both) -> None:
    described(both.watched.rig.user)
    for data in REQUESTS.values():
        await both.ask(data)
        await both.ask(data)
    await both.watched.lines(2 * len(REQUESTS))
    theirs, ours = await both.pages()
    assert sorted(ours) == sorted(theirs)
