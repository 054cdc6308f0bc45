"""What every benchmark needs: wrk, nginx and the CPU accounting of a whole machine."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Missing(Exception):
    """A tool that the benchmark needs is not installed; the message says which."""


@dataclass(frozen=True)
class Load:
    """One run of wrk. `machine_us`: CPU microseconds of the whole machine per request."""

    requests_per_second: float
    p50_us: float
    requests: int
    machine_us: float


def tool(name: str) -> str:
    """The path of a program. Raises Missing."""
    path = shutil.which(name, path=PATH)
    if path is None:
        raise Missing(f"{name} is not installed: make deps")
    return path


def wrk(url: str, connections: int, seconds: float, script: Path | None = None) -> Load:
    """Drive `url` over keep-alive connections. Raises RuntimeError if a request failed.

    `script` is a Lua file that says what is sent, if not a plain GET.
    """
    before = machine_seconds()
    out = subprocess.run(
        [
            *(tool("wrk"), "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--latency"),
            *(["-s", str(script)] if script is not None else []),
            url,
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    used = machine_seconds() - before
    if "Socket errors" in out or "Non-2xx" in out:
        raise RuntimeError(f"wrk {url}: {out}")
    requests = int(_find(r"(\d+) requests in", out))
    value, unit = re.search(r"50%\s+([\d.]+)(us|ms|s)", out).groups()  # type: ignore[union-attr]
    return Load(
        requests_per_second=float(_find(r"Requests/sec:\s+([\d.]+)", out)),
        p50_us=float(value) * {"us": 1, "ms": 1e3, "s": 1e6}[unit],
        requests=requests,
        machine_us=used * 1e6 / requests,
    )


def machine_seconds() -> float:
    """CPU seconds all processors have spent on anything but idling."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def nginx_configuration(directory: Path, port: int) -> Path:
    """A one-worker nginx that answers every request with 204, in the foreground."""
    path = directory / f"nginx-{port}.conf"
    path.write_text(
        f"daemon off; worker_processes 1; pid {directory}/nginx-{port}.pid;\n"
        "error_log stderr crit;\n"
        "events { worker_connections 4096; }\n"
        "http { access_log off; keepalive_requests 1000000000;\n"
        f"  server {{ listen {port}; location / {{ return 204; }} }} }}\n"
    )
    return path


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"wrk said nothing like {pattern!r}: {text}")
    return match.group(1)
