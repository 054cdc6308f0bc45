"""Real pods for tests: a network namespace, a veth pair and a cgroup, gone afterwards.

    with Pod() as pod:
        backend = pod.backend()
        listener = backend.listen("0.0.0.0", 8080)
        client = socket.create_connection((pod.address, 8080))

Names are unique per process (weirt-PID-N). Whatever happens in between, leaving the context
kills what runs in the cgroup and removes everything.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pytest

from weir.bpf import bcc
from weir.proxy import netns
from weir.proxy.cgroups import cgroup2_mount
from weir.proxy.kernel import Kernel, KernelUnavailable, PodTarget

T = TypeVar("T")

USER_PORT, DIRECT_PORT = 8080, 8014
_BACKEND = Path(__file__).with_name("scripted_backend.py")
_counter = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


def until(condition: Callable[[], T], what: str = "", seconds: float = 10.0) -> T:
    """Wait for `condition()` to be true; its value. The limit only turns a hang into a failure."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"never happened: {what or condition}"
        time.sleep(0.002)


# ---- what this machine can do ----------------------------------------------------------------


@functools.cache
def why_no_pods() -> str | None:
    """None, or the reason why pods can't be made here."""
    if os.geteuid() != 0:
        return "needs root to make a network namespace and a cgroup"
    if cgroup2_mount() is None:
        return "needs a cgroup v2 mount"
    if shutil.which("ip") is None:
        return "needs ip (Debian package iproute2)"
    name = f"weirt-{os.getpid()}-probe"
    made = _ip("netns", "add", name, check=False)
    if made.returncode:
        return f"cannot make a network namespace: {made.stderr.strip()}"
    _ip("netns", "del", name, check=False)
    return None


@functools.cache
def why_no_kernel() -> str | None:
    """None, or the reason why the direct path can't be had here."""
    reason = why_no_pods()
    if reason is None:
        try:
            Kernel.load().close()
        except KernelUnavailable as error:
            reason = str(error)
    return reason


@functools.cache
def why_no_bcc() -> str | None:
    """None, or the reason why bcc can't compile the programs here."""
    try:
        bcc.compile_here()
    except bcc.BccMissing as error:
        return f"needs bcc ({error})"
    return None


def why_no_go() -> str | None:
    return None if go_command() else "needs a Go toolchain (go)"


def go_command() -> str | None:
    return shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")


# ---- pods ------------------------------------------------------------------------------------


class Pod:
    """`addresses` are the pod's; `host_address` is the other end of its veth pair."""

    interface = "eth0"

    def __init__(self, *, ipv4: bool = True, ipv6: bool = True) -> None:
        number = next(_counter)
        self.name = f"weirt-{os.getpid()}-{number}"
        # a /30 of the shared address space (RFC 6598) and a ULA prefix, by process and number
        network = (100 << 24 | 64 << 16) + (os.getpid() % 65536 * 16 + number % 16) * 4
        prefix = f"fd77:{os.getpid() & 0xFFFF:x}:{number & 0xFFFF:x}:"
        self.address = _dotted(network + 2) if ipv4 else ""
        self.address6 = f"{prefix}:2" if ipv6 else ""
        self.host_address = _dotted(network + 1) if ipv4 else ""
        self._host4 = f"{self.host_address}/30" if ipv4 else ""
        self._host6 = f"{prefix}:1/64" if ipv6 else ""
        self.netns = Path("/run/netns") / self.name
        self.cgroup = (cgroup2_mount() or Path("/sys/fs/cgroup")) / self.name
        self.host_interface = f"wt{os.getpid() & 0xFFFFFF}-{number}"[:15]
        self._processes: list[subprocess.Popen[Any]] = []
        self._backends: list[Backend] = []

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(address for address in (self.address, self.address6) if address)

    def target(self, user_port: int = USER_PORT, direct_port: int = DIRECT_PORT) -> PodTarget:
        return PodTarget(
            name=self.name,
            netns=self.netns,
            cgroup=self.cgroup,
            addresses=self.addresses,
            user_port=user_port,
            direct_port=direct_port,
            interface=self.interface,
        )

    def __enter__(self) -> Pod:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def run(
        self, command: Sequence[str | Path], *, cgroup: Path | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Start a command inside (namespace and cgroup, or a cgroup below it)."""
        procs = os.open((cgroup or self.cgroup) / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        inside = os.open(self.netns, os.O_RDONLY | os.O_CLOEXEC)

        def enter() -> None:
            os.write(procs, b"0")
            if _libc.setns(inside, 0):
                raise OSError(ctypes.get_errno(), "setns")

        try:
            process = subprocess.Popen(command, preexec_fn=enter, **popen)  # noqa: PLW1509
        finally:
            os.close(procs)
            os.close(inside)
        self._processes.append(process)
        return process

    def call(self, function: Callable[[], T]) -> T:
        """A Python call in the pod's network namespace (in this process, so not its cgroup)."""
        return netns.run_in(self.netns, function)

    def nested_cgroup(self, name: str) -> Path:
        path = self.cgroup / name
        path.mkdir()
        return path

    def backend(self, *, cgroup: Path | None = None) -> Backend:
        backend = Backend(self, cgroup)
        self._backends.append(backend)
        return backend

    def listening(self, port: int = USER_PORT) -> bool:
        """Does anything listen on this port inside?"""

        def read() -> bool:
            tables = (Path("/proc/thread-self/net") / name for name in ("tcp", "tcp6"))
            lines = [line for t in tables if t.exists() for line in t.read_text().splitlines()[1:]]
            return any(
                fields[3] == "0A" and fields[1].endswith(f":{port:04X}")
                for fields in map(str.split, lines)
            )

        return self.call(read)

    def _make_netns(self) -> None:
        _ip("netns", "add", self.name)

    def _make(self) -> None:
        self._make_netns()
        peer = ("peer", "name", self.interface, "netns", self.name)
        _ip("link", "add", self.host_interface, "type", "veth", *peer)
        inside = ("-n", self.name)
        for where, link, address in (
            ((), self.host_interface, self._host4),
            ((), self.host_interface, self._host6),
            (inside, self.interface, f"{self.address}/30" if self.address else ""),
            (inside, self.interface, f"{self.address6}/64" if self.address6 else ""),
        ):
            if address:
                nodad = ("nodad",) if ":" in address else ()
                _ip(*where, "address", "add", address, "dev", link, *nodad)
        _ip("link", "set", self.host_interface, "up")
        _ip(*inside, "link", "set", self.interface, "up")
        _ip(*inside, "link", "set", "lo", "up")
        self.cgroup.mkdir(parents=True)

    def _remove(self) -> None:
        for backend in self._backends:
            backend.stop()
        folders = sorted((Path(f) for f, _, _ in os.walk(self.cgroup)), reverse=True)
        for folder in folders:
            for pid in (folder / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for process in self._processes:
            process.kill()
            process.wait()
        for folder in folders:
            until(lambda folder=folder: _removed(folder), f"removal of {folder}")  # type: ignore[misc]
        _ip("link", "del", self.host_interface, check=False)
        _ip("netns", "del", self.name, check=False)


class Backend:
    """A scripted server in a pod: every socket of it is driven from here."""

    def __init__(self, pod: Pod, cgroup: Path | None = None) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-S", "-E", str(_BACKEND), str(theirs.fileno())]
            self.process = pod.run(command, cgroup=cgroup, pass_fds=[theirs.fileno()])
        self._socket = ours
        self._results = ours.makefile("rb")
        self._numbers = itertools.count(1)

    def listen(self, host: str = "0.0.0.0", port: int = USER_PORT, **options: Any) -> RemoteSocket:
        """options: reuse_port, v6only, defer_accept, protocol."""
        listener = RemoteSocket(self, next(self._numbers))
        self.order(listener.number, "listen", host, port, options)
        return listener

    def order(self, number: int, method: str, *arguments: Any) -> Any:
        self._socket.sendall(pickle.dumps((number, method, arguments)))
        result = pickle.load(self._results)
        if isinstance(result, Exception):
            raise result
        return result

    def next_number(self) -> int:
        return next(self._numbers)

    def stop(self) -> None:
        """The process dies as an app does: at once. Idempotent."""
        self._results.close()
        self._socket.close()
        self.process.kill()
        self.process.wait()


class RemoteSocket:
    """A socket in the backend."""

    def __init__(self, backend: Backend, number: int) -> None:
        self._backend, self.number = backend, number
        self.peer: Any = None

    def accept(self, seconds: float = 10.0) -> RemoteSocket:
        accepted = RemoteSocket(self._backend, self._backend.next_number())
        accepted.peer = self._order("accept", accepted.number, seconds)
        return accepted

    def readable(self, seconds: float) -> bool:
        return bool(self._order("readable", seconds))

    def recv(self, size: int = 65536) -> bytes:
        data: bytes = self._order("recv", size)
        return data

    def recv_exactly(self, size: int) -> bytes:
        data: bytes = self._order("recv_exactly", size)
        return data

    def discard(self, size: int) -> int:
        return int(self._order("discard", size))

    def produce(self, size: int) -> None:
        self._order("produce", size)

    def sendall(self, data: bytes) -> None:
        self._order("sendall", data)

    def send_nonblocking(self, data: bytes) -> int:
        return int(self._order("send_nonblocking", data))

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self._order("setsockopt", level, option, value)

    def getpeername(self) -> Any:
        return self._order("getpeername")

    def shutdown(self, how: int = socket.SHUT_WR) -> None:
        self._order("shutdown", how)

    def close(self) -> None:
        self._order("close")

    def reset(self) -> None:
        self._order("reset")

    def _order(self, method: str, *arguments: Any) -> Any:
        return self._backend.order(self.number, method, *arguments)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done


def _dotted(number: int) -> str:
    return ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # its processes are not gone yet
        return False
    return True


needs_pods = pytest.mark.skipif(why_no_pods() is not None, reason=str(why_no_pods()))
needs_kernel = pytest.mark.skipif(why_no_kernel() is not None, reason=str(why_no_kernel()))
needs_go = pytest.mark.skipif(why_no_go() is not None, reason=str(why_no_go()))
