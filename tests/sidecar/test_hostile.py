"""Clients and apps that mean harm, or don't care: the sidecar serves others, in bounded memory.

Bounds are generous, they tell "bounded" from "grows with what is sent"; no time is measured.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator

import pytest

from tests.pods import needs_pods, until
from tests.sidecar.pod import (
    DATA,
    GET,
    OK,
    PATIENCE,
    USER,
    Pod,
    many_files,
    received,
    rest,
    user_container,
)

pytestmark = needs_pods

KEPT = GET.replace(b"Connection: close\r\n", b"")
UPLOAD = b"POST /upload HTTP/1.1\r\nHost: hello\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"10000\r\n" + b"u" * 65536 + b"\r\n"
STALL_SECONDS = 0.5
"""Who could not send for so long is stopped by back-pressure."""


@pytest.fixture
def serving(pod: Pod) -> Iterator[Pod]:
    """A sidecar that has answered a request already, in front of a user container that works."""
    with user_container(pod.place):
        pod.start()
        pod.serving()
        for _ in range(20):
            assert pod.ask().endswith(b"hello")
        yield pod
        assert pod.ask().endswith(b"hello"), "it serves no more"
        assert "Traceback" not in pod.said


@pytest.fixture
def lonely(pod: Pod) -> Iterator[tuple[Pod, socket.socket]]:
    """A sidecar, and the listener of a user container whose connections the test accepts."""
    with pod.place.listen(USER) as listener:
        listener.settimeout(PATIENCE)
        pod.start()
        pod.serving()
        yield pod, listener
        listener.settimeout(PATIENCE)
        with pod.connect() as client:
            client.sendall(GET)
            with _asked(listener) as user:
                user.sendall(OK)
                assert rest(client).endswith(b"hello"), "it serves no more"
        assert "Traceback" not in pod.said


def _asked(listener: socket.socket) -> socket.socket:
    """The connection of the next request, once its head is there."""
    user, _ = listener.accept()
    user.settimeout(PATIENCE)
    received(user, b"\r\n\r\n")
    return user


def _poured(sock: socket.socket, data: bytes, most: int) -> int:
    """How many bytes could be sent until nothing went any more, or `most`."""
    sock.settimeout(STALL_SECONDS)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < most:
            sent += sock.send(data)
    sock.settimeout(PATIENCE)
    return sent


def _back(pod: Pod, before: float, megabytes: float) -> None:
    until(lambda: pod.resident < before + megabytes, "the memory is back", PATIENCE)


# --- connections ----------------------------------------------------------------------------------


def test_ten_thousand_idle_connections(serving: Pod) -> None:
    with many_files() as files, contextlib.ExitStack() as undo:
        count = min(10_000, files - 1000)
        if count < 1000:
            pytest.skip(f"only {files} descriptors may be open here")
        before = serving.resident
        for _ in range(count):
            undo.enter_context(serving.connect())
        until(lambda: serving.descriptors >= count, "all are accepted", 60)
        assert serving.ask().endswith(b"hello")
        grown = (serving.resident - before) / count * 1000
        print(f"{grown:.1f} MB for 1000 idle connections")
        assert grown < 12
        undo.close()
        until(lambda: serving.descriptors < 100, "all are closed", 60)
        _back(serving, before, 100)


def test_the_limit_of_open_files_is_the_hard_one(serving: Pod) -> None:
    assert serving.process is not None
    soft, hard = resource.prlimit(serving.process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard


def test_heads_that_come_byte_by_byte(serving: Pod) -> None:
    with contextlib.ExitStack() as undo:
        before = serving.resident
        clients = [undo.enter_context(serving.connect()) for _ in range(500)]
        head = b"GET /slow HTTP/1.1\r\nHost: hello\r\nX-Pad: "
        for byte in head:
            for client in clients:
                client.send(bytes([byte]))
        assert serving.ask().endswith(b"hello")
        assert serving.resident - before < 25
        for client in clients:  # nobody was given up that goes on after all
            client.sendall(b"x\r\n\r\n")
        for client in clients:
            assert received(client, b"hello").startswith(b"HTTP/1.1 200")


def test_bodies_that_come_byte_by_byte(lonely: tuple[Pod, socket.socket]) -> None:
    pod, listener = lonely
    with contextlib.ExitStack() as undo:
        before = pod.resident
        users = []
        clients = [undo.enter_context(pod.connect()) for _ in range(200)]
        for client in clients:
            client.sendall(b"POST /slow HTTP/1.1\r\nHost: hello\r\nContent-Length: 100000\r\n\r\n")
            users.append(undo.enter_context(_asked(listener)))
        for _ in range(50):
            for client in clients:
                client.send(b"b")
        for user in users:
            assert user.recv(1) == b"b"  # what came is passed on, not collected
        assert pod.resident - before < 25
        undo.close()


# --- those who don't read -------------------------------------------------------------------------


def test_a_client_that_never_reads_its_response(lonely: tuple[Pod, socket.socket]) -> None:
    pod, listener = lonely
    with pod.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.sendall(GET)
        with _asked(listener) as user:
            before = pod.resident
            user.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            sent = _poured(user, b"r" * 65536, 500_000_000)
            assert sent < 100_000_000, "no back-pressure"
            assert pod.resident - before < 10
            client.close()
            with pytest.raises(ConnectionError):  # the app hears that nobody wants it
                while True:
                    user.sendall(b"r" * 65536)


def test_an_endless_upload_to_an_app_that_never_reads(lonely: tuple[Pod, socket.socket]) -> None:
    pod, listener = lonely
    with pod.connect() as client:
        client.sendall(UPLOAD)
        with _asked(listener) as user:
            before = pod.resident
            sent = _poured(client, CHUNK, 500_000_000)
            assert sent < 100_000_000, "no back-pressure"
            assert pod.resident - before < 10
            client.close()
            rest(user)  # ends


def test_an_endless_upload_while_the_app_can_not_be_reached(pod: Pod) -> None:
    """The request waits in the breaker, which is full; so does its body, at the client. That this
    client has left is seen when its turn has come, and gives the turn to the next one."""
    with pod.place.listen(USER) as listener:
        listener.settimeout(PATIENCE)
        pod.start(CONTAINER_CONCURRENCY="1")
        pod.serving()
        with pod.connect() as first, pod.connect() as client:
            first.sendall(KEPT)
            with _asked(listener) as user:
                before = pod.resident
                client.sendall(UPLOAD)
                assert _poured(client, CHUNK, 500_000_000) < 100_000_000, "no back-pressure"
                assert pod.resident - before < 10
                client.close()
                user.sendall(OK)
                assert received(first, b"hello").startswith(b"HTTP/1.1 200")
                first.sendall(KEPT)  # behind the upload, whose turn it is: it has nobody any more
                with _asked(listener) as again:
                    again.sendall(OK)
                    assert received(first, b"hello").startswith(b"HTTP/1.1 200")


def test_pipelined_requests_whose_answers_nobody_reads(serving: Pod) -> None:
    """What has been taken is answered in full, once the client reads; the rest was never taken."""
    with serving.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        before = serving.resident
        wanted = 60_000_000
        padded = KEPT.replace(b"\r\n\r\n", b"\r\nX-Pad: " + b"p" * 1000 + b"\r\n\r\n")
        sent = _poured(client, padded * 50, wanted)
        assert sent < wanted, "no back-pressure"
        assert serving.resident - before < 10
        client.shutdown(socket.SHUT_WR)
        client.settimeout(PATIENCE)
        answers = rest(client)
        whole = answers.count(b"HTTP/1.1 200 OK")
        assert 0 < whole <= sent // len(padded) + 1
        assert answers.count(b"hello") <= whole


def test_pipelined_requests_are_all_answered_in_order(serving: Pod) -> None:
    count = 5000
    with serving.connect() as client:
        before = serving.resident
        client.sendall(KEPT * (count - 1) + GET)
        answers = rest(client)
    assert answers.count(b"HTTP/1.1 200 OK") == answers.count(b"hello") == count
    assert serving.resident - before < 10


# --- heads ----------------------------------------------------------------------------------------


def test_heads_of_a_megabyte(serving: Pod) -> None:
    """Just below the limit of a head, on many connections at once; they end in the user container
    or in 431, and nothing of them stays."""
    before = serving.resident
    with contextlib.ExitStack() as undo:
        clients = [undo.enter_context(serving.connect()) for _ in range(30)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: hello\r\nX-Big: " + b"a" * (1 << 20))
        assert serving.ask().endswith(b"hello")
        assert serving.resident - before < 150
    _back(serving, before, 60)


def test_heads_beyond_the_limit_are_refused(serving: Pod) -> None:
    before = serving.resident
    for _ in range(20):
        with serving.connect() as client, contextlib.suppress(ConnectionError):
            client.sendall(b"GET / HTTP/1.1\r\nHost: hello\r\nX-Big: " + b"a" * (5 << 20))
            client.sendall(b"\r\n\r\n")
            assert rest(client)[:12] in (b"HTTP/1.1 431", b"")
    _back(serving, before, 30)


def test_heads_of_very_many_fields(serving: Pod) -> None:
    before = serving.resident
    lines = b"".join(b"X-%d: v\r\n" % number for number in range(70_000))
    for _ in range(5):
        answer = serving.ask(GET[:-2] + lines + b"\r\n")
        assert answer[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 431")
    _back(serving, before, 60)


# --- those who come and go ------------------------------------------------------------------------


def test_clients_that_leave_at_once(serving: Pod) -> None:
    before, open_ = serving.resident, serving.descriptors
    for number in range(3000):
        with serving.connect(DATA) as client:
            client.sendall(KEPT[: number % len(KEPT)])
    until(lambda: serving.descriptors <= open_ + 20, "all are closed", PATIENCE)
    _back(serving, before, 20)


def test_an_idle_pod_costs_no_cpu(serving: Pod) -> None:
    """With connections that are idle: nothing ticks but the autoscaler's second."""
    assert serving.process is not None
    with contextlib.ExitStack() as undo:
        for _ in range(100):
            undo.enter_context(serving.connect())
        assert serving.ask().endswith(b"hello")
        switches = int(serving.status("voluntary_ctxt_switches"))
        begun = time.monotonic()
        until(lambda: time.monotonic() > begun + 2)
        assert int(serving.status("voluntary_ctxt_switches")) - switches < 40
