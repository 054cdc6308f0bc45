"""Weir's sidecar against the real queue-proxy and against no proxy at all, in front of one nginx.

Each of them runs in a network namespace of its own, with the ports and the environment of a pod
(`bench.sidecars`), and they take turns: round by round, not one after the other. Requests carry
what an ingress adds (X-Forwarded-For and -Proto, so Forwarded has to be made). CPU is the sidecar
process's own, all threads.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import load, sidecars
from bench.sidecars import NOBODY, ORIGINAL, USER, USER_HTTP2, WEIR, Sidecar

INGRESS = (
    "Host: hello.default.example.com",
    "X-Forwarded-For: 198.51.100.7",
    "X-Forwarded-Proto: https",
    "X-Request-Id: 7f0c1d6e-5f43-4c56-9a8e-0d9b3b1c2a11",
)
EVENT = "\n".join(
    [
        'wrk.method = "POST"',
        'wrk.body = string.rep("0123456789abcdef", 64)',
        'wrk.headers["Content-Type"] = "application/json"',
        'wrk.headers["Ce-Specversion"] = "1.0"',
        'wrk.headers["Ce-Id"] = "7f0c1d6e-5f43-4c56-9a8e-0d9b3b1c2a11"',
        'wrk.headers["Ce-Source"] = "mqtt://broker.example.com/fleet/a17"',
        'wrk.headers["Ce-Type"] = "com.example.telemetry"',
        'wrk.headers["Ce-Time"] = "2026-11-24T10:00:00.000Z"',
    ]
)
MESSAGE = b"\0\0\0\0\x7b" + b"x" * 123
"""As gRPC frames a message."""
Drive = Callable[[int, float], load.Load]


@dataclass(frozen=True)
class Case:
    """One row; `drive` gets the port and the seconds."""

    name: str
    drive: Drive


def kept_cases() -> Iterator[Case]:
    for connections in (1, 16, 64):
        yield Case(f"GET, c{connections}", _http1(connections, INGRESS))


def closing_cases(event: Path) -> Iterator[Case]:
    for connections in (1, 16, 64):
        fields = (*INGRESS, "Connection: close")
        yield Case(f"GET, close, c{connections}", _http1(connections, fields))
    yield Case("POST 1 KiB, c16", _http1(16, INGRESS, event))


def http2_cases() -> Iterator[Case]:
    for connections, streams in ((1, 1), (1, 16), (16, 1), (16, 4)):
        yield Case(f"h2c GET, c{connections} m{streams}", _http2(connections, streams))
    call = ("Content-Type: application/grpc", "TE: trailers")
    yield Case("gRPC unary, c1 m16", _http2(1, 16, "/grpc/call", MESSAGE, call))
    yield Case("gRPC unary, c16 m4", _http2(16, 4, "/grpc/call", MESSAGE, call))


def _http1(connections: int, fields: tuple[str, ...], script: Path | None = None) -> Drive:
    return lambda port, seconds: load.wrk(
        f"http://127.0.0.1:{port}/", connections, seconds, script, fields
    )


def _http2(
    connections: int,
    streams: int,
    path: str = "/",
    body: bytes = b"",
    more: tuple[str, ...] = (),
) -> Drive:
    fields = tuple(field.replace("Host:", ":authority:") for field in (*INGRESS, *more))
    return lambda port, seconds: load.h2load(
        f"http://127.0.0.1:{port}{path}", connections, streams, seconds, body, fields
    )


def measure(seconds: float, rounds: int = 3) -> dict[str, float]:
    """Medians over `rounds` rounds of `seconds` for each sidecar. Raises load.Missing."""
    found: dict[str, float] = {}
    kinds, why = sidecars.available()
    if why:
        print(f"  {why}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        event = Path(folder, "event.lua")
        event.write_text(EVENT)
        kept, closing = list(kept_cases()), list(closing_cases(event))
        found |= _compared(kinds, 0, USER, kept, seconds, rounds)
        found |= _compared(kinds, 10, USER, kept + closing, seconds, rounds)
    if load.has("h2load"):
        found |= _compared(kinds, 10, USER_HTTP2, list(http2_cases()), seconds, rounds)
    else:
        print("  HTTP/2 is not measured: h2load is not installed (make deps)", flush=True)
    return found


def _compared(
    kinds: list[str], limit: int, user_port: int, rows: list[Case], seconds: float, rounds: int
) -> dict[str, float]:
    found: dict[str, float] = {}
    with contextlib.ExitStack() as undo:
        running = {
            kind: undo.enter_context(sidecars.sidecar(kind, limit, user_port))
            for kind in (NOBODY, *kinds)
        }
        for sidecar in running.values():
            _run(sidecar, rows[0], 1)  # warm
        for row in rows:
            runs: dict[str, list[tuple[load.Load, float]]] = {kind: [] for kind in running}
            for _ in range(rounds):
                for kind, sidecar in running.items():
                    runs[kind].append(_run(sidecar, row, seconds))
            name = f"{row.name}, CC={limit}"
            found |= {f"{name} | {column}": value for column, value in _row(runs).items()}
    return found


def _run(sidecar: Sidecar, row: Case, seconds: float) -> tuple[load.Load, float]:
    """What the client saw, and CPU microseconds of the sidecar per request."""
    before = sidecar.cpu_seconds()
    seen = sidecar.place.run(lambda: row.drive(sidecar.port, seconds))
    return seen, (sidecar.cpu_seconds() - before) * 1e6 / seen.requests


def _row(runs: dict[str, list[tuple[load.Load, float]]]) -> dict[str, float]:
    """Ratios are those of the rounds, not of the medians."""
    row: dict[str, float] = {}
    for kind, several in runs.items():
        row[f"{kind} req/s"] = statistics.median(seen.requests_per_second for seen, _ in several)
    for kind in runs:
        if kind != NOBODY:
            row[f"{kind} CPU us"] = statistics.median(cpu for _, cpu in runs[kind])
    for kind, several in runs.items():
        if kind != NOBODY:
            row[f"{kind} p50 us"] = statistics.median(seen.p50_us for seen, _ in several)
            row[f"{kind} p99 us"] = statistics.median(seen.p99_us for seen, _ in several)
    if ORIGINAL in runs:
        pairs = list(zip(runs[WEIR], runs[ORIGINAL], strict=True))
        row["x req/s"] = statistics.median(
            ours.requests_per_second / theirs.requests_per_second
            for (ours, _), (theirs, _) in pairs
        )
        row["x CPU"] = statistics.median(ours / theirs for (_, ours), (_, theirs) in pairs)
    return row
