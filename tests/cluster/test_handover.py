"""Pods of a real Knative change hands between agents and sidecars under every kind of traffic.

gRPC and WebSockets are spoken by upstream's own test programs, grpcio and `websockets`.
"""

import asyncio
import contextlib
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.cluster import build, cluster, images
from tests.cluster.nodeagent import Direct, agent_for, all_ended, holds, more, next_agent_for
from tests.cluster.places import NODE_ADDRESS, PUBLIC_DOMAIN, upstream_image
from tests.cluster.service import NAMESPACE, Load, Service, until
from tests.cluster.test_service import CLASS, WITHOUT_ACTIVATOR
from weir.proxy import contract

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400), pytest.mark.usefixtures("hold")]

Make = Callable[..., Service]
ONE = {**WITHOUT_ACTIVATOR, f"{CLASS}/min-scale": "1"}
PROGRAMS = ("grpc-ping", "wsserver")
H2C = [{"name": "h2c", "containerPort": 8080}]


@pytest.fixture(scope="module")
def programs(knative: None) -> None:
    """Upstream's, as user containers."""
    build.serving(PROGRAMS)
    for archive in images.archives(PROGRAMS):
        cluster.load(archive)


async def test_agents_hand_a_pod_over_side_by_side_without_a_failed_request(service: Make) -> None:
    kept = service(ONE)
    (pod,) = kept.pods()
    with agent_for(pod) as first, contextlib.ExitStack() as undo:
        await first.until_open()
        agents = [first]
        async with Load(kept, clients=4) as load, Direct(pod) as direct:
            for _ in range(4):
                await more(load, direct)
                agents.append(undo.enter_context(next_agent_for(pod)))
                await agents[-1].until_rung()
                await more(load, direct)
                agents[-2].end()
                await agents[-1].until_open()
                await more(load, direct)
                assert await asyncio.to_thread(agents[-2].ended) == 0
                assert holds(pod), "no sidecar came between"
        assert load.failures == []
        assert direct.failures == []
        await all_ended(agents[-1], pod, direct.answers)
    assert kept.restarts() == {"user-container": 0, "queue-proxy": 0}


async def test_an_agent_that_stands_still_is_replaced_by_the_sidecar_until_it_wakes_up(
    service: Make,
) -> None:
    kept = service(ONE)
    (pod,) = kept.pods()
    with agent_for(pod) as agent:
        await agent.until_open()
        async with Load(kept, clients=4) as load, Direct(pod) as direct:
            await more(load, direct)
            agent.stand_still()
            await until(lambda: not holds(pod), "the sidecar has taken over")
            async with Load(kept, clients=4) as others:  # the first ones may all be in its hands
                await more(others, direct)
            assert others.failures == []
            agent.go_on()
            await agent.until_open()
            await more(load, direct)
        assert load.failures == [], "those that were in its hands were answered when it woke up"
        assert direct.failures == []
        await all_ended(agent, pod, direct.answers)
    assert kept.restarts() == {"user-container": 0, "queue-proxy": 0}


async def test_calls_and_streams_of_grpc_by_all_ways(service: Make, programs: None) -> None:
    """Through the ingress, kept connections to the data port as of a mesh, and directly."""
    spoken = service(ONE, image=upstream_image("grpc-ping"), ports=H2C, env=[])
    (pod,) = spoken.pods()
    address = pod["status"]["podIP"]
    ways = (
        f"{NODE_ADDRESS}:80",
        f"{address}:{contract.DATA_PORT_H2C}",
        f"{address}:{contract.DIRECT_PORT}",
    )
    with agent_for(pod) as old, contextlib.ExitStack() as undo:
        await old.until_open()
        new = undo.enter_context(next_agent_for(pod))
        async with contextlib.AsyncExitStack() as stack:
            callers = [await stack.enter_async_context(Grpc(spoken, way)) for way in ways]
            for caller in callers:
                await caller.pinged("before")
            await until(lambda: all(c.answers > 20 for c in callers), "all of them are answered")
            await new.until_rung()
            old.end()
            await new.until_open()
            at = [caller.answers for caller in callers]
            for caller in callers:
                await caller.pinged("after")
            await until(
                lambda: all(c.answers > n + 20 for c, n in zip(callers, at, strict=True)),
                "all of them are answered by the next one",
            )
            for caller in callers:
                await caller.stream_ended()
        assert await asyncio.to_thread(old.ended) == 0
        assert [caller.failures for caller in callers] == [[], [], []]
        await all_ended(new, pod, callers[-1].answers + 1)  # and the stream
        answered = callers[0].answers
        assert new.stop() == 0
        async with Grpc(spoken, ways[0]) as caller:
            await until(lambda: caller.answers > 20, "the sidecar answers")
            await caller.stream_ended()
        assert (answered > 0, caller.failures) == (True, [])
    assert spoken.restarts() == {"user-container": 0, "queue-proxy": 0}


async def test_websockets_stay_with_whoever_had_them(service: Make, programs: None) -> None:
    spoken = service(ONE, image=upstream_image("wsserver"), env=[])
    (pod,) = spoken.pods()
    with agent_for(pod) as old, contextlib.ExitStack() as undo:
        await old.until_held()
        new = undo.enter_context(next_agent_for(pod))
        async with opened(spoken) as first:
            await echoed(first, "first, before")
            await new.until_rung()
            old.end()
            await new.until_held()
            async with opened(spoken) as second:
                await echoed(second, "second, before")
                await echoed(first, "first, after")
                await first.close()
                assert await asyncio.to_thread(old.ended) == 0
                new.end()
                await until(lambda: not holds(pod), "the sidecar")
                async with opened(spoken) as third:
                    await echoed(third, "third")
                await echoed(second, "second, after" * 1000)
                assert second.close_code is None
        assert await asyncio.to_thread(new.ended) == 0
    assert spoken.restarts() == {"user-container": 0, "queue-proxy": 0}


def host_of(service: Service) -> str:
    return f"{service.name}.{NAMESPACE}.{PUBLIC_DOMAIN}"


def opened(service: Service) -> connect:
    return connect(f"ws://{host_of(service)}/", host=NODE_ADDRESS, port=80)


async def echoed(socket: ClientConnection, text: str) -> None:
    await socket.send(text)
    async with asyncio.timeout(60):
        assert await socket.recv() == text


class Grpc:
    """Calls one after the other, and beside them a stream that stays open, on one channel."""

    def __init__(self, service: Service, way: str) -> None:
        options = [
            ("grpc.default_authority", host_of(service)),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channel = grpc.aio.insecure_channel(way, options=options)
        self.answers = 0
        self.failures: list[str] = []
        self._over = False

    async def __aenter__(self) -> "Grpc":
        self._stream = self._channel.stream_stream("/ping.PingService/PingStream")()
        self._task = asyncio.create_task(self._ask())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        await self._task
        await self._channel.close()

    async def pinged(self, text: str) -> None:
        async with asyncio.timeout(60):
            await self._stream.write(message(text))
            assert await self._stream.read() == message(text)

    async def stream_ended(self) -> None:
        async with asyncio.timeout(60):
            await self._stream.done_writing()
            assert await self._stream.read() is grpc.aio.EOF
            assert await self._stream.code() is grpc.StatusCode.OK

    async def _ask(self) -> None:
        ping = self._channel.unary_unary("/ping.PingService/Ping")
        while not self._over:
            try:
                assert await ping(message("x"), timeout=60) == message("x")
                self.answers += 1
            except (AssertionError, grpc.aio.AioRpcError) as failure:
                self.failures.append(repr(failure))
                await asyncio.sleep(0.01)


def message(text: str) -> bytes:
    """A message of ping.proto: its only field, a string."""
    raw = text.encode()
    assert len(raw) < 128
    return b"\x0a%c%b" % (len(raw), raw)
