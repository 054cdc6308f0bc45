from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.broker.harness import Mochi, Mosquitto, Sink, mosquitto_binary


@pytest.fixture(scope="session")
def mochi_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A broker in Go, compiled once; the module proxy must be there for the first time."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        pytest.skip("needs a Go toolchain (go) for a second broker")
    built = tmp_path_factory.mktemp("mochi") / "mochi"
    folder = Path(__file__).with_name("mochi")
    made = subprocess.run(
        [go, "build", "-o", str(built), "."], cwd=folder, capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"the second broker can't be built here: {made.stderr[-300:]}")
    return built


@pytest.fixture
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Mosquitto]:
    """A real mosquitto on a free port, with persistence; or another broker, see `every_broker`."""
    if getattr(request, "param", "mosquitto") == "mochi":
        started: Mosquitto = Mochi(tmp_path, request.getfixturevalue("mochi_binary"))
    elif mosquitto_binary() is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    else:
        started = Mosquitto(tmp_path)
    await started.start()
    yield started
    await started.stop()


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    started = Sink()
    await started.start()
    yield started
    await started.stop()
