"""The prober against an HTTP/2 stack that is not ours: Go's (contract 4.3)."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from weir.proxy.contract import GrpcCheck, HttpGet, Probe, RevisionSettings
from weir.proxy.probes import Prober
from weir.proxy.wire.dial import dial_here

GO = shutil.which("go")
pytestmark = [
    pytest.mark.skipif(GO is None, reason="Go, whose HTTP/2 server is the witness"),
    pytest.mark.timeout(300),  # the first build of net/http takes a while
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("h2server") / "h2server"
    done = subprocess.run(
        [GO or "go", "build", "-o", built, "."],
        cwd=Path(__file__).parent / "h2server",
        env=os.environ | {"GOTOOLCHAIN": "local", "CGO_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "requires go >=" in done.stderr:
        pytest.skip("needs Go 1.24 or later")
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture(scope="module", params=["both", "http2"])
def port(program: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    """Of a server of both versions of HTTP, and of one that speaks HTTP/2 only."""
    with subprocess.Popen([program, request.param], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield int(server.stdout.readline())
        server.kill()


def prober(port: int, http: HttpGet | None = None, grpc: GrpcCheck | None = None) -> Prober:
    probe = Probe(port=port, http=http, grpc=grpc, period=10, timeout=10.0)
    return Prober(RevisionSettings(user_port=port, probes=(probe,)), dial_here)


@pytest.mark.parametrize("status", [200, 201, 302, 304, 399])
async def test_http2_is_found(port: int, status: int) -> None:
    http = prober(port, HttpGet(f"/status/{status}", detect_http2=True))
    assert await http.ready(), http.last_error


@pytest.mark.parametrize("status", [400, 418, 500, 503])
async def test_an_unready_status_is_not_ready(port: int, status: int) -> None:
    assert not await prober(port, HttpGet(f"/status/{status}", detect_http2=True)).ready()


async def test_the_headers_arrive(port: int) -> None:
    """Without them the first question is answered 500, which leaves it to HTTP/1: not ready."""
    with_headers = HttpGet("/status/200", (("X-Token", "s"),), detect_http2=True)
    assert await prober(port, with_headers).ready()
    needed = HttpGet("/status/200?token", (("X-Token", "s"),), detect_http2=True)
    assert not await prober(port, needed).ready()


async def test_a_health_check_is_understood(port: int) -> None:
    assert await prober(port, grpc=GrpcCheck()).ready()
    assert await prober(port, grpc=GrpcCheck("eggs")).ready()


async def test_a_sick_service_is_not_ready(port: int) -> None:
    grpc = prober(port, grpc=GrpcCheck("sick"))
    assert not await grpc.ready()
    assert grpc.last_error == "service unhealthy (responded with NOT_SERVING)"


async def test_a_status_of_grpc_is_told_with_its_words(port: int) -> None:
    grpc = prober(port, grpc=GrpcCheck("unknown"))
    assert not await grpc.ready()
    assert grpc.last_error.startswith("health rpc probe failed: code 5: unknown service ~ {")
