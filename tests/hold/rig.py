"""A pod whose injected container is hold, agents that borrow, and clients that never stop."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

from tests.pods import until
from tests.sidecar.pod import GET, Pod

ROOT = Path(__file__).parents[2]
WEIR = [sys.executable, "-P", "-m", "weir", "sidecar"]  # of this tree, not of what is installed
HOLD = ROOT / "hold" / "weir-hold"
BY_SIDECAR = b"hello"


class HoldPod(Pod):
    def hold(self, **environment: str) -> None:
        self.start([str(HOLD), *WEIR], pass_fds=(), PYTHONPATH=str(ROOT), **environment)
        until(lambda: self.running and self.place.accepts(8012), "hold listens")

    def agent(self, name: str) -> Agent:
        return Agent(self, name)

    @property
    def name(self) -> str:
        """What the container's process is by now."""
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/comm").read_text().strip()


class Agent:
    """`heard` lines from it, in order."""

    def __init__(self, pod: HoldPod, name: str, pid: int = 0) -> None:
        assert pod.process is not None
        target = str(pid or pod.process.pid)
        command = [sys.executable, "-P", "-m", "tests.hold.agent"]
        self.process = subprocess.Popen(
            [*command, target, f"/proc/{target}/ns/net", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def says(self, line: str, seconds: float = 20.0) -> None:
        while line not in self.lines:
            try:
                self.lines.append(self._queue.get(timeout=seconds))
            except queue.Empty:
                raise AssertionError(f"never said {line!r}: {self.lines}") from None

    def order(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.strip())


class Clients:
    """Connect, ask once, read the answer, again. `answers` by who gave them, `failures` as text."""

    def __init__(self, pod: HoldPod, count: int = 4) -> None:
        self._pod = pod
        self._stop = False
        self.answers: dict[bytes, int] = {}
        self.failures: list[str] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def answered_by(self, who: bytes) -> int:
        return self.answers.get(who, 0)

    def wait_for(self, who: bytes, more: int = 50) -> None:
        wanted = self.answered_by(who) + more
        until(lambda: self.answered_by(who) >= wanted, f"{who!r} answers: {self.failures}", 30.0)

    def stop(self) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop:
            try:
                answer = self._pod.ask(GET)
                who = answer.rpartition(b"\r\n\r\n")[2]
                if not answer.startswith(b"HTTP/1.1 200"):
                    raise ConnectionError(f"answered {answer!r}")
            except OSError as error:
                with self._lock:
                    self.failures.append(repr(error))
            else:
                with self._lock:
                    self.answers[who] = self.answers.get(who, 0) + 1
