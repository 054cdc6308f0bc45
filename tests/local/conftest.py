"""`weir run` as a user starts it: a process, its JSON lines, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "telemetry"
FUNCTION = (sys.executable, str(EXAMPLE / "function.py"))
SAMPLES = 200  # at half a second each: more than any test needs


@dataclass
class Run:
    """A running `weir run --json`. `notes` is the file of its stderr."""

    process: "subprocess.Popen[str]"
    notes: Path
    samples: list[dict[str, Any]] = field(default_factory=list)

    def until(self, condition: Any) -> dict[str, Any]:
        """Read samples until one satisfies the condition; that sample."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            document = json.loads(line)
            if "sample" not in document:
                pytest.fail(f"the run ended: {document}\n{self.notes.read_text()}")
            self.samples.append(document["sample"])
            if condition(document["sample"]):
                return self.samples[-1]
            if len(self.samples) > SAMPLES:
                break
        pytest.fail(f"never seen; last {self.samples[-1:]}\n{self.notes.read_text()}")

    def summary(self) -> dict[str, Any]:
        """Read to the end; the summary."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            document = json.loads(line)
            if "summary" in document:
                found: dict[str, Any] = document["summary"]
                return found
        pytest.fail(f"no summary\n{self.notes.read_text()}")

    def stop(self) -> dict[str, Any]:
        """Ctrl-C; the summary."""
        self.process.send_signal(signal.SIGINT)
        return self.summary()


class Starter:
    """Starts runs and ends what a failing test left."""

    def __init__(self, tmp_path: Path) -> None:
        self._tmp_path = tmp_path
        self.runs: list[Run] = []

    def __call__(self, *arguments: str, command: tuple[str, ...] = FUNCTION) -> Run:
        notes = self._tmp_path / f"notes-{len(self.runs)}"
        with notes.open("w") as stderr:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "weir", "run", "--json"),
                    *("--routes", str(EXAMPLE / "routes.yaml")),
                    *("--state", str(self._tmp_path / "state"), *arguments, "--", *command),
                ],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.runs.append(Run(process, notes))
        return self.runs[-1]

    def close(self) -> None:
        for run in self.runs:
            if run.process.poll() is None:
                run.process.send_signal(signal.SIGINT)
                try:
                    run.process.wait(60)
                except subprocess.TimeoutExpired:
                    run.process.kill()
            run.process.wait()
            if run.process.stdout is not None:
                run.process.stdout.close()


@pytest.fixture
def weir_run(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    starter.close()


def left_behind(pid: int) -> list[str]:
    """Namespaces, links, cgroups and processes of the run with this pid that are still there."""
    name = f"weir-{pid}"
    found = [str(p) for p in (Path("/run/netns") / name, Path("/sys/class/net") / f"weir{pid}")]
    found += [str(p) for p in Path("/sys/fs/cgroup").glob(f"*/{name}")]
    found += [str(p) for p in Path("/sys/fs/cgroup").glob(name)]
    processes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            # every child of a run is given the run's pid or its directory on its command line
            if f"--parent\0{pid}\0" in command:
                processes.append(f"{entry.name}: {command}")
    return [p for p in found if Path(p).exists()] + processes
