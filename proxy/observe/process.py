"""What Prometheus wants to know of any process, from /proc (contract section 7.1)."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

from weir.proxy.observe.govalues import shortest

_UNLIMITED = float(2**64)


def process_lines() -> list[str]:
    """The families process_*; what can't be read here is left out."""
    lines: list[str] = []
    for name, kind, help_, read in _METRICS:
        try:
            value = read()
        except (OSError, ValueError, IndexError):
            continue
        lines.append(f"# HELP {name} {help_}")
        lines.append(f"# TYPE {name} {kind}")
        lines.append(f"{name} {shortest(value)}")
    return lines


def _read(name: str) -> str:
    with open(f"/proc/{name}") as file:  # noqa: PTH123 (pathlib costs the start 3 ms)
        return file.read()


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return round(usage.ru_utime + usage.ru_stime, 2)


def _limit(which: int) -> float:
    soft, _ = resource.getrlimit(which)
    return _UNLIMITED if soft == resource.RLIM_INFINITY else float(soft)


def _pages() -> list[str]:
    return _read("self/statm").split()


def _octets(field: str) -> float:
    """A counter of the network namespace, as the Go client library reports it."""
    lines = _read("self/net/netstat").splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        if names.startswith("IpExt:"):
            return float(values.split()[names.split().index(field)])
    raise ValueError(field)


def _started() -> float:
    boot = next(line for line in _read("stat").splitlines() if line.startswith("btime"))
    after_name = _read("self/stat").rpartition(")")[2].split()
    return float(boot.split()[1]) + int(after_name[19]) / os.sysconf("SC_CLK_TCK")


_METRICS: list[tuple[str, str, str, Callable[[], float]]] = [
    (
        "process_cpu_seconds_total",
        "counter",
        "Total user and system CPU time spent in seconds.",
        _cpu,
    ),
    (
        "process_max_fds",
        "gauge",
        "Maximum number of open file descriptors.",
        lambda: _limit(resource.RLIMIT_NOFILE),
    ),
    (
        "process_network_receive_bytes_total",
        "counter",
        "Number of bytes received by the process over the network.",
        lambda: _octets("InOctets"),
    ),
    (
        "process_network_transmit_bytes_total",
        "counter",
        "Number of bytes sent by the process over the network.",
        lambda: _octets("OutOctets"),
    ),
    (
        "process_open_fds",
        "gauge",
        "Number of open file descriptors.",
        lambda: float(len(os.listdir("/proc/self/fd")) - 1),  # noqa: PTH208
    ),
    (
        "process_resident_memory_bytes",
        "gauge",
        "Resident memory size in bytes.",
        lambda: float(int(_pages()[1]) * os.sysconf("SC_PAGE_SIZE")),
    ),
    (
        "process_start_time_seconds",
        "gauge",
        "Start time of the process since unix epoch in seconds.",
        _started,
    ),
    (
        "process_virtual_memory_bytes",
        "gauge",
        "Virtual memory size in bytes.",
        lambda: float(int(_pages()[0]) * os.sysconf("SC_PAGE_SIZE")),
    ),
    (
        "process_virtual_memory_max_bytes",
        "gauge",
        "Maximum amount of virtual memory available in bytes.",
        lambda: _limit(resource.RLIMIT_AS),
    ),
]
