"""What the broker tests stand on: a real mosquitto, a scripted HTTP sink, a running adaptor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from weir.adaptor.broker import Broker
from weir.adaptor.routes import parse
from weir.adaptor.service import Adaptor, AdaptorConfig

PATIENCE = 30.0
"""Seconds until a condition that should come true counts as a failure. Proves no speed."""


async def until(condition: Callable[[], Any], what: str) -> None:
    """Return when the condition holds; fail, saying what did not happen, when it never does."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"never happened: {what}") from None


def free_port() -> int:
    """Not one of those that the kernel gives to clients: it may do so before the broker has it."""
    while True:
        port = random.randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


# --- the broker -----------------------------------------------------------------------------------


def mosquitto_binary() -> str | None:
    return shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class Mosquitto:
    """One broker process after another on the same port and the same persistent state."""

    def __init__(self, folder: Path, extra: str = "allow_anonymous true\n") -> None:
        """`extra`: configuration lines, those of its listener first; `OTHER` in them stands for a
        second port."""
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.other = free_port()
        self._folder = folder
        self._log = folder / "mosquitto.log"
        self._configuration = folder / "mosquitto.conf"
        self._process: asyncio.subprocess.Process | None = None
        user = "user root\n" if os.geteuid() == 0 else ""
        listeners = f"listener {self.port} 127.0.0.1\n{extra.replace('OTHER', str(self.other))}"
        self._configuration.write_text(
            f"{listeners}persistence true\npersistence_location {folder}/\n"
            f"log_type all\nmax_queued_messages 0\n{user}"
        )

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(), stdout=log, stderr=log
            )
        async with asyncio.timeout(PATIENCE):
            while not await self._accepts():
                assert self._process.returncode is None, self._log.read_text()
                await asyncio.sleep(0.01)

    def _command(self) -> tuple[str, ...]:
        binary = mosquitto_binary()
        assert binary is not None
        return binary, "-c", str(self._configuration)

    async def _accepts(self) -> bool:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.close()
            return True
        return False

    async def stop(self) -> None:
        """SIGTERM: it saves its sessions."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()

    async def kill(self) -> None:
        """SIGKILL: what it has not saved is gone."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def save(self) -> None:
        """Write the sessions to disk now (SIGUSR1), and wait until they are there."""
        assert self._process is not None
        saved = self._folder / "mosquitto.db"
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        self._process.send_signal(signal.SIGUSR1)
        await until(lambda: saved.exists() and saved.stat().st_mtime_ns != before, "saved")

    def freeze(self) -> None:
        """As a machine that hangs: connections stay open and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def subscribed(self, client: str) -> bool:
        return f"Sending SUBACK to {client}" in self._log.read_text()

    def connections(self, client: str) -> int:
        return self._log.read_text().count(f" as {client} (")

    def unsubscribed(self, client: str) -> list[str]:
        """Filters that this client has given up, in order."""
        lines = self._log.read_text().splitlines()
        return [
            lines[number + 1].split("\t", 1)[1]
            for number, line in enumerate(lines)
            if f"Received UNSUBSCRIBE from {client}" in line
        ]

    def pings(self, client: str) -> int:
        return self._log.read_text().count(f"Sending PINGRESP to {client}")

    def pubacks(self, client: str) -> list[int]:
        """Packet ids that the broker got acknowledged by this client, in order."""
        found = re.findall(
            rf"Received PUBACK from {re.escape(client)} \(Mid: (\d+)", self._log.read_text()
        )
        return [int(each) for each in found]

    def completed(self, client: str) -> int:
        """QoS 2 messages that are over for both sides."""
        return self._log.read_text().count(f"Received PUBCOMP from {client}")

    def publishes(self, client: str) -> list[tuple[int, str]]:
        """Packet id and topic of what the broker sent this client, in order."""
        found = re.findall(
            rf"Sending PUBLISH to {re.escape(client)} \(d\d, q\d, r\d, m(\d+), '([^']*)'",
            self._log.read_text(),
        )
        return [(int(each), topic) for each, topic in found]

    async def publish(
        self, messages: Sequence[tuple[str, bytes]], *, qos: int = 1, **more: Any
    ) -> None:
        await publish(self.port, messages, qos=qos, **more)


class Mochi(Mosquitto):
    """mochi-mqtt with the same interface; its sessions end with it, so don't restart it."""

    def __init__(self, folder: Path, binary: Path) -> None:
        super().__init__(folder)
        self._binary = binary

    def _command(self) -> tuple[str, ...]:
        return str(self._binary), f"127.0.0.1:{self.port}"


every_broker = pytest.mark.parametrize("broker", ["mosquitto", "mochi"], indirect=True)
every_window = pytest.mark.parametrize(
    ("broker", "version"),
    [("mosquitto", "5"), ("mosquitto", "3.1.1"), ("mochi", "3.1.1")],
    indirect=["broker"],
)
"""For tests that fill the window: with MQTT 5 mochi (2.7.9) forgets at times to go on when there is
room again."""


def properties(content_type: str | None = None, **user: str) -> Properties:
    """Of a PUBLISH; `user`: its user properties."""
    made = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if content_type is not None:
        made.ContentType = content_type
    if user:
        made.UserProperty = list(user.items())
    return made


async def publish(
    port: int,
    messages: Sequence[tuple[str, bytes]],
    *,
    qos: int = 1,
    version: aiomqtt.ProtocolVersion = aiomqtt.ProtocolVersion.V5,
    **more: Any,
) -> None:
    """Returns when the broker has taken them all (QoS 1 and 2) or they are written (QoS 0)."""
    async with aiomqtt.Client("127.0.0.1", port, protocol=version) as client:
        for topic, payload in messages:
            await client.publish(topic, payload, qos, **more)


# --- certificates ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Certificates:
    """A CA, and what it has signed: for the broker (127.0.0.1 and `broker.test`), for a client."""

    ca: Path
    broker: Path
    broker_key: Path
    client: Path
    client_key: Path

    @property
    def listener(self) -> str:
        """Lines of a mosquitto listener that shows them."""
        return f"certfile {self.broker}\nkeyfile {self.broker_key}\n"


def openssl(*arguments: str) -> None:
    binary = shutil.which("openssl")
    if binary is None:
        pytest.skip("openssl is not installed (apt-get install openssl)")
    subprocess.run([binary, *arguments], check=True, capture_output=True)


def certificates(folder: Path) -> Certificates:
    """Made with openssl, good for a day."""
    folder.mkdir(exist_ok=True)

    def at(name: str) -> Path:
        return folder / name

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(
        *("req", "-x509", *new, "-days", "1", "-subj", "/CN=the CA of a test"),
        *("-keyout", str(at("ca.key")), "-out", str(at("ca.pem"))),
    )
    for name, extra in (
        ("broker", "subjectAltName=IP:127.0.0.1,DNS:broker.test"),
        ("client", "extendedKeyUsage=clientAuth"),
    ):
        openssl(
            *("req", *new, "-subj", f"/CN=a {name}", "-addext", extra),
            *("-keyout", str(at(f"{name}.key")), "-out", str(at(f"{name}.csr"))),
        )
        at(f"{name}.ext").write_text(f"{extra}\n")
        openssl(
            *("x509", "-req", "-days", "1", "-in", str(at(f"{name}.csr")), "-CAcreateserial"),
            *("-CA", str(at("ca.pem")), "-CAkey", str(at("ca.key"))),
            *("-extfile", str(at(f"{name}.ext")), "-out", str(at(f"{name}.pem"))),
        )
    return Certificates(
        *(at(each) for each in ("ca.pem", "broker.pem", "broker.key", "client.pem", "client.key"))
    )


# --- the sink -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["ce-id"]


@dataclass(frozen=True, slots=True)
class Answer:
    """`hang`: never answer. `cut`: close in the middle of the answer."""

    status: int = 204
    headers: tuple[str, ...] = ()
    body: bytes = b""
    hang: bool = False
    cut: bool = False


Script = Callable[[Request], Awaitable[Answer] | Answer]


def accept(_: Request) -> Answer:
    return Answer()


def held_by(gate: asyncio.Event) -> Script:
    """Nothing is answered before the gate is set, and then all is taken."""

    async def script(_: Request) -> Answer:
        await gate.wait()
        return Answer()

    return script


@dataclass
class Sink:
    """A raw HTTP/1.1 server that does what its script says. `taken`: what was answered 2xx.
    `remember`: whether both lists are kept."""

    script: Script = accept
    requests: list[Request] = field(default_factory=list)
    taken: list[Request] = field(default_factory=list)
    port: int = 0
    tls: ssl.SSLContext | None = None
    remember: bool = True
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}/events"

    @property
    def bodies(self) -> list[bytes]:
        return [request.body for request in self.taken]

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuses new connections and resets those that are open."""
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.transport.abort()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                request = await _read(reader)
                if self.remember:
                    self.requests.append(request)
                answer = self.script(request)
                if not isinstance(answer, Answer):
                    answer = await answer
                if answer.hang:
                    await reader.read()  # to the end of the connection
                    return
                if self.remember and 200 <= answer.status <= 299 and not answer.cut:
                    self.taken.append(request)
                head = [f"HTTP/1.1 {answer.status} X", *answer.headers]
                if answer.status != 204:
                    head.append(f"Content-Length: {len(answer.body) + 100 * answer.cut}")
                writer.write("\r\n".join([*head, "", ""]).encode() + answer.body)
                await writer.drain()
                if answer.cut:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head)}
    return Request(headers, await reader.readexactly(int(headers["content-length"])))


# --- the adaptor ----------------------------------------------------------------------------------


def routes(*entries: str) -> str:
    """A routes file of flow mappings, one per entry: `filter: a/#, sink: URL, ...`."""
    return "routes:\n" + "".join(f"  - {{{entry}}}\n" for entry in entries)


QUICK = "delivery: {retry: 3, backoffDelay: PT0.02S, timeout: PT10S}"


class Running:
    """An adaptor in this process."""

    def __init__(self, config: AdaptorConfig) -> None:
        self.adaptor = Adaptor(config)
        self._stop = asyncio.Event()
        self.reload = asyncio.Event()
        self._task = asyncio.create_task(self.adaptor.run(self._stop, self.reload))

    async def stop(self) -> None:
        self._stop.set()
        await self._task

    def route(self, name: str) -> dict[str, Any]:
        status: Any = self.adaptor.snapshot()
        return next(route for route in status["routes"] if route["name"] == name)

    def sink(self, name: str) -> dict[str, Any]:
        status: Any = self.adaptor.snapshot()
        return next(sink for sink in status["sinks"] if sink["name"] == name)

    async def connected(self) -> None:
        status: Any = self.adaptor.snapshot
        await until(lambda: all(s["connected"] for s in status()["sinks"]), "connected")


@contextlib.asynccontextmanager
async def adaptor(
    broker: str | Broker | None, text: str, folder: Path, *, connected: bool = True, **more: Any
) -> AsyncIterator[Running]:
    more.setdefault("stop_within", 5.0)
    config = AdaptorConfig(broker, parse(text), folder / "quarantine.db", **more)
    running = Running(config)
    try:
        if connected:
            await running.connected()
        yield running
    finally:
        await running.stop()


def one_route(sink: Sink, more: str = QUICK) -> str:
    """The routes file with one route, to `sink`."""
    return routes(f"name: all, filter: plant/#, sink: '{sink.url}', {more}")


class AdaptorProcess:
    """`weir adaptor` as a process that can be killed; in a `with` it starts, and surely ends."""

    def __init__(self, broker: str, text: str, folder: Path, *options: str) -> None:
        (folder / "routes.yaml").write_text(text)
        self.routes = folder / "routes.yaml"
        self._command = [
            *(sys.executable, "-P", "-m", "weir", "adaptor", "--broker", broker),
            *("--routes", str(folder / "routes.yaml")),
            *("--quarantine", str(folder / "quarantine.db"), *options),
        ]
        self._process: asyncio.subprocess.Process | None = None

    def without_routes(self) -> None:
        """Before it starts: it only listens."""
        at = self._command.index("--routes")
        del self._command[at : at + 2]

    async def __aenter__(self) -> AdaptorProcess:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self, **environment: str) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, env={**os.environ, **environment}
        )

    def minds(self, number: signal.Signals) -> bool:
        """Whether the process has a handler for the signal by now."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:\t")[2].partition("\n")[0], 16)
        return bool(caught >> (number - 1) & 1)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """In order, as soon as it can: before its first line of Python nobody could."""
        process = self._process
        assert process is not None
        await until(
            lambda: process.returncode is not None or self.minds(signal.SIGTERM), "it minds SIGTERM"
        )
        return await self._end(signal.SIGTERM)

    async def ended(self) -> int:
        """By itself."""
        assert self._process is not None
        async with asyncio.timeout(PATIENCE):
            return await self._process.wait()

    async def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
        return await self._process.wait()
