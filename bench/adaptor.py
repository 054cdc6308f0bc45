"""What an event costs in the adaptor: ours, a plain aiomqtt + aiohttp one, and a minimal one in C.

All three subscribe at QoS 1, acknowledge after the sink's 2xx and have 64 connections to it; same
broker (a real mosquitto), same publisher and same sink (bench/c/rig.c, both in one process) within
one run. CPU is what the kernel charged the adaptor's process (/proc/PID/schedstat), so other load
on the machine shifts it less than time would. `full`: as many events under way as the adaptor can
use, which on a small machine is bounded by the broker and the sink as well; `1 000/s`: paced, for
the time from publish to the function's door.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ADAPTORS = ("weir", "plain", "C")
SMALL, MIDDLE, LARGE = 64, 1024, 65_536
PACED = 1000
"""Events per second for latencies."""
PATIENCE = 60.0
WARM = 1.0
_SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
_C = Path(__file__).with_name("c")


@dataclass(frozen=True, slots=True)
class Load:
    """`rate` 0.0: full."""

    qos: int
    size: int
    topics: int
    rate: float = 0.0

    def __str__(self) -> str:
        size = f"{self.size} B" if self.size < 1024 else f"{self.size // 1024} KiB"
        how = f"{self.rate:,.0f}/s" if self.rate else "full"
        return f"QoS {self.qos}, {size}, {self.topics} topic{'s' * (self.topics > 1)}, {how}"


LOADS = (
    *(Load(1, MIDDLE, topics) for topics in (64, 1)),
    *(Load(1, size, 64) for size in (SMALL, LARGE)),
    *(Load(qos, size, 64) for qos in (0, 2) for size in (SMALL, MIDDLE, LARGE)),
    *(Load(qos, MIDDLE, 64, PACED) for qos in (1, 0, 2)),
)


@dataclass(frozen=True, slots=True)
class Result:
    """Microseconds, and events per second."""

    cpu: float
    per_second: float
    p50: float
    p99: float


def measure(seconds: float, loads: tuple[Load, ...] = LOADS) -> dict[str, float]:
    """Rows of `load | figure`. Takes about four times `seconds` per load. Raises RuntimeError when
    mosquitto or a C compiler is missing."""
    with tempfile.TemporaryDirectory(prefix="weir-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        for program in ("rig", "epoll_adaptor"):
            _compile(program, folder)
        broker = stack.enter_context(_mosquitto(folder))
        found: dict[str, float] = {}
        for load in loads:
            results = {each: _one(folder, each, broker, load, seconds) for each in ADAPTORS}
            for adaptor, result in results.items():
                found[f"{load} | {adaptor} us/event"] = result.cpu
            found[f"{load} | plain / weir"] = results["plain"].cpu / results["weir"].cpu
            for adaptor, result in results.items():
                if load.rate:
                    found[f"{load} | {adaptor} p50 us"] = result.p50
                    found[f"{load} | {adaptor} p99 us"] = result.p99
                else:
                    found[f"{load} | {adaptor}/s"] = result.per_second
        return found


def _one(folder: Path, adaptor: str, broker: int, load: Load, seconds: float) -> Result:
    topic = f"bench/{uuid.uuid4().hex[:12]}"
    outstanding = 500 if load.size < LARGE else 100
    arguments = (broker, topic, load.topics, load.qos, load.size, load.rate, outstanding, WARM)
    with contextlib.ExitStack() as stack:
        rig = stack.enter_context(_child([folder / "rig", *arguments, seconds], read=True))
        sink = int(_line(rig, "listening")[0])
        command = {"weir": _weir, "plain": _plain, "C": _c}[adaptor]
        process = stack.enter_context(_child(command(folder, broker, sink, f"{topic}/#")))
        _line(rig, "start", process)
        before = _cpu(process.pid)
        count, took, p50, p99, lost = map(int, _line(rig, "end", process))
        used = _cpu(process.pid) - before
    if not count or lost > count / 100:
        raise RuntimeError(f"{adaptor}, {load}: {count} events arrived, {lost} were lost")
    return Result(used / count * 1e6, count / took * 1e9, p50, p99)


def _line(
    rig: subprocess.Popen[str], word: str, adaptor: subprocess.Popen[str] | None = None
) -> list[str]:
    """The numbers behind a word that the rig says. Raises RuntimeError when it ends instead."""
    assert rig.stdout is not None
    line = rig.stdout.readline().split()
    if not line or line[0] != word:
        ended = None if adaptor is None else adaptor.poll()
        raise RuntimeError(f"the rig said {line} instead of `{word}`; the adaptor: {ended}")
    return line[1:]


def _cpu(pid: int) -> float:
    """Seconds of CPU of all threads."""
    return sum(
        int((task / "schedstat").read_text().split()[0]) / 1e9
        for task in Path(f"/proc/{pid}/task").iterdir()
    )


# --- the adaptors ---------------------------------------------------------------------------------


def _weir(folder: Path, broker: int, sink: int, pattern: str) -> list[object]:
    routes = folder / "routes.yaml"
    routes.write_text(
        f"routes: [{{filter: '{pattern}', sink: 'http://127.0.0.1:{sink}/ev', "
        "datacontenttype: application/json}]\n"
    )
    return [
        *(sys.executable, "-P", "-m", "weir", "adaptor"),
        *("--broker", f"mqtt://127.0.0.1:{broker}", "--routes", routes),
        *("--client-id", f"bench-{uuid.uuid4().hex[:12]}", "--session-expiry", "60"),
        *("--quarantine", folder / "quarantine.db"),
    ]


def _plain(folder: Path, broker: int, sink: int, pattern: str) -> list[object]:
    return [sys.executable, "-P", "-m", "bench.plain", broker, sink, pattern]


def _c(folder: Path, broker: int, sink: int, pattern: str) -> list[object]:
    return [folder / "epoll_adaptor", broker, sink, pattern, 1]


# --- processes ------------------------------------------------------------------------------------


def _compile(program: str, folder: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("the adaptor bench needs a C compiler: apt-get install gcc")
    source, made = str(_C / f"{program}.c"), str(folder / program)
    subprocess.run([compiler, "-std=gnu11", "-O2", "-o", made, source], check=True)


@contextlib.contextmanager
def _child(
    command: list[object], *, quiet: bool = False, read: bool = False
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [str(each) for each in command],
        stdout=subprocess.PIPE if read else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if quiet else None,
        text=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def _mosquitto(folder: Path) -> Iterator[int]:
    binary = shutil.which("mosquitto", path=_SBIN)
    if binary is None:
        raise RuntimeError("the adaptor bench needs mosquitto: apt-get install mosquitto")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    configuration = folder / "mosquitto.conf"
    user = "user root\n" if os.geteuid() == 0 else ""
    configuration.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_inflight_messages 256\n"
        f"max_queued_messages 0\nset_tcp_nodelay true\nlog_type error\n{user}"
    )
    with _child([binary, "-c", configuration], quiet=True):
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        else:
            raise RuntimeError(f"mosquitto does not listen on port {port}")
        yield port
