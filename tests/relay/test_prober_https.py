"""An httpGet probe with scheme HTTPS verifies the certificate (contract 4.3)."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.relay.certificates import Pair, make_pair, needs_openssl
from tests.relay.rig import UserContainer, ok
from weir.proxy.contract import HttpGet, Probe, RevisionSettings
from weir.proxy.probes import Prober
from weir.proxy.wire.dial import dial_here

pytestmark = needs_openssl


class SecureContainer(UserContainer):
    """A user container that speaks TLS."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", port, ssl=self.pair.server_context()
        )
        self.port = self._server.sockets[0].getsockname()[1]


@pytest.fixture
async def secure(tmp_path: Path) -> AsyncIterator[SecureContainer]:
    container = SecureContainer(make_pair(tmp_path))
    await container.start()
    yield container
    await container.stop()


@pytest.fixture
def known(secure: SecureContainer, monkeypatch: pytest.MonkeyPatch) -> SecureContainer:
    """Its certificate is one of the system's roots."""
    monkeypatch.setenv("SSL_CERT_FILE", str(secure.pair.certificate))
    return secure


def prober(port: int, get: HttpGet, host: str = "127.0.0.1", timeout: float = 10.0) -> Prober:
    probe = Probe(port=port, host=host, http=get, period=10, timeout=timeout)
    return Prober(RevisionSettings(user_port=port, probes=(probe,)), dial_here)


async def test_a_certificate_of_a_known_root_is_ready(known: SecureContainer) -> None:
    https = prober(known.port, HttpGet("/up", (("X-Token", "s"),), "https"))
    assert await https.ready(), https.last_error
    (got,) = known.requests
    assert got.line == "GET /up HTTP/1.1"
    assert got.field("host") == f"127.0.0.1:{known.port}"
    assert got.field("x-token") == "s"


async def test_a_self_signed_certificate_is_not_ready(secure: SecureContainer) -> None:
    https = prober(secure.port, HttpGet(scheme="https"))
    assert not await https.ready()
    assert "certificate verify failed" in https.last_error
    assert secure.requests == []


async def test_a_certificate_for_another_name_is_not_ready(known: SecureContainer) -> None:
    https = prober(known.port, HttpGet(scheme="https"), host="localhost")
    assert not await https.ready()
    assert "certificate verify failed" in https.last_error


async def test_a_container_that_speaks_no_tls_is_not_ready(known: SecureContainer) -> None:
    plain = UserContainer()
    await plain.start()
    https = prober(plain.port, HttpGet(scheme="https"), timeout=1.0)
    assert not await https.ready()
    assert https.last_error
    await plain.stop()


async def test_a_redirect_may_change_to_https_and_back(known: SecureContainer) -> None:
    plain = UserContainer()
    await plain.start()
    there = f"Location: https://127.0.0.1:{known.port}/there"
    back = f"Location: http://127.0.0.1:{plain.port}/back"
    plain.on("/", ok(b"", there, status="302 Found"))
    known.on("/there", ok(b"", back, status="302 Found"))
    assert await prober(plain.port, HttpGet()).ready()
    assert [got.path for got in plain.requests] == ["/", "/back"]
    await plain.stop()


async def test_a_handshake_that_is_given_up_leaves_no_connection() -> None:
    """The peer accepts and says nothing; the try ends by its time limit."""
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        gone.set()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    probe = Probe(port=port, http=HttpGet(scheme="https"), period=10, timeout=1)
    https = Prober(RevisionSettings(user_port=port, probes=(probe,)), dial_here)
    assert not await https.ready()
    assert "no answer within 1 s" in https.last_error
    async with asyncio.timeout(20):
        await gone.wait()
    server.close()
