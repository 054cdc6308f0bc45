"""Steering and counting are proven on a throw-away namespace before any pod is touched.

Owns a child process in a network namespace and a cgroup of its own, with a server in it that
listens on 127.0.0.1 only: reached by the direct port it answers one request, and says whom it saw
as its peer. Needs no tool and no interface but loopback. `python -m weir.proxy.selftest` is that
child.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from weir.proxy import netns
from weir.proxy.attached import AttachedPod, KernelUnavailable, PodTarget
from weir.proxy.cgroups import cgroup2_mount
from weir.proxy.contract import DIRECT_PORT
from weir.proxy.kernel import Kernel

log = logging.getLogger("weir.agent")

USER_PORT = 8080
PATIENCE = 10.0  # seconds; a kernel that can do it takes milliseconds, a new Python a bit more
_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


def run(kernel: Kernel) -> None:
    """Raises KernelUnavailable with what did not work. Nothing is left of it."""
    try:
        _run(kernel)
    except KernelUnavailable as error:
        raise KernelUnavailable(f"the self-test failed: {error}") from error
    except (OSError, RuntimeError) as error:
        raise KernelUnavailable(f"the self-test failed: {error}; please report it") from error


def _run(kernel: Kernel) -> None:
    mount = cgroup2_mount()
    if mount is None:
        raise KernelUnavailable("no cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup")
    name = f"weir-selftest-{os.getpid()}"
    # one of loopback's own: nobody else's pod can have it
    address = f"127.{os.getpid() >> 16 & 63 | 64}.{os.getpid() >> 8 & 255}.{os.getpid() & 255 | 2}"
    cgroup = _own_cgroup(mount) / name
    try:
        cgroup.mkdir()
    except PermissionError as error:  # nothing is known then, and it may well work
        log.warning("no self-test is made without CAP_DAC_OVERRIDE: %s", error)
        return
    try:
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "weir.proxy.selftest", str(cgroup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as child:
            try:
                _told(child, b"inside")
                inside = Path(f"/proc/{child.pid}/ns/net")
                target = PodTarget(name, inside, cgroup, (address,), USER_PORT, DIRECT_PORT, "lo")
                attached = kernel.attach(target)
                try:
                    _prove(child, attached, address)
                finally:
                    attached.detach()
            finally:
                child.kill()
    finally:
        until = time.monotonic() + PATIENCE
        while not _removed(cgroup) and time.monotonic() < until:
            time.sleep(0.001)


def _own_cgroup(mount: Path) -> Path:
    """This process's own, where it may make one; the root when that isn't visible from here."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            own = mount / line[3:].lstrip("/")
            if own.is_dir():
                return own
    return mount


def _prove(child: subprocess.Popen[bytes], attached: AttachedPod, address: str) -> None:
    assert child.stdin is not None
    child.stdin.write(b"listen\n")
    child.stdin.flush()
    _told(child, b"listening")
    if attached.steering() == "none":
        raise KernelUnavailable("a listener did not enter the map")
    attached.open_direct()
    peer = netns.run_in(attached.target.netns, lambda: _ask(address))
    if peer != "127.0.0.1":
        raise KernelUnavailable(f"the app saw {peer or 'nobody'} as its peer, not 127.0.0.1")
    until = time.monotonic() + PATIENCE
    while attached.counters().open_connections and time.monotonic() < until:
        time.sleep(0.001)
    counters = attached.counters()
    seen = (counters.started, counters.finished, counters.connections, counters.in_flight)
    if seen != (1, 1, 1, 0):
        raise KernelUnavailable(
            f"of one request on one connection {counters.started} were counted as started, "
            f"{counters.finished} as finished, on {counters.connections}"
        )
    attached.close_direct()
    try:
        netns.run_in(attached.target.netns, lambda: _ask(address))
    except ConnectionRefusedError:
        return
    raise KernelUnavailable("a closed direct port takes connections")


def _ask(address: str) -> str:
    """One request; the peer that its server saw."""
    with socket.socket() as client:  # nothing is resolved, and so no codec of names is loaded
        client.settimeout(PATIENCE)
        client.bind((address, 0))
        client.connect((address, DIRECT_PORT))
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        with client.makefile("rb") as answer:
            return answer.read().decode().rpartition("\r\n\r\n")[2]


def _told(child: subprocess.Popen[bytes], wanted: bytes) -> None:
    assert child.stdout is not None
    ready, _, _ = select.select([child.stdout], [], [], PATIENCE)
    said = child.stdout.readline().strip() if ready else b"nothing"
    if said != wanted:
        raise RuntimeError(f"its server said {said.decode()!r} instead of {wanted.decode()!r}")


def _removed(cgroup: Path) -> bool:
    with suppress(FileNotFoundError):
        try:
            cgroup.rmdir()
        except OSError:  # the child has not quite gone
            return False
    return True


def main(cgroup: Path) -> None:
    """The server: a namespace, a listener when it is asked for one, one answer per connection."""
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"unshare: {os.strerror(code)}")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
    print("inside", flush=True)
    if not sys.stdin.readline():
        return
    with socket.create_server(("127.0.0.1", USER_PORT)) as listener:
        print("listening", flush=True)
        while True:
            connection, (peer, _) = listener.accept()
            with connection:
                asked = b""
                while not asked.endswith(b"\r\n\r\n"):
                    asked += connection.recv(4096) or b"\r\n\r\n"
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(peer)}\r\n\r\n"
                connection.sendall((head + peer).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
