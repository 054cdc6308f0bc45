"""Process 1 of a guest: mounts what a running system has, runs the tests, says how they ended.

Told by /out/arguments (JSON: what pytest gets), answers with /out/junit.xml, /out/dmesg and, last,
/out/status. Then the machine ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

OUT = Path("/run/out")
_9P = "trans=virtio,version=9p2000.L,msize=262144"
_RB_AUTOBOOT = 0x01234567  # reboot(2); qemu ends instead
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


def main() -> None:
    os.environ.update(
        PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        HOME="/root",
        LANG="C.UTF-8",
    )
    try:
        _mount("proc", "/proc")
        _mount("sysfs", "/sys")
        _mount("tmpfs", "/run")
        _mount("tmpfs", "/dev/shm")
        _mount("devpts", "/dev/pts")
        _mount("cgroup2", "/sys/fs/cgroup")
        _mount("bpf", "/sys/fs/bpf")
        _mount("9p", str(OUT), "out", _9P)
        _mount("9p", "/lib/modules", "modules", f"ro,cache=loose,{_9P}")
        with socket.socket() as any_socket:
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
        status = _tests(json.loads((OUT / "arguments").read_text()))
        (OUT / "dmesg").write_bytes(subprocess.run(["dmesg"], stdout=subprocess.PIPE).stdout)
        (OUT / "status").write_text(str(status))
    finally:
        os.sync()
        ctypes.CDLL(None).reboot(_RB_AUTOBOOT)


def _tests(arguments: list[str]) -> int:
    scratch = Path("/run/tmp")
    scratch.mkdir()
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no"),
            *("-o", "junit_family=xunit1", f"--junitxml={OUT}/junit.xml", *arguments),
        ],
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"},
        start_new_session=True,
    )
    while True:  # whoever lost its parent is ours, too
        pid, status = os.wait()
        if pid == child.pid:
            return os.waitstatus_to_exitcode(status)


def _mount(kind: str, where: str, what: str = "none", options: str = "defaults") -> None:
    Path(where).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", kind, "-o", options, what, where], check=True)


if __name__ == "__main__":
    main()
