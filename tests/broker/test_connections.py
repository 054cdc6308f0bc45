"""How a session reaches its broker: TLS, websockets, credentials. The same for both versions."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.broker.harness import (
    Certificates,
    Mosquitto,
    Running,
    Sink,
    adaptor,
    certificates,
    mosquitto_binary,
    one_route,
    openssl,
    routes,
    until,
)
from weir.adaptor.broker import Broker
from weir.adaptor.service import client_id

both = pytest.mark.parametrize("version", ["5", "3.1.1"])

pytestmark = pytest.mark.skipif(
    mosquitto_binary() is None, reason="mosquitto is not installed (apt-get install mosquitto)"
)


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
async def secure(tmp_path: Path, signed: Certificates) -> AsyncIterator[Mosquitto]:
    """Plain on its first port, and on `other` TLS for clients with a certificate only."""
    broker = Mosquitto(
        tmp_path,
        f"allow_anonymous true\nlistener OTHER 127.0.0.1\n{signed.listener}"
        f"cafile {signed.ca}\nrequire_certificate true\n",
    )
    await broker.start()
    yield broker
    await broker.stop()


def trouble(running: Running, sink: Sink) -> str:
    return str(running.sink(sink.url)["session"])


async def complains(broker: Broker, sink: Sink, tmp_path: Path, version: str) -> str:
    """What the status says when it can't connect."""
    async with adaptor(
        broker, one_route(sink), tmp_path, connected=False, protocol=version
    ) as running:
        await until(lambda: running.sink(sink.url)["reconnects"] >= 1, "it tried")
        return trouble(running, sink)


async def arrives(
    broker: Broker, mosquitto: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    async with adaptor(broker, one_route(sink), tmp_path, protocol=version):
        await mosquitto.publish([("plant/1", b"x" * 100_000), ("plant/2", b"y")])
        await until(lambda: len(sink.taken) == 2, "both arrive")


# --- TLS ------------------------------------------------------------------------------------------


@both
async def test_a_client_certificate_opens_the_door(
    secure: Mosquitto, signed: Certificates, sink: Sink, tmp_path: Path, version: str
) -> None:
    broker = Broker.parse(
        f"mqtts://127.0.0.1:{secure.other}",
        signed.ca,
        certificate=signed.client,
        key=signed.client_key,
    )
    await arrives(broker, secure, sink, tmp_path, version)


@both
async def test_a_missing_client_certificate_is_named(
    secure: Mosquitto, signed: Certificates, sink: Sink, tmp_path: Path, version: str
) -> None:
    broker = Broker.parse(f"mqtts://127.0.0.1:{secure.other}", signed.ca)
    said = await complains(broker, sink, tmp_path, version)
    if version == "5":  # paho loses the reason
        assert "--broker-cert" in said


@both
async def test_a_certificate_for_another_name_is_refused_and_the_server_name_mends_it(
    secure: Mosquitto, signed: Certificates, sink: Sink, tmp_path: Path, version: str
) -> None:
    ours = (signed.client, signed.client_key)
    url = f"mqtts://localhost:{secure.other}"
    wrong = Broker.parse(url, signed.ca, certificate=ours[0], key=ours[1])
    said = await complains(wrong, sink, tmp_path, version)
    assert "certificate verify failed" in said
    assert "--broker-server-name" in said
    right = Broker.parse(
        url, signed.ca, certificate=ours[0], key=ours[1], server_name="broker.test"
    )
    await arrives(right, secure, sink, tmp_path, version)


@both
async def test_tls_to_a_plain_port_is_explained(
    secure: Mosquitto, signed: Certificates, sink: Sink, tmp_path: Path, version: str
) -> None:
    broker = Broker.parse(f"mqtts://127.0.0.1:{secure.port}", signed.ca)
    said = await complains(broker, sink, tmp_path, version)
    assert f"can't reach the broker mqtts://127.0.0.1:{secure.port}" in said


@both
async def test_sni_and_alpn_are_sent(
    signed: Certificates, sink: Sink, tmp_path: Path, version: str
) -> None:
    seen: list[tuple[str | None, str | None]] = []
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(signed.broker, signed.broker_key)
    context.set_alpn_protocols(["x-amzn-mqtt-ca", "mqtt"])
    names: list[str | None] = []
    context.sni_callback = lambda sock, name, context: names.append(name)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("ssl_object")
        seen.append((names[-1], sock.selected_alpn_protocol()))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    broker = Broker.parse(
        f"mqtts://127.0.0.1:{port}", signed.ca, server_name="broker.test", alpn=("mqtt",)
    )
    async with (
        server,
        adaptor(broker, one_route(sink), tmp_path, connected=False, protocol=version),
    ):
        await until(lambda: seen, "it shook hands")
    assert seen[0] == ("broker.test", "mqtt")


@both
@pytest.mark.parametrize("what", ["ca", "certificate", "key", "missing", "encrypted"])
async def test_a_useless_file_is_named_with_what_to_do(
    signed: Certificates, sink: Sink, tmp_path: Path, version: str, what: str
) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    url = "mqtts://127.0.0.1:1"
    if what == "ca":
        broker, parts = Broker.parse(url, junk), (str(junk), "CA", "PEM")
    elif what == "certificate":
        broker = Broker.parse(url, signed.ca, certificate=junk)
        parts = (str(junk), "client certificate", "PEM")
    elif what == "key":
        broker = Broker.parse(url, signed.ca, certificate=signed.client, key=signed.broker_key)
        parts = (str(signed.broker_key), "key", "give the pair")
    elif what == "missing":
        broker = Broker.parse(url, tmp_path / "none.pem")
        parts = ("none.pem", "No such file", "readable")
    else:
        locked = tmp_path / "locked.key"
        openssl(
            "ec",
            "-aes128",
            "-passout",
            "pass:x",
            "-in",
            str(signed.client_key),
            "-out",
            str(locked),
        )
        broker = Broker.parse(url, signed.ca, certificate=signed.client, key=locked)
        parts = (str(locked), "encrypted", "without a passphrase")
    said = await complains(broker, sink, tmp_path, version)
    for part in parts:
        assert part in said


# --- websockets -----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_websockets_carry_a_session(
    signed: Certificates, sink: Sink, tmp_path: Path, version: str, scheme: str
) -> None:
    tls = signed.listener if scheme == "wss" else ""
    mosquitto = Mosquitto(
        tmp_path, f"allow_anonymous true\nlistener OTHER\nprotocol websockets\n{tls}"
    )
    await mosquitto.start()
    try:
        ca = signed.ca if scheme == "wss" else None
        broker = Broker.parse(f"{scheme}://127.0.0.1:{mosquitto.other}", ca)
        assert str(broker) == f"{scheme}://127.0.0.1:{mosquitto.other}/mqtt"
        await arrives(broker, mosquitto, sink, tmp_path, version)
        client = client_id("weir", sink.url)
        assert len(mosquitto.pubacks(client)) == 2
        async with adaptor(broker, one_route(sink), tmp_path, protocol=version) as running:
            await mosquitto.publish([("plant/x", b"%d" % n) for n in range(500)])
            await until(lambda: len(sink.taken) == 502, "a resumed session carries many")
            await mosquitto.stop()
            await until(lambda: not running.sink(sink.url)["connected"], "the loss is seen")
            await mosquitto.start()
            await running.connected()
            await mosquitto.publish([("plant/x", b"after")])
            await until(lambda: b"after" in sink.bodies, "and it goes on")
    finally:
        await mosquitto.stop()


@both
async def test_a_server_without_websockets_is_explained(
    sink: Sink, tmp_path: Path, version: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        broker = Broker.parse(f"ws://127.0.0.1:{port}/nothing")
        said = await complains(broker, sink, tmp_path, version)
    assert f"can't reach the broker ws://127.0.0.1:{port}/nothing" in said
    if version == "5":
        assert "404" in said


# --- credentials ----------------------------------------------------------------------------------


@both
async def test_files_of_credentials_are_read_again_for_every_connection(
    sink: Sink, tmp_path: Path, version: str
) -> None:
    passwords = tmp_path / "passwords"
    await _passwd(passwords, "ann", "first")
    mosquitto = Mosquitto(tmp_path, f"allow_anonymous false\npassword_file {passwords}\n")
    await mosquitto.start()
    user, token = tmp_path / "user", tmp_path / "token"
    user.write_text("ann\n")
    token.write_text("first\n")
    broker = Broker.parse(mosquitto.url, username_file=user, password_file=token)
    try:
        async with adaptor(broker, one_route(sink), tmp_path, protocol=version) as running:
            await mosquitto.stop()
            await _passwd(passwords, "ann", "second")
            await mosquitto.start()
            await until(lambda: "refuses" in trouble(running, sink), "the old token is refused")
            assert f"check the user and password in {user} and {token}" in trouble(running, sink)
            assert "first" not in trouble(running, sink)
            token.write_text("second")
            await running.connected()
    finally:
        await mosquitto.stop()


@both
@pytest.mark.parametrize("content", [None, "", "a\0b"])
async def test_a_useless_file_of_credentials_is_named(
    sink: Sink, tmp_path: Path, version: str, content: str | None
) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content)
    broker = Broker.parse("mqtt://ann@127.0.0.1:1", password_file=token)
    mosquitto = Mosquitto(tmp_path)
    await mosquitto.start()
    try:
        broker = Broker.parse(f"mqtt://ann@127.0.0.1:{mosquitto.port}", password_file=token)
        assert str(token) in await complains(broker, sink, tmp_path, version)
    finally:
        await mosquitto.stop()


async def test_3_1_1_needs_a_user_with_a_password(sink: Sink, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("x")
    broker = Broker.parse("mqtt://127.0.0.1:1", password_file=token)
    assert "give the user as well" in await complains(broker, sink, tmp_path, "3.1.1")


async def _passwd(path: Path, user: str, password: str) -> None:
    try:
        process = await asyncio.create_subprocess_exec(
            *("mosquitto_passwd", "-c", "-b", str(path), user, password)
        )
    except FileNotFoundError:
        pytest.skip("mosquitto_passwd is not installed (apt-get install mosquitto)")
    assert await process.wait() == 0
    path.chmod(0o644)


# --- the session itself ---------------------------------------------------------------------------


@both
async def test_a_clean_start_lets_the_queue_go_and_then_keeps_a_session(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    async with adaptor(broker.url, one_route(sink), tmp_path, protocol=version):
        pass
    await broker.publish([("plant/1", b"queued")])
    async with adaptor(
        broker.url, one_route(sink), tmp_path, protocol=version, clean_start=True
    ) as running:
        await broker.publish([("plant/1", b"new")])
        await until(lambda: sink.bodies == [b"new"], "only the new one")
        await broker.stop()
        await until(lambda: not running.sink(sink.url)["connected"], "the loss is seen")
        await broker.start()
        await running.connected()
    await broker.publish([("plant/1", b"queued again")])
    async with adaptor(broker.url, one_route(sink), tmp_path, protocol=version):
        await until(lambda: sink.bodies == [b"new", b"queued again"], "the new session was kept")


@both
async def test_the_session_of_a_sink_that_left_the_routes_is_ended_on_request_only(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = Sink()
    await other.start()
    one = routes(f"name: a, filter: plant/#, sink: '{sink.url}'")
    two = f"{one}  - {{name: b, filter: plant/#, sink: '{other.url}'}}\n"
    async with adaptor(broker.url, two, tmp_path, protocol=version):
        pass
    async with adaptor(broker.url, one, tmp_path, protocol=version):
        await broker.publish([("plant/1", b"kept")])
    assert client_id("weir", other.url) in caplog.text
    assert "--end-unused-sessions" in caplog.text
    async with adaptor(broker.url, two, tmp_path, protocol=version):
        await until(lambda: other.bodies == [b"kept"], "nothing was lost by leaving it alone")
    caplog.clear()
    ending: dict[str, Any] = {"protocol": version, "end_unused_sessions": True}
    async with adaptor(broker.url, one, tmp_path, **ending):
        await broker.publish([("plant/2", b"gone")])
    async with adaptor(broker.url, two, tmp_path, protocol=version):
        await broker.publish([("plant/3", b"new")])
        await until(lambda: other.bodies[1:] == [b"new"], "the old session has ended")
    async with adaptor(broker.url, one, tmp_path, **ending):
        pass
    caplog.clear()
    async with adaptor(broker.url, one, tmp_path, protocol=version):
        pass
    assert "--end-unused-sessions" not in caplog.text
    await other.stop()
