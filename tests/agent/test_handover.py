"""A pod changes hands under traffic that is more than short requests, by real clients.

Whoever held the pod ends what it has begun; whoever asks anew is served by the next one. A client
that is told to go (`Connection: close`, GOAWAY) and comes back is no failure; an error or a cut is.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import queue
import random
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from tests.agent.borrowed import (
    DATA_PORT,
    Agent,
    Clients,
    HeldPod,
    closing,
    listeners_in,
    stop_process,
    worker_of,
)
from tests.agent.handover import (
    CHANGES,
    TLS_PORT,
    Change,
    EchoPod,
    GrpcClients,
    GrpcPod,
    SecureClients,
    StreamingPod,
    channel,
    secured,
)
from tests.hold.rig import HOLD
from tests.pods import needs_kernel, until
from tests.relay.certificates import Pair, make_pair, needs_openssl
from weir.proxy.agent import DRAIN_SECONDS
from weir.proxy.contract import UPGRADED_SECONDS

pytestmark = [
    needs_kernel,
    pytest.mark.skipif(not HOLD.exists(), reason="needs hold/weir-hold (make hold)"),
    pytest.mark.timeout(180),
]
T = TypeVar("T")
PIECE = bytes(range(256)) * 4096
PIECES = 100
ROUNDS = int(os.environ.get("WEIR_HOLD_ROUNDS", "12"))

every_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@contextlib.contextmanager
def changing(change: Change, pod: HeldPod, folder: Path) -> Iterator[Iterator[None]]:
    steps = change(pod, folder)
    with contextlib.closing(steps):  # type: ignore[type-var]
        next(steps)
        yield steps


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path / "pair")


@every_change
def test_calls_and_streams_of_grpc(change: Change, tmp_path: Path) -> None:
    with GrpcPod() as pod, changing(change, pod, tmp_path) as steps:
        with closing(clients := GrpcClients(pod)), channel(pod) as line:
            said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            watched = line.unary_stream("/s/Watch")(b"", timeout=120)
            chat = line.stream_stream("/s/Chat")(iter(said.get, None), timeout=120)
            assert next(watched) == b"0"
            said.put(b"before")
            assert next(chat) == b"BEFORE"
            clients.more()
            next(steps)
            clients.more()
            said.put(b"after")
            assert next(chat) == b"AFTER"
            said.put(None)
            assert list(chat) == []
            assert chat.code() is grpc.StatusCode.OK
            pod.let_slow_ones_go()
            numbers = [int(message) for message in watched]
            assert numbers == list(range(1, len(numbers) + 1))
            assert watched.code() is grpc.StatusCode.OK
            next(steps, None)
            clients.more()
        assert clients.failures == []


@every_change
def test_an_upgraded_connection(change: Change, tmp_path: Path) -> None:
    with EchoPod() as pod, changing(change, pod, tmp_path) as steps:
        address = f"ws://{pod.pod.address}:{DATA_PORT}/"
        with closing(clients := Clients(pod)):
            with connect(address) as kept:
                kept.send("before")
                assert kept.recv(60) == "BEFORE"
                next(steps)
                clients.more()
                kept.send("after" * 100_000)
                assert kept.recv(60) == "AFTER" * 100_000
                with connect(address) as fresh:
                    fresh.send("new")
                    assert fresh.recv(60) == "NEW"
            assert kept.close_code == 1000
            next(steps, None)
            clients.more()
        assert clients.failures == []


@every_change
def test_events_that_go_on_and_on(change: Change, tmp_path: Path) -> None:
    with StreamingPod() as pod, changing(change, pod, tmp_path) as steps:
        with closing(clients := Clients(pod)):
            connection = http.client.HTTPConnection(pod.pod.address, DATA_PORT, timeout=60)
            connection.request("GET", "/events")
            events = connection.getresponse()
            assert events.readline() == b"data: 0\n"
            next(steps)
            clients.more()
            assert events.readline() == b"\n"
            assert events.readline() == b"data: 1\n"
            pod.let_slow_ones_go()
            rest = events.read().split()[1::2]  # raises IncompleteRead if it is cut
            assert rest == [b"%d" % number for number in range(2, len(rest) + 2)]
            connection.close()
            next(steps, None)
            clients.more()
        assert clients.failures == []


@pytest.mark.parametrize(
    ("end", "bound"), [("terminate", DRAIN_SECONDS), ("kill", UPGRADED_SECONDS)]
)
def test_an_agent_that_ends_gives_what_is_in_flight_all_of_its_time(
    end: str, bound: float, tmp_path: Path
) -> None:
    """More than the half minute in which pods are given back, or the minute that tunnels have."""
    with StreamingPod() as pod, closing(agent := Agent(tmp_path, pod)):
        agent.until_held()
        connection = http.client.HTTPConnection(pod.pod.address, DATA_PORT, timeout=60)
        connection.request("GET", "/events")
        events = connection.getresponse()
        assert events.readline() == b"data: 0\n"
        getattr(agent.process, end)()
        until(lambda: pod.by_sidecar, "the sidecar", 30.0)
        until_then = time.monotonic() + bound + 2
        while time.monotonic() < until_then:
            assert events.readline()
        pod.let_slow_ones_go()
        assert events.read()  # raises IncompleteRead if it is cut
        connection.close()
        assert agent.process.wait(60) == (0 if end == "terminate" else -9)


@every_change
def test_an_upload_of_a_hundred_megabytes(change: Change, tmp_path: Path) -> None:
    with StreamingPod() as pod, changing(change, pod, tmp_path) as steps:

        def pieces() -> Iterator[bytes]:
            for number in range(PIECES):
                if number == PIECES // 2:
                    next(steps)
                    clients.more()
                yield PIECE

        with closing(clients := Clients(pod)):
            connection = http.client.HTTPConnection(pod.pod.address, DATA_PORT, timeout=60)
            length = str(len(PIECE) * PIECES)
            connection.request("POST", "/", pieces(), {"Content-Length": length})
            response = connection.getresponse()
            expected = hashlib.sha256(PIECE * PIECES).hexdigest()
            assert (response.status, response.read().decode()) == (200, expected)
            connection.close()
            next(steps, None)
            clients.more()
        assert clients.failures == []


@needs_openssl
@every_change
def test_requests_over_tls(change: Change, tmp_path: Path, pair: Pair) -> None:
    with secured(HeldPod, pair) as pod, changing(change, pod, tmp_path) as steps:
        with closing(clients := SecureClients(pod, pair), plain := Clients(pod, 2)):
            clients.more()
            next(steps)
            clients.more()
            next(steps, None)
            clients.more()
            plain.more()
        assert clients.failures == []
        assert plain.failures == []


@needs_openssl
@every_change
def test_a_handshake_of_tls_that_has_begun(change: Change, tmp_path: Path, pair: Pair) -> None:
    with secured(HeldPod, pair) as pod, changing(change, pod, tmp_path) as steps:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=str(pair.certificate))
        tls = context.wrap_bio(incoming, outgoing, server_hostname="kn-user-default")
        with socket.create_connection((pod.pod.address, TLS_PORT), 60) as sock:

            def until_it_does(step: Callable[[], T]) -> T:
                while True:
                    try:
                        return step()
                    except ssl.SSLWantReadError:
                        sock.sendall(outgoing.read())
                        incoming.write(sock.recv(65536))

            with pytest.raises(ssl.SSLWantReadError):
                tls.do_handshake()
            hello = outgoing.read()
            sock.sendall(hello[:100])
            with closing(clients := SecureClients(pod, pair, 1)):
                clients.more(1)  # connections are accepted in turn: it is, too
                next(steps)
                sock.sendall(hello[100:])
                until_it_does(tls.do_handshake)
                tls.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = until_it_does(lambda: tls.read(65536))
                assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
                assert b"\r\nConnection: close\r\n" in answer
                next(steps, None)
                clients.more()
        assert clients.failures == []


@needs_openssl
@every_change
def test_grpc_over_tls(change: Change, tmp_path: Path, pair: Pair) -> None:
    with secured(GrpcPod, pair) as pod, changing(change, pod, tmp_path) as steps:
        with closing(clients := GrpcClients(pod, pair=pair)), channel(pod, pair) as line:
            watched = line.unary_stream("/s/Watch")(b"", timeout=120)
            assert next(watched) == b"0"
            clients.more()
            next(steps)
            clients.more()
            pod.let_slow_ones_go()
            numbers = [int(message) for message in watched]
            assert numbers == list(range(1, len(numbers) + 1))
            assert watched.code() is grpc.StatusCode.OK
            next(steps, None)
            clients.more()
        assert clients.failures == []


# --- a worker is killed: what was in it is lost, and nothing else -----------------------------


@contextlib.contextmanager
def two_workers(pod: HeldPod, folder: Path) -> Iterator[Agent]:
    with closing(agent := Agent(folder / "agent", pod, workers=2)):
        agent.until_held()
        until(lambda: len(agent.workers) == 2, "both workers")
        yield agent


def kill_worker(pod: HeldPod, agent: Agent) -> None:
    os.kill(worker_of(pod, agent), signal.SIGKILL)
    until(lambda: agent.pod()["worker_restarts"] == 1, "the pod has moved")


def test_a_killed_worker_cuts_its_calls_of_grpc_and_the_next_ones_are_answered(
    tmp_path: Path,
) -> None:
    with GrpcPod() as pod, two_workers(pod, tmp_path) as agent, channel(pod) as line:
        watched = line.unary_stream("/s/Watch")(b"", timeout=120)
        assert next(watched) == b"0"
        kill_worker(pod, agent)
        with pytest.raises(grpc.RpcError) as cut:
            list(watched)
        assert cut.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        echo = line.unary_unary("/s/Echo")
        assert echo(b"again", timeout=60, wait_for_ready=True) == b"again"
        assert agent.pod()["lease"] == "held"


def test_a_killed_worker_cuts_its_upgraded_connections_and_the_next_ones_are_made(
    tmp_path: Path,
) -> None:
    with EchoPod() as pod, two_workers(pod, tmp_path) as agent:
        address = f"ws://{pod.pod.address}:{DATA_PORT}/"
        with connect(address) as lost, contextlib.suppress(ConnectionClosedError):
            lost.send("before")
            assert lost.recv(60) == "BEFORE"
            kill_worker(pod, agent)
            with pytest.raises(ConnectionClosedError):
                lost.recv(60)
        with connect(address) as fresh:
            fresh.send("new")
            assert fresh.recv(60) == "NEW"


def test_a_killed_worker_cuts_its_events_and_its_uploads_and_no_half_answer_looks_whole(
    tmp_path: Path,
) -> None:
    with StreamingPod() as pod, two_workers(pod, tmp_path) as agent:
        events = http.client.HTTPConnection(pod.pod.address, DATA_PORT, timeout=60)
        events.request("GET", "/events")
        response = events.getresponse()
        assert response.readline() == b"data: 0\n"
        upload = http.client.HTTPConnection(pod.pod.address, DATA_PORT, timeout=60)
        upload.putrequest("POST", "/")
        upload.putheader("Content-Length", str(2 * len(PIECE)))
        upload.endheaders(PIECE)
        until(lambda: agent.pod()["relayed"].get("in_flight") == 2, "both are in flight")
        kill_worker(pod, agent)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            upload.send(PIECE)
            upload.getresponse()
        assert pod.get() == (200, b"hello")


# --- a worker is wedged -----------------------------------------------------------------------


def test_a_worker_that_stands_still_while_its_pod_changes_hands_accepts_nothing_afterwards(
    tmp_path: Path,
) -> None:
    """Its supervisor is well, and can't get the listeners back: hold makes them dead ones."""
    with HeldPod() as pod, closing(old := Agent(tmp_path / "old", pod)):
        old.until_held()
        worker = worker_of(pod, old)
        with closing(new := Agent(tmp_path / "new", pod)):
            new.until_reason("rung")
            stop_process(worker)
            old.process.terminate()
            new.until_held()
            until(lambda: new.pod()["ready"], "the new one serves")
            assert listeners_in(pod, worker) == set()
            os.kill(worker, signal.SIGCONT)
            with closing(clients := Clients(pod)):
                clients.more(500)
            assert clients.failures == []
            until(lambda: new.relayed() == clients.answers, "all of them are the new one's")
            assert old.process.wait(60) == 0


# --- over and over ----------------------------------------------------------------------------


@needs_openssl
@pytest.mark.timeout(600)
def test_calls_of_grpc_survive_agents_that_end_are_killed_or_stand_still_at_random(
    tmp_path: Path, pair: Pair
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with secured(GrpcPod, pair) as pod, contextlib.ExitStack() as undo:
        agents = [Agent(tmp_path / "0", pod)]
        undo.enter_context(closing(agents[0]))
        agents[0].until_held()
        undo.enter_context(closing(plain := GrpcClients(pod, 2)))
        undo.enter_context(closing(secure := GrpcClients(pod, 2, pair)))
        for number in range(1, ROUNDS + 1):
            old = agents[-1]
            agents.append(new := Agent(tmp_path / str(number), pod))
            undo.enter_context(closing(new))
            new.until_reason("rung")
            plain.more(chance.randrange(1, 100))
            secure.more(chance.randrange(1, 100))
            end = chance.choice(("terminate", "kill", "stand still"))
            if end == "stand still":
                pids = [old.process.pid, *old.workers]
                for pid in pids:
                    stop_process(pid)
                new.until_held()
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
                old.until_reason("rung")
                old.process.terminate()
            else:
                getattr(old.process, end)()
            new.until_held()
            plain.more(1)
            secure.more(1)
        plain.stop()
        secure.stop()
        print(f"{plain.answers} answers, {secure.answers} over TLS")
        assert plain.failures == []
        assert secure.failures == []
