"""The process as the kubelet runs it: `weir sidecar` in a network namespace, and who talks to it.

Everything is plain blocking sockets: a test decides itself what is sent, read, or left lying.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.command import weir
from tests.contract.place import Place
from tests.contract.world import ADMIN, AUTOSCALER, DATA, ENVIRONMENT, METRICS, USER
from tests.pods import until

WEIR = weir("sidecar")
LAUNCHER = Path(__file__).with_name("launch.py")
PATIENCE = 20.0
PROBE = (
    b"GET / HTTP/1.1\r\nHost: pod\r\nUser-Agent: kube-probe/1.30\r\n"
    b"K-Network-Probe: queue\r\nConnection: close\r\n\r\n"
)
GET = b"GET / HTTP/1.1\r\nHost: hello\r\nConnection: close\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

__all__ = ["ADMIN", "AUTOSCALER", "DATA", "GET", "METRICS", "OK", "PROBE", "USER", "WEIR", "Pod"]


class Pod:
    """A namespace; `start` one sidecar after the other in it. `said` is stdout and stderr."""

    def __init__(self) -> None:
        self.place = Place()
        self.process: subprocess.Popen[bytes] | None = None
        self._undo = contextlib.ExitStack()
        self._undo.callback(self.place.close)
        self._undo.callback(self.kill)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - until close
        self._undo.callback(self._output.close)

    def close(self) -> None:
        self._undo.close()

    # --- the process -----------------------------------------------------------------------------
    def start(
        self,
        command: Sequence[str] = WEIR,
        *,
        pass_fds: Sequence[int] = (),
        **environment: str,
    ) -> None:
        env = {**ENVIRONMENT, **environment}
        self.process = self.place.start(
            command,
            env=env,
            cwd="/",
            stdout=self._output,
            stderr=self._output,
            stdin=subprocess.DEVNULL,
            pass_fds=pass_fds,
        )

    def start_with_sockets(self, *sockets: socket.socket, **environment: str) -> None:
        """Started as systemd would: they are its descriptors from 3 on."""
        numbers = [sock.fileno() for sock in sockets]
        command = [sys.executable, "-S", str(LAUNCHER), ",".join(map(str, numbers)), *WEIR]
        self.start(command, pass_fds=numbers, **environment)

    def serving(self) -> None:
        """Wait until a request gets through the data port, or a probe at least is answered."""
        until(lambda: self.running and self.place.accepts(DATA), "the data port accepts")

    @property
    def running(self) -> bool:
        assert self.process is not None
        code = self.process.poll()
        assert code is None, f"exited with {code}: {self.said}"
        return True

    def exited(self) -> int:
        """Its exit status, once it has one."""
        assert self.process is not None
        return self.process.wait(PATIENCE)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def said(self) -> str:
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def status(self, name: str) -> str:
        """A line of /proc/PID/status."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:"))

    @property
    def resident(self) -> float:
        """MB."""
        return int(self.status("VmRSS").split()[0]) / 1024

    @property
    def descriptors(self) -> int:
        assert self.process is not None
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    # --- clients ---------------------------------------------------------------------------------
    def connect(self, port: int = DATA) -> socket.socket:
        sock = self.place.socket()
        sock.settimeout(PATIENCE)
        sock.connect(("127.0.0.1", port))
        return sock

    def ask(self, data: bytes = GET, port: int = DATA) -> bytes:
        """Everything that is answered on a new connection, until it is closed."""
        with self.connect(port) as sock:
            sock.sendall(data)
            return rest(sock)


def rest(sock: socket.socket) -> bytes:
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(1 << 20):
            data += piece
    return bytes(data)


def received(sock: socket.socket, end: bytes) -> bytes:
    """What comes, up to `end`."""
    data = b""
    while end not in data:
        piece = sock.recv(65536)
        assert piece, f"closed after {data!r}"
        data += piece
    return data


@contextlib.contextmanager
def user_container(place: Place) -> Iterator[None]:
    """Answers every head that comes with `hello`, as fast as it can, until the end of the block."""
    listener = place.listen(USER)
    stop, stopped = socket.socketpair()
    thread = threading.Thread(target=_serve, args=(listener, stopped), name="user container")
    thread.start()
    try:
        yield
    finally:
        stop.close()
        thread.join()
        listener.close()
        stopped.close()


def _serve(listener: socket.socket, stopped: socket.socket) -> None:
    listener.setblocking(False)
    ends: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(stopped, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is stopped:
                    for open_ in ends:
                        open_.close()
                    return
                if sock is listener:
                    accepted, _ = listener.accept()
                    accepted.settimeout(PATIENCE)
                    ends[accepted] = b""
                    selector.register(accepted, selectors.EVENT_READ)
                    continue
                piece = b""
                with contextlib.suppress(ConnectionError):
                    piece = sock.recv(65536)
                if not piece:
                    selector.unregister(sock)
                    del ends[sock]
                    sock.close()
                    continue
                data = ends[sock] + piece
                with contextlib.suppress(ConnectionError):
                    sock.sendall(OK * data.count(b"\r\n\r\n"))
                ends[sock] = data[-3:] if not data.endswith(b"\r\n\r\n") else b""


@contextlib.contextmanager
def many_files() -> Iterator[int]:
    """As many descriptors as this machine lets a process have; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
