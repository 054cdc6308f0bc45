"""The TLS port (contract sections 1.1, 3.9, 3.12), with real clients and certificates."""

import asyncio
import contextlib
import gc
import shutil
import ssl
import subprocess
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.relay.certificates import Pair, make_pair, needs_openssl
from tests.relay.rig import Client as RigClient
from tests.relay.rig import Closed, Peer, Request, Rig, get, ok, post
from weir.proxy import contract
from weir.proxy.exchange import Exchange
from weir.proxy.tls import TlsFault, TlsPort
from weir.proxy.tls_settings import TLS12_SUITES, TlsSettings

pytestmark = needs_openssl
PATIENCE = 20.0


class Secured:
    """A rig whose relay is reached by TLS as well."""

    def __init__(self, rig: Rig, pair: Pair, tls: TlsPort) -> None:
        self.rig = rig
        self.pair = pair
        self.tls = tls
        self.port = 0
        self._server: asyncio.Server | None = None
        self._peers: list[RigClient] = []

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        factory = self.tls.secure(self.rig.relay.protocol)
        self._server = await loop.create_server(factory, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def client(self, context: ssl.SSLContext | None = None) -> RigClient:
        """A client whose handshake is done."""
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", self.port, ssl=context or self.pair.trusted(), limit=1 << 22
            )
        self._peers.append(RigClient(reader, writer))
        return self._peers[-1]

    async def plain(self) -> RigClient:
        """A client that speaks without TLS."""
        peer = RigClient(*await asyncio.open_connection("127.0.0.1", self.port))
        self._peers.append(peer)
        return peer

    async def shown(self, context: ssl.SSLContext | None = None) -> bytes:
        """The certificate that a new connection is shown."""
        unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        unverified.check_hostname = False
        unverified.verify_mode = ssl.CERT_NONE
        client = await self.client(context or unverified)
        shown: bytes = secured_by(client).getpeercert(binary_form=True) or b""
        return shown

    def stop(self) -> None:
        for peer in self._peers:
            peer.writer.transport.abort()
        if self._server is not None:
            self._server.close()
        self.tls.close()


def secured_by(client: RigClient) -> ssl.SSLObject:
    found: ssl.SSLObject = client.writer.get_extra_info("ssl_object")
    return found


def on_disk(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.certificate.read_text())


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path / "certs")


@pytest.fixture
async def secured(
    rig: Callable[..., Awaitable[Rig]], pair: Pair
) -> AsyncIterator[Callable[..., Awaitable[Secured]]]:
    """`await secured(TlsSettings(...), http2=False)`."""
    made: list[Secured] = []

    async def make(settings: TlsSettings | None = None, **options: Any) -> Secured:
        one = Secured(await rig(), pair, TlsPort(settings, pair.folder, **options))
        made.append(one)
        await one.start()
        return one

    yield make
    for one in made:
        one.stop()


def watched(rig: Rig) -> list[Exchange]:
    """The exchanges that begin from now on."""

    class Watcher:
        def begun(self, exchange: Exchange) -> None:
            exchanges.append(exchange)

        def over(self, exchange: Exchange, now: float) -> None: ...

        def probed(self, *about: Any) -> None: ...

    exchanges: list[Exchange] = []
    rig.relay.observers.append(Watcher())
    return exchanges


class ByHand:
    """A TLS client of which every byte on the wire is known, and when it is sent."""

    def __init__(self, peer: RigClient, pair: Pair) -> None:
        self.peer = peer
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = pair.trusted().wrap_bio(
            self._incoming, self._outgoing, server_hostname="127.0.0.1"
        )

    def written(self, data: bytes = b"") -> bytes:
        """What is to be sent: records of data, and what a handshake left to say."""
        if data:
            self._tls.write(data)
        return self._outgoing.read()

    async def handshake(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        """All of it but the client's last message, which `written` begins with."""
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    self._tls.do_handshake()
                    return
                await send(self.written())
                self._incoming.write(await self.peer.reader.read(1 << 16))

    async def read(self, until: bytes = b"") -> bytes:
        """Up to the mark, else to the server's goodbye; a connection without one is an error."""
        got = b""
        async with asyncio.timeout(PATIENCE):
            while not until or until not in got:
                try:
                    piece = self._tls.read(1 << 16)
                except ssl.SSLWantReadError:
                    data = await self.peer.reader.read(1 << 16)
                    if data:
                        self._incoming.write(data)
                    else:
                        self._incoming.write_eof()
                    continue
                if not piece:
                    return got
                got += piece
        return got


def client_context(pair: Pair, **fields: Any) -> ssl.SSLContext:
    context = pair.trusted()
    for name, value in fields.items():
        setattr(context, name, value)
    return context


class TestExchange:
    """The same handler and state as on the plaintext port."""

    async def test_requests_are_served_on_a_kept_connection(self, secured: Any) -> None:
        made = await secured()
        client = await made.client()
        for _ in range(3):
            await client.send(post("/echo", b"hello"))
            response = await client.response()
            assert response.status == 200
            assert response.body.endswith(b"hello")
        assert made.rig.relay.counters().requests == 3

    async def test_the_client_is_known_to_use_tls(self, secured: Any) -> None:
        made = await secured()
        begun = watched(made.rig)
        client = await made.client()
        await client.send(get())
        await client.response()
        plain = await made.rig.client()
        await plain.send(get())
        await plain.response()
        seen = [(exchange.client.tls, exchange.client.peer) for exchange in begun]
        assert seen == [(True, b"127.0.0.1"), (False, b"127.0.0.1")]

    async def test_bodies_of_many_records_pass_both_ways(self, secured: Any) -> None:
        made = await secured()
        body = bytes(range(256)) * (4 << 12)

        async def mirror(peer: Peer, got: Request) -> None:
            await peer.send(ok(got.body))

        made.rig.user.on("/mirror", mirror)
        client = await made.client()
        sending = asyncio.create_task(client.send(post("/mirror", body)))
        assert (await client.response()).body == body
        await sending

    async def test_a_client_that_reads_nothing_is_not_buffered_for(self, secured: Any) -> None:
        made = await secured()
        held = asyncio.Event()

        async def flood(peer: Peer, _: Request) -> None:
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 268435456\r\n\r\n")
            for _piece in range(256):
                try:
                    async with asyncio.timeout(1):
                        await peer.send(bytes(1 << 20))
                except TimeoutError:
                    held.set()
                    raise Closed from None

        made.rig.user.on("/flood", flood)
        client = await made.client()
        client.writer.transport.pause_reading()
        await client.send(get("/flood"))
        async with asyncio.timeout(PATIENCE):
            await held.wait()

    async def test_requests_right_behind_the_handshake_are_answered(
        self, secured: Any, pair: Pair
    ) -> None:
        """The client's Finished and two requests, in one segment."""
        made = await secured()
        tls = ByHand(await made.plain(), pair)
        await tls.handshake(tls.peer.send)
        await tls.peer.send(tls.written(get("/a") + get("/b")))
        answer = await tls.read(until=b"GET /b")
        assert answer.count(b"HTTP/1.1 200 OK") == 2

    async def test_records_may_come_byte_by_byte(self, secured: Any, pair: Pair) -> None:
        made = await secured()
        tls = ByHand(await made.plain(), pair)

        async def slowly(data: bytes) -> None:
            for byte in data:
                await tls.peer.send(bytes([byte]))

        await tls.handshake(slowly)
        await slowly(tls.written(get("/a")))
        assert (await tls.read(until=b"GET /a")).startswith(b"HTTP/1.1 200 OK")

    async def test_closing_says_goodbye(self, secured: Any, pair: Pair) -> None:
        """Without it a client can't tell the end of a body from an attack."""
        made = await secured()
        tls = ByHand(await made.plain(), pair)
        await tls.handshake(tls.peer.send)
        await tls.peer.send(tls.written(get("/", "Connection: close")))
        assert (await tls.read()).startswith(b"HTTP/1.1 200 OK")

    async def test_a_user_container_that_reads_nothing_holds_the_upload(self, secured: Any) -> None:
        made = await secured()
        body = bytes(range(256)) * (32 << 12)
        release = asyncio.Event()
        counted = []

        async def later(peer: Peer, _: Request) -> None:
            await release.wait()
            received = await peer.exactly(len(body))
            counted.append(received == body)
            await peer.send(ok(b"done"))

        made.rig.user.on("/later", later, unread=True)
        begun = watched(made.rig)
        client = await made.client()
        sending = asyncio.create_task(client.send(post("/later", body)))
        await made.rig.user.received(1)
        exchange, before = begun[0], -1
        while exchange.received != before:  # until nothing moves any more
            before = exchange.received
            await asyncio.sleep(0.1)
        assert exchange.received < len(body) // 2
        release.set()
        assert (await client.response()).body == b"done"
        await sending
        assert counted == [True]

    async def test_what_is_no_http_is_refused_readably(self, secured: Any) -> None:
        made = await secured()
        client = await made.client()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n" + bytes(9999))
        response = await client.response()
        assert response.status == 400
        assert await client.rest() == b""

    async def test_a_client_that_leaves_ends_its_exchange(self, secured: Any) -> None:
        made = await secured()
        gone = asyncio.Event()

        async def wait(peer: Peer, _: Request) -> None:
            await peer.rest()
            gone.set()
            raise Closed

        made.rig.user.on("/wait", wait)
        client = await made.client()
        await client.send(get("/wait"))
        await made.rig.user.received(1)
        client.writer.close()
        async with asyncio.timeout(PATIENCE):
            await gone.wait()
        await made.rig.settled(lambda: made.rig.relay.counters().in_flight == 0)

    async def test_an_upgraded_connection_is_a_tunnel(self, secured: Any) -> None:
        made = await secured()

        async def upgrade(peer: Peer, _: Request) -> None:
            await peer.send(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
            )
            while data := await peer.reader.read(1 << 16):
                await peer.send(data[::-1])
            raise Closed

        made.rig.user.on("/ws", upgrade)
        client = await made.client()
        await client.send(get("/ws", "Connection: Upgrade", "Upgrade: echo"))
        assert (await client.head()).startswith(b"HTTP/1.1 101 ")
        await client.send(b"abc")
        assert await client.exactly(3) == b"cba"


class TestNegotiation:
    async def test_both_versions_of_http_are_offered(self, secured: Any, pair: Pair) -> None:
        made = await secured()
        for offered, chosen in [
            (["h2", "http/1.1"], "h2"),
            (["http/1.1"], "http/1.1"),
            (["http/1.1", "h2"], "h2"),
            ([], None),
        ]:
            context = pair.trusted()
            if offered:
                context.set_alpn_protocols(offered)
            client = await made.client(context)
            assert secured_by(client).selected_alpn_protocol() == chosen

    async def test_http2_is_offered_only_where_it_is_spoken(self, secured: Any, pair: Pair) -> None:
        made = await secured(http2=False)
        context = pair.trusted()
        context.set_alpn_protocols(["h2", "http/1.1"])
        client = await made.client(context)
        assert secured_by(client).selected_alpn_protocol() == "http/1.1"

    async def test_tls_1_3_is_the_floor(self, secured: Any, pair: Pair) -> None:
        made = await secured()
        assert secured_by(await made.client()).version() == "TLSv1.3"
        with pytest.raises(ssl.SSLError, match=r"(?i)protocol version"):
            await made.client(client_context(pair, maximum_version=ssl.TLSVersion.TLSv1_2))

    async def test_the_floor_may_be_1_2_and_the_ceiling_too(self, secured: Any, pair: Pair) -> None:
        made = await secured(TlsSettings(min_version="1.2"))
        old = client_context(pair, maximum_version=ssl.TLSVersion.TLSv1_2)
        assert secured_by(await made.client(old)).version() == "TLSv1.2"
        assert secured_by(await made.client()).version() == "TLSv1.3"
        made = await secured(TlsSettings(min_version="1.2", max_version="1.2"))
        assert secured_by(await made.client()).version() == "TLSv1.2"

    @pytest.mark.parametrize("name", sorted(TLS12_SUITES))
    async def test_every_suite_that_may_be_listed_works(
        self, rig: Callable[..., Awaitable[Rig]], tmp_path: Path, name: str
    ) -> None:
        pair = make_pair(tmp_path / "certs", kind="ec" if "ECDSA" in name else "rsa")
        suite = TLS12_SUITES[name]
        made = Secured(await rig(), pair, TlsPort(TlsSettings("1.2", "1.2", (suite,)), pair.folder))
        await made.start()
        context = pair.trusted()
        context.set_ciphers(suite)
        cipher = secured_by(await made.client(context)).cipher()
        assert cipher is not None and cipher[0] == suite
        with pytest.raises(ssl.SSLError):
            other = pair.trusted()
            other.set_ciphers(next(s for s in TLS12_SUITES.values() if s != suite))
            await made.client(other)
        made.stop()

    @pytest.mark.parametrize("curve", ["X25519", "P-256", "P-384", "P-521"])
    async def test_every_curve_that_may_be_listed_works(
        self, secured: Any, pair: Pair, curve: str
    ) -> None:
        names = {"P-256": "prime256v1", "P-384": "secp384r1", "P-521": "secp521r1"}
        made = await secured(TlsSettings(curves=(curve,)))
        context = pair.trusted()
        context.set_ecdh_curve(names.get(curve, curve))
        await made.client(context)
        other = pair.trusted()
        other.set_ecdh_curve("prime256v1" if curve != "P-256" else "secp384r1")
        with pytest.raises(ssl.SSLError):
            await made.client(other)

    async def test_of_several_curves_one_is_offered_and_the_log_says_which(
        self, secured: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = await secured(TlsSettings(curves=("P-384", "X25519")))
        await made.client()
        assert "only P-384 is offered, of P-384, X25519" in caplog.text

    def test_curves_that_openssl_does_not_know_are_a_fault(self, pair: Pair) -> None:
        with pytest.raises(TlsFault, match="QUEUE_PROXY_TLS_CURVE_PREFERENCES: OpenSSL"):
            TlsPort(TlsSettings(curves=("no-such-curve",)), pair.folder)

    async def test_curl_is_served(self, secured: Any, pair: Pair) -> None:
        curl = shutil.which("curl")
        if curl is None:
            pytest.skip("curl")
        made = await secured(http2=False)
        made.rig.user.on("/hello", ok(b"hello"))
        done = await asyncio.to_thread(
            subprocess.run,
            [
                *(curl, "--silent", "--show-error", "--cacert", str(pair.certificate)),
                *("--max-time", "20", "--tlsv1.3"),
                *("--resolve", f"data-plane.knative.dev:{made.port}:127.0.0.1"),
                f"https://data-plane.knative.dev:{made.port}/hello",
            ],
            capture_output=True,
            text=True,
        )
        assert (done.stdout, done.stderr) == ("hello", "")


class TestPlainHttp:
    """HTTP to the TLS port is answered, once, in the clear."""

    @pytest.mark.parametrize("request_", [get("/"), post("/", b"x" * 100_000)], ids=["GET", "POST"])
    async def test_it_is_told_where_it_is(self, secured: Any, request_: bytes) -> None:
        made = await secured()
        client = await made.plain()
        await client.send(request_)
        assert await client.rest() == (
            b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
        )
        assert made.rig.relay.counters().requests == 0

    async def test_it_may_come_byte_by_byte(self, secured: Any) -> None:
        made = await secured()
        client = await made.plain()
        for byte in b"GET /":
            await client.send(bytes([byte]))
        assert (await client.rest()).startswith(b"HTTP/1.0 400 ")

    async def test_what_is_neither_is_closed_without_a_word(self, secured: Any) -> None:
        made = await secured()
        client = await made.plain()
        await client.send(b"SSH-2.0-x\r\n")
        assert await client.rest() == b""

    async def test_a_client_that_says_nothing_is_dropped_in_time(
        self, secured: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(contract, "READ_HEAD_SECONDS", 0.1)
        made = await secured()
        client = await made.plain()
        assert await client.rest() == b""

    async def test_a_handshake_that_stops_is_dropped_in_time(
        self, secured: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(contract, "READ_HEAD_SECONDS", 0.1)
        made = await secured()
        client = await made.plain()
        await client.send(b"\x16\x03\x01\x02\x00\x01")
        assert await client.rest() == b""

    async def test_a_broken_handshake_ends_in_an_alert(self, secured: Any) -> None:
        made = await secured()
        client = await made.plain()
        await client.send(b"\x16\x03\x01\x00\x05hello")
        assert (await client.rest())[:1] == b"\x15"


class TestRotation:
    async def test_a_new_certificate_is_shown_to_new_connections(
        self, secured: Any, pair: Pair, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        made = await secured()
        old_client, old = await made.client(), on_disk(pair)
        assert await made.shown() == old
        make_pair(pair.folder, "another")
        assert made.tls.reload()
        assert on_disk(pair) != old
        assert await made.shown() == on_disk(pair)
        assert [record.getMessage() for record in caplog.records] == [
            "Certificate and/or key have changed on disk and were reloaded."
        ]
        await old_client.send(get())
        assert (await old_client.response()).status == 200

    async def test_without_a_change_nothing_is_reloaded(
        self, secured: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        made = await secured()
        before = made.tls.context
        assert not made.tls.reload()
        assert made.tls.context is before
        assert caplog.records == []

    async def test_a_broken_pair_keeps_the_old_one_until_it_is_whole(
        self, secured: Any, pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = await secured()
        old = on_disk(pair)
        new = make_pair(tmp_path / "new")
        shutil.copy(new.certificate, pair.certificate)  # the old key does not fit
        assert not made.tls.reload()
        assert await made.shown() == old
        (record,) = caplog.records
        assert record.levelname == "ERROR"
        assert str(pair.certificate) in record.getMessage()
        assert record.getMessage().endswith("the certificate loaded before stays in use")
        shutil.copy(new.key, pair.key)
        assert made.tls.reload()
        assert await made.shown() == on_disk(new)

    async def test_a_pair_that_vanishes_keeps_the_old_one(
        self, secured: Any, pair: Pair, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = await secured()
        old = on_disk(pair)
        pair.key.unlink()
        assert not made.tls.reload()
        assert f"{pair.key}: No such file or directory" in caplog.text
        assert await made.shown() == old

    async def test_the_disk_is_looked_at_again_and_again(
        self, secured: Any, pair: Pair, tmp_path: Path
    ) -> None:
        made = await secured(period=0.01)
        made.tls.watch()
        for name in ("one", "two"):
            new = make_pair(tmp_path / name, name)
            shutil.copy(new.certificate, pair.certificate)
            shutil.copy(new.key, pair.key)
            before = made.tls.context
            await made.rig.settled(lambda before=before: made.tls.context is not before)
            assert await made.shown() == on_disk(new)
        made.tls.close()
        before = made.tls.context
        make_pair(pair.folder, "three")
        await asyncio.sleep(0.05)  # five periods in which nothing may happen
        assert made.tls.context is before

    def test_the_period_is_a_minute(self, pair: Pair) -> None:
        assert contract.CERTIFICATE_SECONDS == 60


class TestFaults:
    """What can't be used at the start is said in one line."""

    def test_no_certificate(self, tmp_path: Path) -> None:
        with pytest.raises(TlsFault, match=r"tls\.crt: No such file or directory$"):
            TlsPort(folder=tmp_path)

    def test_no_certificate_in_the_file(self, pair: Pair) -> None:
        pair.certificate.write_text("nonsense")
        with pytest.raises(TlsFault, match=r"tls\.crt and .*tls\.key are no certificate and its"):
            TlsPort(folder=pair.folder)

    def test_an_encrypted_key(self, pair: Pair) -> None:
        subprocess.run(
            ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", pair.key, "-out", pair.key],
            check=True,
            capture_output=True,
        )
        with pytest.raises(TlsFault, match="the key is encrypted"):
            TlsPort(folder=pair.folder)

    async def test_a_suite_for_another_kind_of_key_fails_the_handshake_only(
        self, secured: Any, pair: Pair
    ) -> None:
        made = await secured(TlsSettings("1.2", "1.2", ("ECDHE-RSA-AES128-GCM-SHA256",)))
        with pytest.raises(ssl.SSLError):
            await made.client()


async def test_a_connection_that_ended_is_freed_at_once(secured: Any) -> None:
    """What OpenSSL holds for each would else wait for the garbage collector."""
    made = await secured()
    began = asyncio.Event()
    freed: list[bool] = []

    class Watched(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            began.set()
            weakref.finalize(transport.get_extra_info("ssl_object"), freed.append, True)

    loop = asyncio.get_running_loop()
    server = await loop.create_server(made.tls.secure(Watched), "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    gc.disable()
    try:
        client = await made.client()
        async with asyncio.timeout(PATIENCE):
            await began.wait()
        client.writer.transport.abort()
        await made.rig.settled(lambda: bool(freed))
    finally:
        gc.enable()
        server.close()


async def test_closing_the_port_drops_handshakes_and_leaves_the_others(secured: Any) -> None:
    made = await secured()
    young = await made.plain()
    await young.send(b"\x16\x03\x01")
    client = await made.client()
    await client.send(get())
    await client.response()
    made.tls.close()
    assert await young.rest() == b""
    await client.send(get())
    assert (await client.response()).status == 200


async def test_a_connection_that_is_accepted_but_not_made_yet_can_be_closed(
    rig: Callable[..., Awaitable[Rig]], tmp_path: Path
) -> None:
    made = make_pair(tmp_path)
    port = TlsPort(folder=made.folder)
    connection = port.secure((await rig()).relay.protocol)()
    port.close()
    server = await asyncio.get_running_loop().create_server(lambda: connection, "127.0.0.1", 0)
    peer = RigClient(*await asyncio.open_connection(*server.sockets[0].getsockname()))
    assert await peer.closed()
    server.close()
