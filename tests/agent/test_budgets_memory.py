"""A worker without memory ends at once, and says why; it does not limp."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from weir.proxy.contract import RevisionSettings
from weir.proxy.control import Channel, Message
from weir.proxy.pod import PodSpec
from weir.proxy.served import ServedPod
from weir.proxy.tenancy import Tenancy

PLENTY = 1 << 30


class Process:
    """A worker's process, and the supervisor's end of its channel."""

    def __init__(self, process: asyncio.subprocess.Process, sock: socket.socket) -> None:
        self.process = process
        self.said: list[Message] = []
        self.ended = asyncio.Event()
        self.channel = Channel(sock, lambda message, _: self.said.append(message), self.ended.set)

    async def hears(self, operation: str) -> None:
        async with asyncio.timeout(20):
            while not any(message["op"] == operation for message in self.said):
                assert not self.ended.is_set()
                await asyncio.sleep(0.005)

    @property
    def data(self) -> int:
        """Bytes that count for its limit."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(pages[5]) * resource.getpagesize()


@contextlib.asynccontextmanager
async def started(memory: int) -> AsyncIterator[Process]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "weir.proxy.worker", str(theirs.fileno()), "0"),
            str(memory),
            pass_fds=[theirs.fileno()],
            stderr=asyncio.subprocess.PIPE,
        )
    made = Process(process, ours)
    try:
        await made.hears("hello")
        yield made
    finally:
        made.channel.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@pytest.fixture
def pod() -> Iterator[ServedPod]:
    made = ServedPod(
        PodSpec("hungry", RevisionSettings(user_port=1), listen="127.0.0.1", data_port=0), None, ""
    )
    made.open()
    yield made
    made.close()


async def flood(port: int, count: int) -> list[socket.socket]:
    """Heads that grow and don't end."""
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(count):
        client = socket.socket()
        client.setblocking(False)
        clients.append(client)
        with contextlib.suppress(OSError):
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nX-Padding: " + b"x" * 300_000)
    return clients


async def test_a_worker_that_gets_no_memory_is_dead_at_once_and_says_why(pod: ServedPod) -> None:
    async with started(PLENTY) as plenty:
        usual = plenty.data
    # what may be put aside is more than there is, so nobody is cut before it is too late
    async with started(usual + (4 << 20)) as short:
        short.channel.send(*Tenancy(pod, 1, None).adoption())
        clients = await flood(pod.listeners["data"][0].getsockname()[1], 100)
        async with asyncio.timeout(30):
            assert await short.process.wait() == -signal.SIGKILL
            await short.ended.wait()
            assert short.process.stderr is not None
            assert b"out of memory" in await short.process.stderr.read()
        for client in clients:
            client.close()


async def test_with_the_usual_memory_the_same_is_nothing(pod: ServedPod) -> None:
    async with started(PLENTY) as plenty:
        plenty.channel.send(*Tenancy(pod, 1, None).adoption())
        clients = await flood(pod.listeners["data"][0].getsockname()[1], 100)
        said = len(plenty.said)
        async with asyncio.timeout(30):
            while len(plenty.said) < said + 4:  # it lives
                await asyncio.sleep(0.05)
        assert plenty.process.returncode is None
        for client in clients:
            client.close()


@pytest.mark.parametrize("where", ["callback", "task", "destructor", "protocol"])
async def test_a_memory_error_anywhere_is_the_end(where: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LOST, where), stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(30):
        _, said = await process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert b"out of memory" in said


LOST = """
import asyncio, socket, sys, uvloop
from weir.proxy.memory import Memory, end_without
from weir.proxy.worker import Worker

def fail(*_):
    raise MemoryError

class Lost:
    __del__ = fail

class Broken(asyncio.Protocol):
    data_received = fail

async def fail_later():
    fail()

async def main():
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    running = loop.create_task(Worker(theirs, Memory(1 << 30)).run())
    await asyncio.sleep(0)
    if sys.argv[1] == "callback":
        loop.call_soon(fail)
    elif sys.argv[1] == "task":
        loop.create_task(fail_later())
    elif sys.argv[1] == "destructor":
        Lost()
    else:
        left, right = socket.socketpair()
        right.setblocking(False)
        await loop.create_connection(Broken, sock=right)
        left.send(b"x")
    await asyncio.sleep(10)

end_without()
uvloop.run(main())
"""
