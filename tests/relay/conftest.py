"""The loop of production, and a rig of client, relay and user container, always torn down."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop

from tests.relay.h2pair import Pair
from tests.relay.rig import Rig
from tests.relay.watched import Watched
from weir.proxy.environment import DEFAULT_REQUEST_LOG_TEMPLATE


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


@pytest.fixture
def watch(rig: Callable[..., Awaitable[Rig]]) -> Callable[..., Awaitable[Watched]]:
    """The same, with observers; `template` and `probes` are of the request log."""

    async def make(
        *, template: str = DEFAULT_REQUEST_LOG_TEMPLATE, probes: bool = False, **settings: Any
    ) -> Watched:
        return Watched(await rig(**settings), template, probes)

    return make


@pytest.fixture
async def pair() -> AsyncIterator[Callable[..., Awaitable[Pair]]]:
    """The same for HTTP/2: `await pair(container_concurrency=1)`."""
    pairs: list[Pair] = []

    async def make(**settings: Any) -> Pair:
        made = await Pair.start(**settings)
        pairs.append(made)
        return made

    yield make
    for made in pairs:
        await made.stop()
