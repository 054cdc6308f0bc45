"""The relay against no relay: the same nginx on loopback, called directly and through it.

Two kinds of requests: a bare GET, and a POST as the adaptor sends it (a CloudEvent in binary mode,
about 500 bytes). CPU is the relay process's own, from the scheduler's accounting.
"""

import argparse
import asyncio
import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import uvloop

from bench import load
from weir.proxy.contract import RevisionSettings
from weir.proxy.probes import Prober
from weir.proxy.relay import Relay
from weir.proxy.wire.dial import dial_here

EVENT = """
wrk.method = "POST"
wrk.body = '{"device":"a17","temperature":21.5,"humidity":48.25,"battery":3.71}'
wrk.headers["User-Agent"] = "weir-adaptor/0.1"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Ce-Specversion"] = "1.0"
wrk.headers["Ce-Id"] = "7f0c1d6e-5f43-4c56-9a8e-0d9b3b1c2a11"
wrk.headers["Ce-Source"] = "mqtt://broker.example.com/fleet/a17"
wrk.headers["Ce-Type"] = "com.example.telemetry"
wrk.headers["Ce-Subject"] = "fleet/a17/telemetry"
wrk.headers["Ce-Time"] = "2026-11-24T10:00:00.000Z"
wrk.headers["Traceparent"] = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
"""


def measure(seconds: float, rounds: int = 3) -> dict[str, float]:
    """Medians over `rounds` alternating pairs of `seconds` each. Raises load.Missing."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, _processes(Path(name)) as (user, port, pid):
        script = Path(name, "event.lua")
        script.write_text(EVENT)
        for kind, connections, lua in (
            ("get c1", 1, None),
            ("get c16", 16, None),
            ("event c16", 16, script),
        ):
            plain, relayed, cpu = [], [], []
            for _ in range(rounds):
                plain.append(load.wrk(f"http://127.0.0.1:{user}/", connections, seconds, lua))
                before = _cpu_ns(pid)
                relayed.append(load.wrk(f"http://127.0.0.1:{port}/", connections, seconds, lua))
                cpu.append((_cpu_ns(pid) - before) / 1e3 / relayed[-1].requests)
            found |= {
                f"{kind} no relay, requests/s": _median(p.requests_per_second for p in plain),
                f"{kind} relay, requests/s": _median(r.requests_per_second for r in relayed),
                f"{kind} relay / no relay": _median(
                    r.requests_per_second / p.requests_per_second
                    for p, r in zip(plain, relayed, strict=True)
                ),
                f"{kind} relay CPU, us/request": _median(iter(cpu)),
                f"{kind} relay, p50 us": _median(r.p50_us for r in relayed),
            }
    return found


def _median(values: Iterator[float]) -> float:
    return statistics.median(values)


def _cpu_ns(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


@contextlib.contextmanager
def _processes(directory: Path) -> Iterator[tuple[int, int, int]]:
    """nginx and a relay in front of it: their ports, and the relay's pid."""
    user, port = _free_port(), _free_port()
    configuration = directory / "nginx.conf"
    configuration.write_text(
        f"daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log stderr crit;\n"
        "events { worker_connections 4096; }\n"
        "http { access_log off; keepalive_requests 1000000000; default_type text/plain;\n"
        f"  server {{ listen 127.0.0.1:{user};\n"
        "    location / { return 200 'hello, weir\\n'; } } }\n"
    )
    with contextlib.ExitStack() as undo:
        for command in (
            [load.tool("nginx"), "-p", str(directory), "-c", str(configuration)],
            [sys.executable, "-m", "bench.relay", "--serve", str(port), "--user", str(user)],
        ):
            process = subprocess.Popen(command)
            undo.callback(process.wait)
            undo.callback(process.terminate)
        for number in (user, port):
            _await_listener(number)
        yield user, port, process.pid


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _await_listener(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing listened on {port} within 10 s") from None
            time.sleep(0.01)


async def _serve(port: int, user: int) -> None:
    settings = RevisionSettings(user_port=user)
    relay = Relay(settings, dial=dial_here, prober=Prober(settings, dial_here))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(relay.protocol, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", type=int, metavar="PORT")
    parser.add_argument("--user", type=int, metavar="PORT")
    arguments = parser.parse_args()
    uvloop.run(_serve(arguments.serve, arguments.user))
