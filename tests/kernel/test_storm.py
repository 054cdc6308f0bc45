"""Many callers at once, on both CPUs, most of them rude: nothing stays in flight."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random

import pytest

from tests.kernel.direct import GET, OK
from tests.pods import DIRECT_PORT, Pod, needs_kernel, until
from weir.proxy.kernel import AttachedPod, Kernel

pytestmark = needs_kernel

SERVER = f"""
import asyncio

class Server(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.rest = transport, b""
    def data_received(self, data):
        *whole, self.rest = (self.rest + data).split(b"\\r\\n\\r\\n")
        for _ in whole:
            self.transport.write({OK!r})

async def main():
    server = await asyncio.get_running_loop().create_server(Server, "0.0.0.0", 8080)
    await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture
def attached(kernel: Kernel, pod: Pod) -> Iterator[AttachedPod]:
    made = kernel.attach(pod.target())
    made.open_direct()
    pod.run([sys.executable, "-c", SERVER])
    until(pod.listening)
    yield made
    made.detach()


def test_polite_callers_are_counted_one_by_one(pod: Pod, attached: AttachedPod) -> None:
    callers, requests = 8, 300

    def call() -> None:
        with socket.create_connection((pod.address, DIRECT_PORT), 10) as client:
            for _ in range(requests):
                client.sendall(GET)
                got = b""
                while len(got) < len(OK):
                    got += client.recv(len(OK) - len(got))

    run_all(callers, lambda _: call())
    until(lambda: attached.counters().open_connections == 0)
    counters = attached.counters()
    assert (counters.started, counters.finished) == (callers * requests, callers * requests)
    assert (counters.in_flight, counters.aborted, counters.connections) == (0, 0, callers)
    assert sum(counters.latency) == counters.finished


def test_a_storm_of_resets_leaves_nothing_in_flight(pod: Pod, attached: AttachedPod) -> None:
    def storm(seed: int) -> None:
        random = Random(seed)
        for _ in range(150):
            with suppress(OSError), socket.create_connection((pod.address, DIRECT_PORT), 10) as c:
                sent = (GET * random.randrange(1, 4))[: random.randrange(1, 3 * len(GET))]
                c.sendall(sent)
                if len(sent) >= len(GET) and random.random() < 0.3:
                    c.recv(100)
                if random.random() < 0.8:
                    c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    run_all(8, storm)
    until(lambda: attached.counters().open_connections == 0)
    counters = attached.counters()
    assert counters.in_flight == 0
    assert counters.connections == 8 * 150
    assert counters.started == counters.finished + counters.aborted
    before = counters.integral_ns
    assert attached.counters().integral_ns == before, "with nothing in flight it stands still"


def run_all(count: int, body: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=body, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
