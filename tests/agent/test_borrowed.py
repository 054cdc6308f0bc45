"""A pod with hold and the real agent: who accepts changes under load, and no connection notices."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.borrowed import (
    DATA_PORT,
    Agent,
    Clients,
    HeldPod,
    closing,
    listeners_in,
    refuses,
    stop_process,
    worker_of,
)
from tests.contract.reports import decode_stat
from tests.hold.rig import HOLD
from tests.pods import DIRECT_PORT, needs_kernel, until
from tests.relay.certificates import make_pair

pytestmark = [
    needs_kernel,
    pytest.mark.skipif(not HOLD.exists(), reason="needs hold/weir-hold (make hold)"),
]


@pytest.fixture
def pod() -> Iterator[HeldPod]:
    with HeldPod() as made:
        yield made


def descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def stat_of(pod: HeldPod, name: str) -> float:
    return decode_stat(pod.get("/metrics", 9090)[1])[name]


def test_the_agent_serves_every_port_of_a_queue_proxy_and_opens_the_direct_one(
    pod: HeldPod, tmp_path: Path
) -> None:
    with closing(agent := Agent(tmp_path, pod)):
        agent.until_held().until_open()
        assert pod.get() == (200, b"hello")
        assert pod.get(port=DIRECT_PORT) == (200, b"hello")
        probe = {"User-Agent": "kube-probe/1.30", "K-Network-Probe": "queue"}
        assert pod.get(headers=probe) == (200, b"queue")
        status, stat = pod.get("/metrics", 9090)
        assert status == 200
        assert decode_stat(stat).pod_name == pod.pod.name
        assert b"revision_request_count" in pod.get("/metrics", 9091)[1]
        assert pod.get("/", 8022)[0] == 404
        assert not pod.by_sidecar


def test_what_came_directly_counts_for_the_autoscaler(pod: HeldPod, tmp_path: Path) -> None:
    with closing(agent := Agent(tmp_path, pod)):
        agent.until_held().until_open()
        caller = threading.Thread(target=pod.get, args=("/slow", DIRECT_PORT))
        caller.start()
        until(
            lambda: stat_of(pod, "average_concurrent_requests") > 0.9,
            "the request that is in flight is in the average",
        )
        pod.let_slow_ones_go()
        caller.join()
        with closing(Clients(pod, 2, DIRECT_PORT)):
            until(lambda: stat_of(pod, "request_count") > 10, "they are counted")


def test_without_an_agent_the_sidecar_serves_after_the_grace(pod: HeldPod) -> None:
    with closing(clients := Clients(pod)):
        clients.more()
        until(lambda: pod.by_sidecar, "the sidecar")
    assert not clients.failures


def test_an_agent_that_comes_later_takes_over_from_the_sidecar_without_a_failed_request(
    pod: HeldPod, tmp_path: Path
) -> None:
    until(lambda: pod.by_sidecar, "the sidecar")
    with closing(clients := Clients(pod)):
        clients.more()
        with closing(agent := Agent(tmp_path, pod)):
            agent.until_held()
            clients.more()
            clients.stop()
    assert not clients.failures


def test_a_new_agent_takes_over_from_the_old_one_without_a_failed_request(
    pod: HeldPod, tmp_path: Path
) -> None:
    with closing(old := Agent(tmp_path / "old", pod), clients := Clients(pod)):
        old.until_held()
        clients.more()
        with closing(new := Agent(tmp_path / "new", pod)):
            new.until_reason("rung")
            clients.more()
            assert old.pod()["lease"] == "held"
            assert old.stop() == 0
            new.until_held()
            clients.more()
            clients.stop()
            until(lambda: new.relayed() > 0, "the new one has served")
    assert not clients.failures
    assert not pod.by_sidecar


def test_a_kept_connection_is_told_to_go_by_the_answer_to_its_next_request(
    pod: HeldPod, tmp_path: Path
) -> None:
    with closing(agent := Agent(tmp_path, pod)):
        agent.until_held()
        connection = http.client.HTTPConnection(pod.pod.address, DATA_PORT, timeout=30)
        connection.request("GET", "/")
        first = connection.getresponse()
        assert (first.read(), first.getheader("Connection")) == (b"hello", None)
        agent.process.send_signal(signal.SIGTERM)
        until(lambda: pod.by_sidecar, "the pod is given back")
        connection.request("GET", "/")
        last = connection.getresponse()
        assert (last.read(), last.getheader("Connection")) == (b"hello", "close")
        assert agent.process.wait(30) == 0
        connection.close()


def test_a_request_in_flight_ends_with_the_old_agent_while_the_next_one_serves(
    pod: HeldPod, tmp_path: Path
) -> None:
    answers: list[tuple[int, bytes]] = []
    with closing(old := Agent(tmp_path / "old", pod)):
        old.until_held()
        slow = threading.Thread(target=lambda: answers.append(pod.get("/slow")))
        slow.start()
        until(lambda: old.pod()["relayed"].get("in_flight") == 1, "in flight")
        with closing(new := Agent(tmp_path / "new", pod)):
            new.until_reason("rung")
            old.process.send_signal(signal.SIGTERM)
            new.until_held()
            assert pod.get() == (200, b"hello")
            assert not answers
            pod.let_slow_ones_go()
            slow.join()
            assert answers == [(200, b"hello")]
            assert old.process.wait(30) == 0


def test_a_stopped_agent_is_fenced_and_accepts_nothing_beside_the_sidecar(
    pod: HeldPod, tmp_path: Path
) -> None:
    with closing(agent := Agent(tmp_path, pod)):
        agent.until_held()
        (worker,) = until(lambda: agent.workers, "the worker")
        until(lambda: agent.pod()["ready"], "ready")
        assert pod.get()[0] == 200
        until(lambda: agent.relayed() == 1, "counted")
        stop_process(agent.process.pid)  # not its worker, which goes on accepting for a while
        with closing(clients := Clients(pod, count=1)):
            until(lambda: pod.by_sidecar, "the sidecar has taken over", 30.0)
            clients.more()
            until(lambda: not listeners_in(pod, worker), "the worker's copies are dead")
            answered = clients.answers
            agent.process.send_signal(signal.SIGCONT)
            agent.until_held()  # it rings again, and the sidecar gives the pod back
            clients.more()
            assert clients.answers > answered
        assert not clients.failures


def test_an_agent_stopped_with_its_worker_wakes_up_to_dead_sockets(
    pod: HeldPod, tmp_path: Path
) -> None:
    with closing(agent := Agent(tmp_path, pod)):
        agent.until_held()
        (worker,) = until(lambda: agent.workers, "the worker")
        stop_process(agent.process.pid)
        stop_process(worker)
        with closing(clients := Clients(pod, count=1)):  # what comes now waits, and is not lost
            until(lambda: pod.by_sidecar, "the sidecar has taken over", 30.0)
            clients.more()
            os.kill(worker, signal.SIGCONT)
            until(lambda: not listeners_in(pod, worker), "the worker has found out")
            clients.more()
            assert pod.by_sidecar
            agent.process.send_signal(signal.SIGCONT)
            agent.until_held()
            clients.more()
        assert not clients.failures


def test_a_worker_that_no_longer_answers_is_killed_and_its_pods_move(
    pod: HeldPod, tmp_path: Path
) -> None:
    with closing(agent := Agent(tmp_path, pod, workers=2)):
        agent.until_held()
        until(lambda: len(agent.workers) == 2, "both workers")
        serving = worker_of(pod, agent)
        stop_process(serving)
        assert pod.get() == (200, b"hello")  # it waits until another one accepts
        assert serving not in agent.workers
        assert agent.pod()["worker_restarts"] == 1
        assert agent.pod()["lease"] == "held"


def test_a_killed_worker_loses_what_was_in_it_and_nothing_else(
    pod: HeldPod, tmp_path: Path
) -> None:
    with closing(agent := Agent(tmp_path, pod, workers=2)):
        agent.until_held()
        until(lambda: len(agent.workers) == 2, "both workers")
        serving = worker_of(pod, agent)
        with closing(clients := Clients(pod)):
            clients.more()
            os.kill(serving, signal.SIGKILL)
            clients.more(200)
        assert len(clients.failures) <= 4  # one for each client
        assert not [failure for failure in clients.failures if failure.startswith("refused")]
        assert agent.pod()["lease"] == "held"


def test_a_pod_that_is_told_to_end_drains_with_its_agent_and_hold_exits(
    tmp_path: Path,
) -> None:
    with HeldPod(REVISION_TIMEOUT_SECONDS="60") as pod, closing(agent := Agent(tmp_path, pod)):
        agent.until_held().until_open()
        pod.hold.send_signal(signal.SIGTERM)
        until(lambda: agent.pod()["draining"], "the agent was told")
        until(lambda: refuses(pod, DIRECT_PORT), "the direct port is closed")
        probe = {"User-Agent": "kube-probe/1.30", "K-Network-Probe": "queue"}
        assert pod.get(headers=probe) == (503, b"shutting down\n")
        assert pod.get() == (200, b"hello")  # gateways may not know yet
        assert pod.get("/wait-for-drain", 8022)[0] == 200
        assert pod.hold.wait(90) == 0
        agent.until_reason("no weir-hold found")
        assert refuses(pod, DATA_PORT)


def test_a_pod_whose_hold_was_killed_is_let_go_and_borrowed_again(
    pod: HeldPod, tmp_path: Path
) -> None:
    with closing(agent := Agent(tmp_path, pod)):
        agent.until_held()
        pod.hold.kill()
        pod.hold.wait()
        agent.until_reason("no weir-hold found")
        until(lambda: refuses(pod, DATA_PORT), "no copy is left")
        pod.start_hold()
        agent.until_held()
        assert pod.get() == (200, b"hello")


def test_a_pod_that_is_borrowed_again_and_again_leaves_nothing_behind(
    pod: HeldPod, tmp_path: Path
) -> None:
    with closing(agent := Agent(tmp_path, pod)):
        agent.until_held().until_open()
        processes = [agent.process.pid, worker_of(pod, agent)]
        before = [descriptors(pid) for pid in processes]
        for _ in range(10):
            pod.hold.kill()
            pod.hold.wait()
            agent.until_reason("no weir-hold found")
            pod.start_hold()
            agent.until_held().until_open()
            assert pod.get() == (200, b"hello")
        for pid, most in zip(processes, before, strict=True):
            # a worker has spare sockets for dialling, more or less of them
            until(lambda pid=pid, most=most: descriptors(pid) <= most + 32, f"{pid} has closed")  # type: ignore[misc]
        assert descriptors(agent.process.pid) <= before[0] + 1


def test_metrics_on_a_port_that_hold_knows_nothing_of_and_a_limit_that_needs_the_relay(
    tmp_path: Path,
) -> None:
    config = '{"requestMetrics":{"protocol":"prometheus","endpoint":":9095"}}'
    with (
        HeldPod(OBSERVABILITY_CONFIG=config, CONTAINER_CONCURRENCY="1") as pod,
        closing(agent := Agent(tmp_path, pod)),
    ):
        agent.until_held()
        until(lambda: agent.pod()["ready"], "ready")
        assert pod.get() == (200, b"hello")
        assert b"kn_serving_invocation_duration" in pod.get("/metrics", 9095)[1]
        assert "containerConcurrency is 1" in agent.pod()["direct"]["reason"]
        assert agent.stop() == 0
        assert pod.get() == (200, b"hello")
        until(lambda: pod.get("/metrics", 9095)[0] == 200, "the sidecar has opened it, too")


WITH_CERTIFICATE = """
mount -t tmpfs none /var/lib && mkdir -p /var/lib/knative/certs/..data && cd /var/lib/knative/certs
cp "$0"/* ..data && ln -s ..data/tls.crt ..data/tls.key . && cd / && exec "$@"
"""


def shown(pod: HeldPod) -> str:
    """The certificate of the TLS port."""
    return ssl.get_server_certificate((pod.pod.address, 8112), timeout=30)


def test_the_tls_port_shows_the_containers_certificate_and_the_pod_is_relayed_only(
    tmp_path: Path,
) -> None:
    first, second = make_pair(tmp_path / "first"), make_pair(tmp_path / "second")
    command = ("unshare", "--mount", "/bin/sh", "-c", WITH_CERTIFICATE, str(first.folder))
    with HeldPod(*command) as pod, closing(agent := Agent(tmp_path / "agent", pod)):
        until(lambda: agent.workers, "the worker")
        pod.start_hold()
        agent.until_held()
        assert shown(pod) == first.certificate.read_text()
        unverified = ssl.create_default_context()
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        client = http.client.HTTPSConnection(pod.pod.address, 8112, context=unverified)
        client.request("GET", "/")
        assert client.getresponse().read() == b"hello"
        client.close()
        until(lambda: agent.pod()["ready"], "ready")
        assert "TLS" in agent.pod()["direct"]["reason"]
        data = Path(f"/proc/{pod.hold.pid}/root/var/lib/knative/certs/..data")
        for file in (second.certificate, second.key):
            (data / file.name).write_bytes(file.read_bytes())
        until(lambda: shown(pod) == second.certificate.read_text(), "the new one is shown", 90.0)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (
            {"SERVING_ENABLE_REQUEST_LOG": "true", "SERVING_REQUEST_LOG_TEMPLATE": "x"},
            "request log",
        ),
        ({"TRACING_CONFIG_BACKEND": "zipkin"}, "traces"),
        ({"ENABLE_PROFILING": "true"}, "profiling"),
        ({"METRICS_PROMETHEUS_TLS_CERT": "/x"}, "metrics are asked for with TLS"),
    ],
)
def test_what_a_worker_can_not_do_for_a_pod_is_left_to_its_sidecar_with_the_reason(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    with HeldPod(**environment) as pod, closing(agent := Agent(tmp_path, pod)):
        agent.until_reason(reason)
        assert not agent.pod()["direct"]["open"]
        if "SERVING_ENABLE_REQUEST_LOG" in environment:
            assert pod.get() == (200, b"hello")
            assert pod.by_sidecar
