"""The loop of production, and a rig of client, relay and user container, always torn down."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop

from tests.relay.h2pair import Pair
from tests.relay.podrig import MakePod, Pod
from tests.relay.rig import Rig
from tests.relay.watched import Watched
from weir.proxy.environment import DEFAULT_REQUEST_LOG_TEMPLATE


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


Make = Callable[..., Awaitable[Any]]


@contextlib.asynccontextmanager
async def _torn_down(start: Make) -> AsyncIterator[Make]:
    """The same `start`; what it made is stopped in the end."""
    every: list[Any] = []

    async def make(**settings: Any) -> Any:
        every.append(await start(**settings))
        return every[-1]

    yield make
    for made in every:
        await made.stop()


@pytest.fixture
async def rig() -> AsyncIterator[Callable[..., Awaitable[Rig]]]:
    """`await rig(container_concurrency=1)`: settings of the revision, whatever the test needs."""
    async with _torn_down(Rig.start) as make:
        yield make


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
    async with _torn_down(Pair.start) as make:
        yield make


@pytest.fixture
async def pod() -> AsyncIterator[MakePod]:
    """The same for all ports of a pod: `await pod(quiet=0.1)`."""
    async with _torn_down(Pod.start) as make:
        yield make
