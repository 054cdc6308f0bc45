"""What every benchmark needs: wrk, h2load, nginx and the CPU accounting of a whole machine."""

import os
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Missing(Exception):
    """A tool that the benchmark needs is not installed; the message says which."""


@dataclass(frozen=True)
class Load:
    """One run. `machine_us`: CPU microseconds of the whole machine per request."""

    requests_per_second: float
    p50_us: float
    requests: int
    machine_us: float
    p99_us: float


def tool(name: str) -> str:
    """The path of a program. Raises Missing."""
    path = shutil.which(name, path=PATH)
    if path is None:
        raise Missing(f"{name} is not installed: make deps")
    return path


def has(name: str) -> bool:
    return shutil.which(name, path=PATH) is not None


def wrk(
    url: str,
    connections: int,
    seconds: float,
    script: Path | None = None,
    fields: Sequence[str] = (),
) -> Load:
    """Drive `url`, over keep-alive connections unless `fields` (of the request's header) close
    them. Raises RuntimeError if a request failed.

    `script` is a Lua file that says what is sent, if not a plain GET.
    """
    before = machine_seconds()
    out = subprocess.run(
        [
            *(tool("wrk"), "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--latency"),
            *(["-s", str(script)] if script is not None else []),
            *_headers(fields),
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
    return Load(
        requests_per_second=float(_find(r"Requests/sec:\s+([\d.]+)", out)),
        p50_us=_latency("50", out),
        requests=requests,
        machine_us=used * 1e6 / requests,
        p99_us=_latency("99", out),
    )


def h2load(
    url: str,
    connections: int,
    streams: int,
    seconds: float,
    body: bytes = b"",
    fields: Sequence[str] = (),
) -> Load:
    """Drive `url` over HTTP/2 in the clear, so many streams at once on each connection.

    Raises RuntimeError if a request failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        log, data = Path(folder, "log"), Path(folder, "body")
        data.write_bytes(body)
        before = machine_seconds()
        out = subprocess.run(
            [
                *(tool("h2load"), "-t1", f"-c{connections}", f"-m{streams}", f"-D{seconds:.0f}"),
                *(f"--log-file={log}", *([f"-d{data}"] if body else []), *_headers(fields), url),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        used = machine_seconds() - before
        took = [int(line.rsplit("\t", 1)[1]) for line in log.read_text().splitlines()]
    done, failed, errored = re.search(  # type: ignore[union-attr]
        r"(\d+) succeeded, (\d+) failed, (\d+) errored", out
    ).groups()
    if int(failed) or int(errored) or not int(done):
        raise RuntimeError(f"h2load {url}: {out}")
    cuts = statistics.quantiles(took, n=100)
    return Load(
        requests_per_second=float(_find(r"([\d.]+) req/s", out)),
        p50_us=cuts[49],
        requests=int(done),
        machine_us=used * 1e6 / int(done),
        p99_us=cuts[98],
    )


def _headers(fields: Sequence[str]) -> list[str]:
    return [word for field in fields for word in ("-H", field)]


def _latency(percent: str, out: str) -> float:
    """Microseconds."""
    value, unit = re.search(percent + r"%\s+([\d.]+)(us|ms|s)", out).groups()  # type: ignore[union-attr]
    return float(value) * {"us": 1, "ms": 1e3, "s": 1e6}[unit]


def machine_seconds() -> float:
    """CPU seconds all processors have spent on anything but idling."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def nginx_configuration(directory: Path, *ports: int) -> Path:
    """A one-worker nginx that answers every request with 204, in the foreground."""
    port = ports[0]
    listens = "".join(f"listen {port}; " for port in ports)
    path = directory / f"nginx-{port}.conf"
    path.write_text(
        f"daemon off; worker_processes 1; pid {directory}/nginx-{port}.pid;\n"
        "error_log stderr crit;\n"
        "events { worker_connections 4096; }\n"
        "http { access_log off; keepalive_requests 1000000000;\n"
        f"  server {{ {listens}location / {{ return 204; }} }} }}\n"
    )
    return path


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"nothing was said like {pattern!r}: {text}")
    return match.group(1)
