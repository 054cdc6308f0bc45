"""The node agent on real pods: when it steers, when it relays, and what it survives."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pods import DIRECT_PORT, USER_PORT, Pod, needs_kernel, until
from weir.proxy.wire.status import read_status

pytestmark = needs_kernel
DATA_PORT = 8012
APP = """
import http.server, sys, threading
go = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), go.set()), daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path == "/slow":
            go.wait()
        body = self.client_address[0].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer.request_queue_size = 512
http.server.ThreadingHTTPServer(("127.0.0.1", %d), Handler).serve_forever()
"""


class Agent:
    """A `weir agent` process for some pods, and what its status says."""

    def __init__(
        self, tmp_path: Path, *pods: dict[str, Any], workers: int = 1, pins: Path | None = None
    ) -> None:
        self._status = tmp_path / "agent.sock"
        (tmp_path / "pods.json").write_text(json.dumps({"pods": pods}))
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "weir", "agent"),
                *("--pods", str(tmp_path / "pods.json"), "--status", str(self._status)),
                *("--workers", str(workers), "--pins", str(pins or tmp_path / "no-bpffs")),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: self._workers() == workers or self.process.poll() is not None)

    def pod(self, number: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = read_status(self._status)["pods"][number]
        return found

    def workers(self) -> list[int]:
        pids: list[int] = read_status(self._status)["workers"]
        return pids

    def until_offered(self, number: int = 0) -> None:
        until(lambda: self.pod(number)["direct"]["open"], "the direct port opens")

    def until_reason(self, word: str, number: int = 0) -> None:
        until(lambda: word in self.pod(number)["direct"]["reason"], f"the reason names {word}")

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr

    def _workers(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return len(self.workers())
        return 0


def described(pod: Pod, **more: Any) -> dict[str, Any]:
    return {
        "name": pod.name,
        "userPort": USER_PORT,
        "netns": str(pod.netns),
        "cgroup": str(pod.cgroup),
        "addresses": list(pod.addresses),
        **more,
    }


def start_app(pod: Pod) -> "subprocess.Popen[str]":
    process = pod.run(
        [sys.executable, "-c", APP % USER_PORT], stdin=subprocess.PIPE, text=True, bufsize=1
    )
    until(pod.listening, "the app listens")
    return process


@contextlib.contextmanager
def agent_for(tmp_path: Path, *pods: dict[str, Any], workers: int = 1) -> Iterator[Agent]:
    agent = Agent(tmp_path, *pods, workers=workers)
    try:
        yield agent
    finally:
        if agent.process.poll() is None:
            agent.stop()
        if agent.process.stderr is not None:
            agent.process.stderr.close()


def get(address: str, port: int, path: str = "/", **headers: str) -> tuple[int, str, str | None]:
    """Status, body and Weir-Direct of one request on a connection of its own."""
    connection = http.client.HTTPConnection(address, port, timeout=30)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode(), response.getheader("Weir-Direct")
    finally:
        connection.close()


def ask(pod: Pod) -> tuple[int, str, str | None]:
    """What a Weir client asks before it uses the direct port."""
    return get(
        pod.address,
        DATA_PORT,
        **{"User-Agent": "Knative-Activator-Probe (weir)", "K-Network-Probe": "weir"},
    )


def test_a_pod_is_offered_as_soon_as_its_app_is_ready_and_both_paths_are_counted_apart(
    tmp_path: Path,
) -> None:
    with Pod() as pod, agent_for(tmp_path, described(pod)) as agent:
        assert ask(pod) == (200, "weir", None)
        with pytest.raises(ConnectionRefusedError):
            get(pod.address, DIRECT_PORT)
        start_app(pod)
        agent.until_offered()
        until(lambda: ask(pod)[2] is not None, "the worker knows of the offer")
        assert ask(pod) == (200, "weir", f"port={DIRECT_PORT}; timeout=300; start=0; idle=0")
        for _ in range(3):
            assert get(pod.address, DIRECT_PORT)[:2] == (200, "127.0.0.1")
        for _ in range(2):
            assert get(pod.address, DATA_PORT)[:2] == (200, "127.0.0.1")
        until(lambda: agent.pod()["relayed"]["requests"] == 2, "relayed requests are reported")
        assert agent.pod()["direct"]["started"] == agent.pod()["direct"]["finished"] == 3
        assert agent.stop()[0] == 0


def test_a_pod_with_container_concurrency_is_relayed_and_the_status_says_why(
    tmp_path: Path,
) -> None:
    with Pod() as pod, agent_for(tmp_path, described(pod, containerConcurrency=1)) as agent:
        start_app(pod)
        until(lambda: agent.pod()["ready"], "ready")
        assert "containerConcurrency is 1" in agent.pod()["direct"]["reason"]
        assert get(pod.address, DATA_PORT)[0] == 200
        with pytest.raises(ConnectionRefusedError):
            get(pod.address, DIRECT_PORT)


def test_a_dead_app_refuses_direct_connections_at_once_and_a_restarted_one_is_steered_again(
    tmp_path: Path,
) -> None:
    with Pod() as pod, agent_for(tmp_path, described(pod)) as agent:
        app = start_app(pod)
        agent.until_offered()
        app.kill()
        app.wait()
        with pytest.raises(ConnectionRefusedError):
            get(pod.address, DIRECT_PORT)
        assert get(pod.address, DATA_PORT)[0] == 502
        agent.until_reason("no listener")
        start_app(pod)
        agent.until_offered()
        assert get(pod.address, DIRECT_PORT)[0] == 200


def test_an_app_that_was_there_before_the_agent_is_steered_to(tmp_path: Path) -> None:
    with Pod() as pod:
        start_app(pod)
        with agent_for(tmp_path, described(pod)) as agent:
            agent.until_offered()
            assert get(pod.address, DIRECT_PORT)[0] == 200


def test_a_killed_worker_costs_no_direct_request_and_relayed_ones_wait_for_the_next(
    tmp_path: Path,
) -> None:
    with Pod() as pod, agent_for(tmp_path, described(pod)) as agent:
        start_app(pod)
        agent.until_offered()
        assert get(pod.address, DATA_PORT)[0] == 200
        until(lambda: agent.pod()["relayed"]["requests"] == 1, "reported")
        direct = http.client.HTTPConnection(pod.address, DIRECT_PORT, timeout=30)
        (worker,) = agent.workers()
        os.kill(worker, signal.SIGSTOP)  # so that the next connection waits in the backlog
        waiting: list[int] = []
        caller = threading.Thread(target=lambda: waiting.append(get(pod.address, DATA_PORT)[0]))
        caller.start()
        os.kill(worker, signal.SIGKILL)
        while not waiting:
            direct.request("GET", "/")
            assert direct.getresponse().read() == b"127.0.0.1"
        caller.join()
        direct.close()
        assert waiting == [200]
        assert agent.workers() != [worker]
        until(lambda: agent.pod()["relayed"]["requests"] == 2, "the sums of both workers")
        assert agent.pod()["worker_restarts"] == 1
        agent.until_offered()


def test_sigterm_lets_requests_in_flight_end_on_both_paths_and_takes_no_new_ones(
    tmp_path: Path,
) -> None:
    with Pod() as pod, agent_for(tmp_path, described(pod)) as agent:
        app = start_app(pod)
        agent.until_offered()
        answers: list[int] = []
        callers = [
            threading.Thread(target=lambda p=port: answers.append(get(pod.address, p, "/slow")[0]))
            for port in (DIRECT_PORT, DATA_PORT)
        ]
        for caller in callers:
            caller.start()
        until(
            lambda: (
                agent.pod()["direct"]["in_flight"] == 1
                and agent.pod()["relayed"].get("in_flight") == 1
            ),
            "both are in flight",
        )
        agent.process.send_signal(signal.SIGTERM)
        agent.until_reason("draining")
        with pytest.raises(ConnectionRefusedError):
            get(pod.address, DIRECT_PORT)
        assert answers == []
        assert app.stdin is not None
        app.stdin.write("\n")
        app.stdin.flush()
        for caller in callers:
            caller.join()
        assert answers == [200, 200]
        assert agent.process.wait(60) == 0
        with socket.socket() as probe:
            assert probe.connect_ex((pod.address, DATA_PORT)) != 0, "the data port is closed"


def test_a_worker_holds_no_rights_at_all(tmp_path: Path) -> None:
    with Pod() as pod, agent_for(tmp_path, described(pod)) as agent:
        (worker,) = agent.workers()
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{worker}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert "0" not in status["Uid"].split()
        assert "0" not in status["Gid"].split()
        assert status["Groups"].strip() == ""
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[name], 16) == 0
        assert status["NoNewPrivs"] == "1"


def test_pods_are_spread_over_workers_and_one_workers_death_is_not_the_others(
    tmp_path: Path,
) -> None:
    with (
        Pod() as one,
        Pod() as two,
        agent_for(tmp_path, described(one), described(two), workers=2) as agent,
    ):
        start_app(one)
        start_app(two)
        agent.until_offered(0)
        agent.until_offered(1)
        kept = http.client.HTTPConnection(two.address, DATA_PORT, timeout=30)
        kept.request("GET", "/")
        assert kept.getresponse().read() == b"127.0.0.1"
        os.kill(agent.workers()[0], signal.SIGKILL)
        assert get(one.address, DATA_PORT)[0] == 200
        kept.request("GET", "/")
        assert kept.getresponse().read() == b"127.0.0.1"
        kept.close()


def test_a_killed_supervisor_takes_its_workers_with_it(tmp_path: Path) -> None:
    with Pod() as pod, agent_for(tmp_path, described(pod)) as agent:
        (worker,) = agent.workers()
        agent.process.kill()
        agent.process.wait()
        until(lambda: not Path(f"/proc/{worker}").exists(), "the worker ends")


def test_a_data_port_that_is_taken_is_named_with_its_pod(tmp_path: Path) -> None:
    with Pod() as pod:
        backend = pod.backend()
        backend.listen("0.0.0.0", DATA_PORT)
        agent = Agent(tmp_path, described(pod))
        _, stderr = agent.process.communicate(timeout=60)
        assert agent.process.returncode == 2
        assert pod.name in stderr
        assert str(DATA_PORT) in stderr


def test_a_pod_that_is_not_there_is_named(tmp_path: Path) -> None:
    pod = {"name": "gone", "userPort": 1, "netns": "/run/netns/none", "cgroup": "/none"}
    agent = Agent(tmp_path, pod)
    _, stderr = agent.process.communicate(timeout=60)
    assert agent.process.returncode == 2
    assert "gone" in stderr
    assert "/run/netns/none" in stderr
