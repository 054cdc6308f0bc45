"""A bpffs for the pins of a test's own agents; agents whose workers the test plays."""

import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.agent.played import Workers
from tests.kernel.bpffs import mounted
from weir.proxy import workers as workers_module
from weir.proxy.workers import WorkerProcess


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    at = tmp_path / "bpf"
    at.mkdir()
    with mounted(at) as made:
        yield made


@pytest.fixture
async def workers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Workers]:
    made = Workers()

    async def start(self: WorkerProcess) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.ends.append(theirs)
        self._listen(ours)

    monkeypatch.setattr(WorkerProcess, "start", start)
    monkeypatch.setattr(workers_module, "RESTART_SECONDS", 0.1)
    yield made
    for end in made.ends:
        end.close()
