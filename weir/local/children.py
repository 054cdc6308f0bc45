"""The processes of a local run: started so that they end with it, their output line by line.

Owns starting, stopping and CPU accounting of a child; what they do is theirs.
"""

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from weir.local import enter

Print = Callable[[str, str], None]  # (name of the child, line)


class Child:
    """One process. `tail` keeps its last lines for an error message; lines with `noise` in them are
    dropped."""

    def __init__(self, name: str, output: Print, noise: str | None = None) -> None:
        self.name = name
        self.tail: deque[str] = deque(maxlen=5)
        self._output = output
        self._noise = noise
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None

    async def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        netns: Path | None = None,
        cgroup: Path | None = None,
    ) -> None:
        """Start `command` with `environment` added to ours; inside the pod if one is given."""
        self._process = await asyncio.create_subprocess_exec(
            *enter.command(command, netns, cgroup),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            process_group=0,  # Ctrl-C in the terminal is for us; we stop children in order
        )
        self._pump = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        """The pid, 0 before the start."""
        return self._process.pid if self._process is not None else 0

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def wait(self) -> int:
        """Its exit status, negative for a signal."""
        assert self._process is not None and self._pump is not None
        status = await self._process.wait()
        await asyncio.wait([self._pump], timeout=1.0)  # a grandchild may keep the pipe open
        return status

    async def stop(self, seconds: float) -> int:
        """SIGTERM, wait, SIGKILL after `seconds`. Idempotent; 0 if it was never started."""
        if self._process is None:
            return 0
        self._signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(self.wait(), seconds)
        except TimeoutError:
            self._signal(signal.SIGKILL)
            return await self.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self.running and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # a line over the reader's limit: it was dropped, go on
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            if self._noise is not None and self._noise in text:
                continue
            self.tail.append(text)
            self._output(self.name, text)


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time the processes have used, all threads; an ended one counts 0."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9
