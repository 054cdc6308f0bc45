"""What an event costs in the adaptor: ours against a plain aiomqtt + aiohttp one, in one run.

Both acknowledge after the sink's 2xx, both on uvloop, same broker (a real mosquitto), same sink
(nginx `return 204`, or a small uvloop server without nginx), same publisher process, QoS 1 over
loopback. CPU is what the kernel charged the adaptor's process (/proc/PID/schedstat), so other load
on the machine shifts it less than time would. Two loads: `paced`, with pauses between events, and
`full`, as fast as the adaptor takes them.

    python -m bench.adaptor [SECONDS]
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import aiomqtt
import mqtt5
import uvloop

PACED = 2000
"""Events per second."""
CONNECTIONS = 64
PAYLOAD = json.dumps({"device": "d-17", "celsius": 21.5, "humidity": 48, "at": 1700000000}).encode()
PATIENCE = 60.0
_SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


def measure(seconds: float) -> dict[str, float]:
    """Microseconds of CPU per event, events per second at full load, and plain over weir.

    Runs for about four times `seconds`. Raises RuntimeError when mosquitto is missing.
    """
    with tempfile.TemporaryDirectory(prefix="weir-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        broker = stack.enter_context(_mosquitto(folder))
        sink = stack.enter_context(_sink(folder))
        result: dict[str, float] = {}
        for load, rate in (("paced", PACED), ("full", 0)):
            for adaptor in ("weir", "plain"):
                cpu, per_second = _one(folder, adaptor, broker, sink, rate, seconds)
                result[f"{load} {adaptor}, CPU us/event"] = cpu
                result[f"{load} {adaptor}, events/s"] = per_second
            plain, weir = (result[f"{load} {a}, CPU us/event"] for a in ("plain", "weir"))
            result[f"{load} plain / weir"] = plain / weir
        return result


def _one(
    folder: Path, adaptor: str, broker: int, sink: int, rate: int, seconds: float
) -> tuple[float, float]:
    """CPU in us per event, and events per second, after a warm-up."""
    topics = f"bench/{uuid.uuid4().hex}"
    command = {"weir": _weir, "plain": _plain}[adaptor](folder, topics, broker, sink)
    with _child(command) as process, _publisher(broker, topics, rate) as publisher:
        _until(lambda: _requests(sink, process) > 0)
        before = _requests(sink, process)
        _until(lambda: _requests(sink, process) > before + 200)
        start, count, cpu = time.monotonic(), _requests(sink, process), _cpu(process.pid)
        time.sleep(seconds)
        took, used = time.monotonic() - start, _cpu(process.pid) - cpu
        events = _requests(sink, process) - count
        assert publisher.poll() is None, "the publisher ended"
    return used / events * 1e6, events / took


def _until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("no events arrive")
        time.sleep(0.02)


def _cpu(pid: int) -> float:
    """Seconds of CPU of all threads."""
    return sum(
        int((task / "schedstat").read_text().split()[0]) / 1e9
        for task in Path(f"/proc/{pid}/task").iterdir()
    )


# --- processes ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _child(command: list[str], *, quiet: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    stderr = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _mosquitto(folder: Path) -> Iterator[int]:
    binary = shutil.which("mosquitto", path=_SBIN)
    if binary is None:
        raise RuntimeError("the adaptor bench needs mosquitto: apt-get install mosquitto")
    port = _free_port()
    configuration = folder / "mosquitto.conf"
    user = "user root\n" if os.geteuid() == 0 else ""
    configuration.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_inflight_messages 256\n"
        f"max_queued_messages 0\nset_tcp_nodelay true\nlog_type error\n{user}"
    )
    with _child([binary, "-c", str(configuration)], quiet=True):
        _wait_for(port)
        yield port


@contextlib.contextmanager
def _sink(folder: Path) -> Iterator[int]:
    port = _free_port()
    nginx = shutil.which("nginx", path=_SBIN)
    if nginx is None:
        command = [sys.executable, "-P", "-m", "bench.adaptor", "sink", str(port)]
    else:
        configuration = folder / "nginx.conf"
        configuration.write_text(
            f"daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr crit;\n"
            "events { worker_connections 1024; }\n"
            "http { access_log off; keepalive_requests 1000000000;\n"
            f"  client_body_temp_path {folder}/body;\n"
            f"  server {{ listen 127.0.0.1:{port};\n"
            "    location / { return 204; } location /status { stub_status; } } }\n"
        )
        command = [nginx, "-p", str(folder), "-c", str(configuration)]
    with _child(command):
        _wait_for(port)
        yield port


_probes: dict[int, int] = {}


def _requests(port: int, process: subprocess.Popen[bytes]) -> int:
    """Events that the sink has answered: its requests without those for its status."""
    if process.poll() is not None:
        raise RuntimeError(f"the adaptor ended with {process.returncode}")
    _probes[port] = _probes.get(port, 0) + 1
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"GET /status HTTP/1.1\r\nHost: sink\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: connection.recv(65_536), b""))
    match = re.search(rb"\n +\d+ +\d+ +(\d+)", text)
    assert match is not None, text
    return int(match.group(1)) - _probes[port]


@contextlib.contextmanager
def _publisher(broker: int, topics: str, rate: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-P", "-m", "bench.adaptor"]
    with _child([*command, "publish", str(broker), topics, str(rate)]) as process:
        yield process


def _weir(folder: Path, topics: str, broker: int, sink: int) -> list[str]:
    routes = folder / "routes.yaml"
    routes.write_text(
        f"routes: [{{filter: '{topics}/#', sink: 'http://127.0.0.1:{sink}/ev', "
        "datacontenttype: application/json}]\n"
    )
    return [
        *(sys.executable, "-P", "-m", "weir", "adaptor"),
        *("--broker", f"mqtt://127.0.0.1:{broker}", "--routes", str(routes)),
        *("--client-id", f"bench-{topics[-12:]}", "--quarantine", str(folder / "quarantine.db")),
    ]


def _plain(folder: Path, topics: str, broker: int, sink: int) -> list[str]:
    arguments = (topics, str(broker), str(sink))
    return [sys.executable, "-P", "-m", "bench.adaptor", "plain", *arguments]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"nothing listens on port {port}")


# --- the publisher --------------------------------------------------------------------------------


class Publisher(asyncio.Protocol):
    """QoS 1, never more unacknowledged than the broker's Receive Maximum allows."""

    def __init__(self, topics: str, rate: int) -> None:
        self._topics, self._rate = topics, rate
        self._window = self._sent = self._open = 0
        self._rest = b""
        self._start = 0.0
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._transport.write(mqtt5.ConnectPacket(f"bench-{os.getpid()}", clean_start=True).write())

    def data_received(self, data: bytes) -> None:
        data, position = self._rest + data, 0
        while position < len(data):
            try:
                packet, size = mqtt5.read(memoryview(data)[position:])
            except IndexError:
                break
            position += size
            if isinstance(packet, mqtt5.ConnAckPacket):
                self._window = packet.receive_max
                self._start = time.monotonic()
                self._pace()
            elif isinstance(packet, mqtt5.PubAckPacket):
                self._open -= 1
        self._rest = data[position:]
        if not self._rate:
            self._fill(1 << 62)

    def _pace(self) -> None:
        if self._rate:
            self._fill(int((time.monotonic() - self._start) * self._rate))
            asyncio.get_running_loop().call_later(0.001, self._pace)

    def _fill(self, due: int) -> None:
        out = []
        while self._open < self._window and self._sent < due:
            self._sent += 1
            self._open += 1
            packet = mqtt5.PublishPacket(
                f"{self._topics}/{self._sent % 100}",
                PAYLOAD,
                qos=mqtt5.QoS.AT_LEAST_ONCE,
                packet_id=self._sent % 65_535 + 1,
            )
            out.append(packet.write())
        if out:
            self._transport.write(b"".join(out))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(None)


async def _publish(broker: int, topics: str, rate: int) -> None:
    loop = asyncio.get_running_loop()
    publisher = Publisher(topics, rate)
    await loop.create_connection(lambda: publisher, "127.0.0.1", broker)
    await publisher.lost


# --- the plain adaptor ----------------------------------------------------------------------------


async def _plain_adaptor(topics: str, broker: int, sink: int) -> None:
    """As one writes it with aiomqtt and aiohttp: a queue and workers, acknowledged after 2xx."""
    url = f"http://127.0.0.1:{sink}/ev"
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        aiomqtt.Client("127.0.0.1", broker) as client,
        asyncio.TaskGroup() as workers,
    ):
        client._client.manual_ack_set(True)
        queue: asyncio.Queue[aiomqtt.Message] = asyncio.Queue()

        async def work() -> None:
            while True:
                message = await queue.get()
                topic = str(message.topic)
                headers = {
                    "ce-specversion": "1.0",
                    "ce-type": "weir.mqtt.message",
                    "ce-source": f"mqtt://127.0.0.1:{broker}",
                    "ce-subject": topic,
                    "ce-id": str(uuid.uuid4()),
                    "Content-Type": "application/json",
                }
                assert isinstance(message.payload, bytes)
                async with session.post(url, data=message.payload, headers=headers) as response:
                    if 200 <= response.status <= 299 and message.qos:
                        client._client.ack(message.mid, message.qos)

        for _ in range(CONNECTIONS):
            workers.create_task(work())
        await client.subscribe(f"{topics}/#", qos=1)
        async for message in client.messages:
            queue.put_nowait(message)


# --- the sink without nginx -----------------------------------------------------------------------


class Counting(asyncio.Protocol):
    """Answers each request; `/status` in nginx's words."""

    requests = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        Counting.requests += 1
        if data.startswith(b"GET /status"):
            body = b"x\n 0 0 %d\n" % Counting.requests
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
            self._transport.write(head + body)
            self._transport.close()
        else:
            self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")


async def _count(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Counting, "127.0.0.1", port)
    await server.serve_forever()


def main(arguments: list[str]) -> None:
    match arguments:
        case ["publish", broker, topics, rate]:
            uvloop.run(_publish(int(broker), topics, int(rate)))
        case ["plain", topics, broker, sink]:
            uvloop.run(_plain_adaptor(topics, int(broker), int(sink)))
        case ["sink", port]:
            uvloop.run(_count(int(port)))
        case _:
            for name, value in measure(float(arguments[0]) if arguments else 5.0).items():
                print(f"{name:<34} {value:10.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
