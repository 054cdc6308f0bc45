"""A pod whose injected container is hold, agents as real processes, and clients that never stop."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.contract.world import ENVIRONMENT
from tests.hold.rig import HOLD, ROOT, WEIR
from tests.pods import USER_PORT, Pod, until
from weir.proxy.wire.status import read_status

DATA_PORT = 8012
_NO_SIDECAR = ("/bin/sleep", "600")
APP = """
import http.server, sys, threading
go = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), go.set()), daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1
    def do_GET(self):
        if self.path == "/slow":
            go.wait()
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer.request_queue_size = 512
http.server.ThreadingHTTPServer(("127.0.0.1", %d), Handler).serve_forever()
"""


class HeldPod:
    """`with` it: a network namespace, a cgroup, hold in it, and a user container that answers."""

    program = APP % USER_PORT
    """Of the user container, in Python; it may read a line that lets slow requests go."""

    def __init__(self, *prefix: str, **environment: str) -> None:
        """`prefix` is a command that runs hold, such as setpriv; it is to be started then, and
        there is no sidecar: Python may not be readable for just any user."""
        self.pod = Pod()
        self._prefix = prefix
        self._environment = environment
        self._undo = contextlib.ExitStack()
        self.app: subprocess.Popen[str]
        self.hold: subprocess.Popen[bytes]

    def __enter__(self) -> HeldPod:
        self._undo.enter_context(self.pod)
        try:
            self._output = self._undo.enter_context(tempfile.TemporaryFile())
            self.app = self.pod.run(
                [sys.executable, "-c", self.program],
                stdin=subprocess.PIPE,
                stderr=self._output,
                text=True,
                bufsize=1,
            )
            until(self.pod.listening, "the app listens")
            if not self._prefix:
                self.start_hold()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.app.stdin is not None:
            self.app.stdin.close()
        self._undo.close()

    def start_hold(self) -> None:
        self.hold = self.pod.run(
            self._command(),
            env={
                **ENVIRONMENT,
                "SERVING_POD": self.pod.name,
                "SERVING_POD_IP": self.address,
                "PYTHONPATH": str(ROOT),
                **self._environment,
            },
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )
        until(lambda: self.pod.listening(DATA_PORT), "hold listens")

    def _command(self) -> list[str]:
        return [*self._prefix, str(HOLD), *(_NO_SIDECAR if self._prefix else WEIR)]

    @property
    def address(self) -> str:
        return self.pod.addresses[0]

    @property
    def described(self) -> dict[str, Any]:
        cgroup = str(self.pod.cgroup)
        addresses = list(self.pod.addresses)
        return {
            "name": self.pod.name,
            "holdCgroup": cgroup,
            "cgroup": cgroup,
            "addresses": addresses,
        }

    @property
    def by_sidecar(self) -> bool:
        """What the container's process is by now."""
        comm = Path(f"/proc/{self.hold.pid}/comm").read_text().strip()
        return comm != "weir-hold"

    @property
    def said(self) -> str:
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def get(
        self, path: str = "/", port: int = DATA_PORT, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """On a connection of its own."""
        connection = http.client.HTTPConnection(self.address, port, timeout=90)
        try:
            connection.request("GET", path, headers=headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def let_slow_ones_go(self) -> None:
        assert self.app.stdin is not None
        self.app.stdin.write("\n")
        self.app.stdin.flush()


class Agent:
    """A `weir agent` process for some pods. Its log goes to a file."""

    def __init__(
        self,
        folder: Path,
        *pods: HeldPod,
        workers: int = 1,
        prefix: Sequence[str] = (),
        pins: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """`pins`: a bpffs; nothing is pinned without. `options` are more arguments."""
        folder.mkdir(exist_ok=True)
        self._status = folder / "agent.sock"
        file = folder / "pods.json"
        file.write_text(json.dumps({"pods": [pod.described for pod in pods]}))
        self._log = (folder / "log").open("ab")
        self.process = subprocess.Popen(
            [
                *prefix,
                *(sys.executable, "-P", "-m", "weir", "agent", "--pods", str(file)),
                *("--status", str(self._status), "--workers", str(workers)),
                *("--pins", str(pins or folder / "no-bpffs")),
                *options,
            ],
            stderr=self._log,
        )

    def status(self) -> dict[str, Any]:
        """Empty while there is none."""
        with contextlib.suppress(OSError, ValueError):
            return read_status(self._status)
        return {}

    def pod(self, number: int = 0) -> dict[str, Any]:
        pods = self.status().get("pods", [])
        found: dict[str, Any] = pods[number] if pods else {"lease": "", "ready": False}
        return found

    @property
    def workers(self) -> list[int]:
        pids: list[int] = self.status().get("workers", [])
        return pids

    def until_held(self, number: int = 0) -> Agent:
        until(lambda: self.pod(number)["lease"] == "held", "the pod is borrowed", 30.0)
        return self

    def until_open(self, number: int = 0) -> None:
        until(lambda: self.pod(number)["direct"]["open"], "the direct port opens", 30.0)

    def until_reason(self, words: str, number: int = 0) -> None:
        until(lambda: words in self.pod(number)["lease"], f"the lease says {words}", 30.0)

    def relayed(self, number: int = 0) -> int:
        return int(self.pod(number)["relayed"]["requests"])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)

    def close(self) -> None:
        """At once. Its workers see that and end, too."""
        workers = self.workers
        self.process.kill()
        self.process.wait()
        self._log.close()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)


class Clients:
    """Ask all the time; half of them keep their connections, the others make one for each request.

    `failures` are texts. A connection that is kept is given up when its answer says so; one that
    is closed without that, between two requests, is a failure like any other.
    """

    def __init__(self, pod: HeldPod, count: int = 4, port: int = DATA_PORT) -> None:
        self._address, self._port = pod.pod.address, port
        self.answers = 0
        self.failures: list[str] = []
        self._ended = False
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(bool(number % 2),)) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def more(self, count: int = 50) -> None:
        wanted = self.answers + count
        until(lambda: self.answers >= wanted, f"answers come: {self.failures}", 30.0)

    def stop(self) -> None:
        self._ended = True
        for thread in self._threads:
            thread.join()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._address, self._port, timeout=30)

    def _run(self, keep: bool) -> None:
        connection = self._connection()
        while not self._ended:
            try:
                connection.request("GET", "/", headers={} if keep else {"Connection": "close"})
                response = connection.getresponse()
                body = response.read()
                if (response.status, body) != (200, b"hello"):
                    raise ConnectionError(f"answered {response.status} {body!r}")
            except (OSError, http.client.HTTPException) as error:
                kind = "refused: " if isinstance(error, ConnectionRefusedError) else ""
                with self._lock:
                    self.failures.append(f"{kind}{'kept' if keep else 'new'}: {error!r}")
                connection.close()
            else:
                with self._lock:
                    self.answers += 1
                if not keep:  # not every server says that it closes, too
                    connection.close()
        connection.close()


class Load(Protocol):
    def stop(self) -> None: ...


@contextlib.contextmanager
def closing(*things: Agent | Load) -> Iterator[None]:
    try:
        yield
    finally:
        for thing in things:
            thing.close() if isinstance(thing, Agent) else thing.stop()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def stop_process(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until(lambda: state(pid) == "T", "it is stopped")


def refuses(pod: HeldPod, port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((pod.pod.address, port)) != 0


def listeners_in(pod: HeldPod, pid: int) -> set[str]:
    """Inodes of the pod's listening sockets that a process has."""
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pod.hold.pid}/net/{table}").read_text().splitlines()[1:]
    ]
    inodes = {fields[9] for fields in lines if fields[3] == "0A"}
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(entry.readlink())[8:-1])
    return found & inodes


def worker_of(pod: HeldPod, agent: Agent) -> int:
    """The one that has the pod."""
    found: list[int] = []

    def there() -> bool:
        found[:] = [pid for pid in agent.workers if listeners_in(pod, pid)]
        return bool(found)

    until(there, "a worker has the pod")
    return found[0]
