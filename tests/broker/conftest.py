from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.broker.harness import Mosquitto, Sink, mosquitto_binary


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    """A real mosquitto on a free port, with persistence."""
    if mosquitto_binary() is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
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
