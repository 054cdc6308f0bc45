"""The loop of production, and a rig of client, relay and user container, always torn down."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop

from tests.relay.rig import Rig


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def rig() -> AsyncIterator[Callable[..., Awaitable[Rig]]]:
    """`await rig(container_concurrency=1)`: settings of the revision, whatever the test needs."""
    rigs: list[Rig] = []

    async def make(**settings: Any) -> Rig:
        made = await Rig.start(**settings)
        rigs.append(made)
        return made

    yield make
    for made in rigs:
        await made.stop()
