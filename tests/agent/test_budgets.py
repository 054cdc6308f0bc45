"""What one pod does costs no other: hungry pods and their clients, and workers that had enough."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.agent.borrowed import Agent, Clients, HeldPod, closing
from tests.pods import USER_PORT, needs_kernel, until

pytestmark = needs_kernel
MEMORY = 256 << 20
"""Of a worker here: a quarter of what it has else, so that the loads may be small."""
SMALL = f"""
import sys
from weir.proxy import workers
from weir.cli import main
workers.WORKER_MEMORY = {MEMORY}
sys.exit(main(sys.argv[5:]))
"""


class HungryPod(HeldPod):
    """Its function answers without end, or reads no uploads, or says hello."""

    program = f"""
import asyncio, resource, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            path = head.split(b" ")[1]
            if path == b"/endless":
                writer.write(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n")
                while True:
                    writer.write(b"10000\\r\\n" + b"x" * 65536 + b"\\r\\n")
                    await writer.drain()
            elif path == b"/upload":
                await asyncio.sleep(1000)
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello")
    except (OSError, asyncio.IncompleteReadError):
        writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", {USER_PORT}, limit=4096, backlog=4096)
    await server.serve_forever()
asyncio.run(main())
"""


class SmallAgent(Agent):
    """With one worker, of little memory."""

    def __init__(self, folder: Path, *pods: HeldPod) -> None:
        super().__init__(folder, *pods, prefix=(sys.executable, "-P", "-c", SMALL))
        self.folder = folder
        for number in range(len(pods)):
            self.until_held(number)
        until(lambda: all(self.pod(number)["ready"] for number in range(len(pods))), "ready")

    @property
    def said(self) -> str:
        return (self.folder / "log").read_text()


class Watch:
    """The most that a worker had of memory and descriptors, as long as it lasts."""

    def __init__(self, pid: int) -> None:
        self.data = self.descriptors = 0
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while not self._ended.wait(0.01):
                pages = Path(f"/proc/{self._pid}/statm").read_text().split()
                self.data = max(self.data, int(pages[5]) * resource.getpagesize())
                count = len(os.listdir(f"/proc/{self._pid}/fd"))
                self.descriptors = max(self.descriptors, count)


class Crowd:
    """Many connections to one pod, with what they send as fast as it is taken."""

    def __init__(self, pod: HeldPod, port: int = 8012) -> None:
        self.pod = pod.pod.name
        self._where = (pod.pod.address, port)
        self.sockets: list[socket.socket] = []

    def connect(self, count: int, data: bytes = b"", buffer: int = 4096) -> None:
        for _ in range(count):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            self.sockets.append(sock)
            sock.connect(self._where)
            sock.setblocking(False)
            if data:
                with contextlib.suppress(OSError):
                    sock.send(data)

    def pour(self, data: bytes, seconds: float) -> int:
        """Send it on all of them, again and again; the bytes that were taken."""
        poller = select.poll()
        files = {sock.fileno(): sock for sock in self.sockets}
        for file in files:
            poller.register(file, select.POLLOUT)
        until_then = time.monotonic() + seconds
        sent = 0
        while time.monotonic() < until_then:
            for file, _ in poller.poll(100):
                try:
                    sent += files[file].send(data)
                except BlockingIOError:
                    pass
                except OSError:
                    poller.unregister(file)
        return sent

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()


@pytest.fixture(autouse=True)
def many_files() -> Iterator[int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


PADDING = b"X-Padding: " + b"x" * 60_000 + b"\r\n"
PROBE = {"User-Agent": "kube-probe/1", "K-Network-Probe": "queue"}


def fine(pod: HeldPod) -> bool:
    """The kubelet and the autoscaler are answered."""
    return (
        pod.get("/", headers=PROBE) == (200, b"queue")
        and pod.get("/no-such-page", 8022)[0] == 404
        and pod.get("/metrics", 9090)[0] == 200
    )


def answered_elsewhere(tmp_path: Path, load: Callable[[Crowd, SmallAgent], None]) -> Watch:
    """Load one pod, and see that another one in the same worker notices nothing of it."""
    with (
        HungryPod() as hungry,
        HeldPod() as other,
        closing(agent := SmallAgent(tmp_path, hungry, other)),
        closing(clients := Clients(other)),
        contextlib.closing(crowd := Crowd(hungry)),
    ):
        (worker,) = agent.workers
        watch = Watch(worker)
        try:
            load(crowd, agent)
            clients.more()
            assert fine(other)
            assert fine(hungry)
            assert hungry.get() == (200, b"hello")
            crowd.close()
            clients.more()
            until(lambda: fine(hungry) and hungry.get() == (200, b"hello"), "it recovers", 30)
        finally:
            watch.stop()
        clients.stop()
        assert clients.failures == []
        assert agent.workers == [worker]
        assert agent.pod(1)["worker_restarts"] == 0
        print(f"{watch.data >> 20} MB of data, {watch.descriptors} descriptors")
        assert watch.data < MEMORY
        return watch


def test_a_pod_with_a_megabyte_of_environment_is_served(tmp_path: Path) -> None:
    # what Kubernetes adds for each Service of the namespace, and settings that the relay reads
    services = {f"SERVICE_{number}_PORT": "x" * 1000 for number in range(850)}
    settings = {
        "SERVING_LOGGING_CONFIG": "x" * 120_000,
        "TRACING_CONFIG_ZIPKIN_ENDPOINT": "é" * 30_000,
    }
    with HeldPod(**services, **settings) as pod, closing(agent := Agent(tmp_path, pod)):
        agent.until_held()
        assert pod.get() == (200, b"hello")
        assert pod.hold.poll() is None
        assert not pod.by_sidecar


def cuts(crowd: Crowd, agent: SmallAgent) -> bool:
    return f"pod {crowd.pod}: " in agent.said and " connections are cut: " in agent.said


def test_ten_thousand_idle_connections_of_one_pod(tmp_path: Path) -> None:
    def load(crowd: Crowd, agent: SmallAgent) -> None:
        crowd.connect(10_000)
        crowd.connect(500, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")

    watch = answered_elsewhere(tmp_path, load)
    assert watch.descriptors < resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_clients_of_one_pod_that_read_nothing_of_endless_answers(tmp_path: Path) -> None:
    def load(crowd: Crowd, agent: SmallAgent) -> None:
        crowd.connect(1500, b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        until(lambda: cuts(crowd, agent), "there is too much", 60)

    answered_elsewhere(tmp_path, load)


def test_uploads_that_nobody_reads(tmp_path: Path) -> None:
    def load(crowd: Crowd, agent: SmallAgent) -> None:
        crowd.connect(
            1500, b"POST /upload HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n"
        )
        crowd.pour(b"x" * 65536, 4)

    answered_elsewhere(tmp_path, load)


def test_heads_that_never_end(tmp_path: Path) -> None:
    def load(crowd: Crowd, agent: SmallAgent) -> None:
        crowd.connect(1500, b"GET / HTTP/1.1\r\n")
        until(lambda: crowd.pour(PADDING, 0.5) < 0 or cuts(crowd, agent), "there is too much", 60)

    answered_elsewhere(tmp_path, load)


def test_what_the_relay_of_a_pod_complains_of_names_the_pod(tmp_path: Path) -> None:
    with (
        HeldPod() as pod,
        HeldPod() as other,
        closing(agent := SmallAgent(tmp_path, pod, other)),
    ):
        pod.app.kill()
        pod.app.wait()
        until(lambda: pod.get()[0] == 502, "nobody listens any more")
        assert other.get() == (200, b"hello")
        complaints = [line for line in agent.said.splitlines() if " weir.relay: " in line]
        assert complaints
        assert all(f" weir.relay: pod {pod.pod.name}: " in line for line in complaints)
