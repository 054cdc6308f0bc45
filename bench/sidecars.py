"""A sidecar as the kubelet starts it, in front of an nginx, in a network namespace of their own.

Owns which sidecars there are (Weir's, the real queue-proxy, none), their environment, and what the
kernel says of a process: CPU and memory. What is asked of them is the benchmarks' business.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import load
from tests.command import COMPILED
from tests.contract import world
from tests.contract.original import queue_proxy, why_no_queue_proxy
from tests.contract.place import Place

NOBODY, ORIGINAL, WEIR, INTERPRETED = "no proxy", "queue-proxy", "weir", "weir, interpreted"
USER, USER_HTTP2 = 8080, 8081
PROBE = (
    b"GET / HTTP/1.1\r\nHost: pod\r\nUser-Agent: kube-probe/1.30\r\n"
    b"K-Network-Probe: queue\r\nConnection: close\r\n\r\n"
)
PATIENCE = 60.0
"""Seconds until a process that does not come up is given up."""


def command(kind: str) -> list[str]:
    """Raises load.Missing with the reason why this sidecar can't be had here."""
    if kind == WEIR:
        if not COMPILED.exists():
            raise load.Missing("the compiled sidecar, as it is in the image: make compiled")
        return _as_in_the_image(COMPILED)
    if kind == INTERPRETED:
        return _as_in_the_image(COMPILED.parents[1])
    reason = why_no_queue_proxy()
    if reason is not None:
        raise load.Missing(f"no queue-proxy to compare with: {reason}")
    return [str(queue_proxy())]


def agent_command(*arguments: str) -> list[str]:
    """The agent's, likewise. Its workers are started by the same interpreter."""
    path = f"PYTHONPATH={COMPILED}:{sysconfig.get_path('purelib')}"
    command(WEIR)
    return ["/usr/bin/env", path, _python(), "-P", "-m", "weir", "agent", *arguments]


def _as_in_the_image(package: Path) -> list[str]:
    path = [str(package), sysconfig.get_path("purelib")]
    start = f"import sys; sys.path += {path}; from weir.cli import main; sys.exit(main())"
    return [_python(), "-ISB", "-c", start, "sidecar"]


def _python() -> str:
    """The one that `make image` takes, if that has the version of this one."""
    python = "/usr/bin/python3"
    show = "import sys; print(*sys.version_info[:2])"
    found = subprocess.run([python, "-c", show], check=False, capture_output=True, text=True)
    if found.stdout.split() != [str(part) for part in sys.version_info[:2]]:
        python = sys.executable
    return python


def available() -> tuple[list[str], str]:
    """The sidecars of this machine, and why the others are missing."""
    try:
        command(ORIGINAL)
    except (load.Missing, RuntimeError) as error:
        return [WEIR, INTERPRETED], str(error)
    return [ORIGINAL, WEIR, INTERPRETED], ""


def environment(concurrency: int, user_port: int = USER) -> dict[str, str]:
    """With everything on that a revision can have on: metrics, all timers, a limit if wanted."""
    return {
        **world.ENVIRONMENT,
        "USER_PORT": str(user_port),
        "CONTAINER_CONCURRENCY": str(concurrency),
        "REVISION_TIMEOUT_SECONDS": "300",
        "REVISION_RESPONSE_START_TIMEOUT_SECONDS": "200",
        "REVISION_IDLE_TIMEOUT_SECONDS": "100",
        "SERVING_READINESS_PROBE": world.TCP_PROBE.replace("8080", str(user_port)),
    }


class Sidecar:
    """A running one; `pid` is 0 when there is none and the user container is asked directly."""

    def __init__(self, place: Place, pid: int, user_port: int) -> None:
        self.place = place
        self.pid = pid
        self.port = world.DATA if pid else user_port

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid) if self.pid else 0.0


@contextlib.contextmanager
def sidecar(kind: str, concurrency: int = 0, user_port: int = USER) -> Iterator[Sidecar]:
    """Up, ready and warm enough to have answered a probe."""
    with pod() as place:
        if kind == NOBODY:
            yield Sidecar(place, 0, user_port)
            return
        with started(place, command(kind), environment(concurrency, user_port)) as process:
            deadline = time.monotonic() + PATIENCE
            while not probed(place):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{kind} did not come up")
                time.sleep(0.01)
            yield Sidecar(place, process.pid, user_port)


@contextlib.contextmanager
def started(
    place: Place, command: Sequence[str], environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as said:
        process = place.start(
            command, env=environment, cwd="/", stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        try:
            yield process
        except Exception as error:
            said.seek(0)
            error.add_note(f"it said: {said.read()[-2000:].decode(errors='replace')}")
            raise
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def pod() -> Iterator[Place]:
    """A namespace with the user container's nginx in it. Raises load.Missing."""
    nginx = load.tool("nginx")
    try:
        place = Place()
    except OSError as error:
        raise load.Missing(f"{error}: needs root") from None
    with contextlib.ExitStack() as undo:
        undo.callback(place.close)
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        configuration = _nginx(folder)
        process = place.start([nginx, "-p", str(folder), "-c", str(configuration)])
        undo.callback(process.wait)
        undo.callback(process.terminate)
        _accepting(place, USER)
        _accepting(place, USER_HTTP2)
        yield place


def _nginx(folder: Path) -> Path:
    """Reads bodies and answers shortly; under /grpc with a trailer, as gRPC ends its calls."""
    served = "location / { return 200 'hello, weir\\n'; }"
    called = (
        "location /grpc { default_type application/grpc; add_trailer Grpc-Status 0 always;"
        " return 200 'hello, weir\\n'; }"
    )
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr crit;\n"
        "events { worker_connections 4096; }\n"
        "http { access_log off; keepalive_requests 1000000000; default_type text/plain;\n"
        "  http2_max_concurrent_streams 250;\n"
        f"  server {{ listen 127.0.0.1:{USER} backlog=4096; {served} }}\n"
        f"  server {{ listen 127.0.0.1:{USER_HTTP2} http2 backlog=4096; {served} {called} }} }}\n"
    )
    return path


def _accepting(place: Place, port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not place.accepts(port):
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing accepts on {port}")
        time.sleep(0.005)


def probed(place: Place) -> bool:
    """Does the sidecar answer a readiness probe with 200, whenever that may be?"""
    try:
        with place.socket() as sock:
            sock.settimeout(PATIENCE)
            sock.connect(("127.0.0.1", world.DATA))
            sock.sendall(PROBE)
            return _all(sock).startswith(b"HTTP/1.1 200")
    except ConnectionError:
        return False


def _all(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def cpu_seconds(pid: int) -> float:
    """Of all threads that are alive, user and system, by the scheduler's own account."""
    tasks = Path(f"/proc/{pid}/task")
    spent = 0
    for task in tasks.iterdir():
        with contextlib.suppress(FileNotFoundError):
            spent += int((task / "schedstat").read_text().split()[0])
    return spent / 1e9


def memory(pid: int) -> tuple[float, float]:
    """MB that are only this process's, and MB resident."""
    found = dict[str, int]()
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        found[name] = int(value.split()[0])
    private = found["Private_Clean"] + found["Private_Dirty"]
    return private / 1024, found["Rss"] / 1024
