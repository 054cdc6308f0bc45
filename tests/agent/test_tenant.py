"""What a worker does for a pod that is taken away again, or whose supervisor is gone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from weir.proxy.contract import RevisionSettings
from weir.proxy.control import Channel, Message
from weir.proxy.podserver import Role
from weir.proxy.policy.budget import Budget
from weir.proxy.tenant import SOCKETS_BATCH, Tenant

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Said:
    """In the place of a channel: what the supervisor would hear."""

    def __init__(self) -> None:
        self.operations: list[str] = []

    def send(self, message: Message, _: Any = ()) -> None:
        self.operations.append(message["op"])


class Worked:
    """A pod in another namespace, which `said` the worker needs sockets for; none have come."""

    def __init__(self, user_port: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()
        self.said = Said()
        settings = RevisionSettings(user_port=user_port)
        channel = cast(Channel, self.said)
        listeners = [(Role.DATA, self.listener)]
        self.tenant = Tenant("hello/1", settings, True, channel, listeners, Budget(8).share())


@pytest.fixture
async def worked() -> AsyncIterator[Worked]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        writer.close()

    app = await asyncio.start_server(answer, "127.0.0.1", 0)
    made = Worked(app.sockets[0].getsockname()[1])
    serving = asyncio.create_task(made.tenant.serve())
    await until(lambda: "need" in made.said.operations)
    yield made
    serving.cancel()
    await asyncio.wait([serving])
    app.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def some(count: int) -> list[int]:
    return [socket.socket().detach() for _ in range(count)]


async def asked(address: tuple[str, int]) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(REQUEST)
    async with asyncio.timeout(20):
        head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return head


async def test_who_can_not_reach_the_user_container_does_not_accept_for_it(worked: Worked) -> None:
    waiting = asyncio.create_task(asked(worked.address))
    done, _ = await asyncio.wait([waiting], timeout=0.1)  # the kernel takes it, and there it stays
    assert not done
    assert worked.tenant.relay.connections == 0
    worked.tenant.stock(some(SOCKETS_BATCH))
    assert (await waiting).startswith(b"HTTP/1.1 200 ")


async def test_a_pod_that_is_taken_away_before_it_has_begun_is_never_accepted_for(
    worked: Worked,
) -> None:
    await worked.tenant.leave()
    assert "closed" in worked.said.operations
    assert worked.listener.fileno() < 0, "and it was closed before that was said"
    worked.tenant.stock(some(SOCKETS_BATCH))
    with pytest.raises(ConnectionRefusedError):
        await asked(worked.address)


async def test_without_a_supervisor_what_there_is_no_socket_for_is_refused_at_once(
    worked: Worked,
) -> None:
    worked.tenant.alone()
    assert (await asked(worked.address)).startswith(b"HTTP/1.1 502 ")
