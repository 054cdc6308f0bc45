"""How a sidecar starts, and what it costs when nothing happens: Weir's and the real queue-proxy.

CPU and wall time from the fork until its data port accepts and until the first readiness probe is
answered, at full speed and under the CPU limit of a small pod (40 thousandths of a CPU); then the
memory of the idle process.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from bench import load, sidecars
from tests.contract.place import Place
from tests.contract.world import DATA
from weir.proxy.cgroups import cgroup2_mount

_QUOTA_US, _PERIOD_US = 4_000, 100_000
_V1 = Path("/sys/fs/cgroup/cpu")
ENTER = 'echo $$ > "$0" && exec "$@"'
"""For sh: enter the cgroup whose file is the first argument, and become the rest."""


def measure(seconds: float, rounds: int = 5) -> dict[str, float]:
    """Medians of `rounds` starts each, taking turns; `seconds` is of no use here."""
    kinds, why = sidecars.available()
    if why:
        print(f"  {why}", flush=True)
    found: dict[str, float] = {}
    with sidecars.pod() as place:
        for row, limited in (("start", False), ("start at 40m", True)):
            runs: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
            try:
                for _ in range(rounds):
                    for kind in kinds:
                        for name, value in _start(place, kind, limited).items():
                            runs[kind].setdefault(name, []).append(value)
            except load.Missing as error:
                print(f"  {row}: {error}", flush=True)
                continue
            for kind, several in runs.items():
                for name, values in several.items():
                    found[f"{kind}, {row} | {name}"] = statistics.median(values)
    return found


def _start(place: Place, kind: str, limited: bool) -> dict[str, float]:
    command = sidecars.command(kind)
    with contextlib.ExitStack() as undo:
        if limited:
            procs = undo.enter_context(_limited())
            command = ["/bin/sh", "-c", ENTER, str(procs), *command]
        begun = time.monotonic()
        process = undo.enter_context(
            sidecars.started(place, command, sidecars.environment(concurrency=10))
        )
        deadline = begun + sidecars.PATIENCE
        while not place.accepts(DATA):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{kind} did not come up")
            time.sleep(0.001)
        accepting = time.monotonic() - begun
        accepting_cpu = sidecars.cpu_seconds(process.pid)
        while not sidecars.probed(place):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{kind} never answered a probe")
        probed = time.monotonic() - begun
        cpu = sidecars.cpu_seconds(process.pid)
        private, resident = sidecars.memory(process.pid)
        return {
            "accepts, ms": accepting * 1e3,
            "CPU ms": accepting_cpu * 1e3,
            "first probe, ms": probed * 1e3,
            "its CPU ms": cpu * 1e3,
            "private MB": private,
            "resident MB": resident,
        }


@contextlib.contextmanager
def _limited() -> Iterator[Path]:
    """A cgroup of 0.04 CPUs; the file to write a pid into. Raises load.Missing."""
    unified = cgroup2_mount()
    name = f"weir-bench-{os.getpid()}"
    if unified is not None and "cpu" in (unified / "cgroup.controllers").read_text().split():
        with contextlib.suppress(OSError):  # is it on for children already?
            (unified / "cgroup.subtree_control").write_text("+cpu")
        group, limit, value = unified / name, "cpu.max", f"{_QUOTA_US} {_PERIOD_US}"
    elif (_V1 / "cpu.cfs_quota_us").exists() or (_V1 / "cgroup.procs").exists():
        group, limit, value = _V1 / name, "cpu.cfs_quota_us", str(_QUOTA_US)
    else:
        raise load.Missing("no cpu controller of cgroups to limit a process with")
    try:
        group.mkdir()
    except OSError as error:
        raise load.Missing(f"{error}: needs root") from None
    try:
        (group / limit).write_text(value)
        yield group / "cgroup.procs"
    finally:
        _removed(group)


def _removed(group: Path) -> None:
    """A process that was killed leaves its cgroup a little later."""
    deadline = time.monotonic() + 10
    while True:
        try:
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
