"""What Prometheus reads of a node: the agent's page, and 9091 of pods that the agent serves."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.borrowed import Agent, Clients, HeldPod, closing
from tests.agent.promtext import Key, Page, read
from tests.hold.rig import HOLD
from tests.pods import DIRECT_PORT, needs_kernel, until
from weir.proxy.agentmetrics import LARGEST_HEAD, MOST_CONNECTIONS
from weir.proxy.served import FRESH_SECONDS

pytestmark = [
    needs_kernel,
    pytest.mark.skipif(not HOLD.exists(), reason="needs hold/weir-hold (make hold)"),
]

DURATION = "weir_request_duration_seconds"


@pytest.fixture
def pod() -> Iterator[HeldPod]:
    with HeldPod() as made:
        yield made


@pytest.fixture
def port() -> int:
    """A free one of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        number: int = found.getsockname()[1]
    return number


def started(folder: Path, port: int, *pods: HeldPod, pins: Path | None = None) -> Agent:
    return Agent(folder, *pods, pins=pins, options=("--metrics", f"127.0.0.1:{port}"))


def node(port: int) -> Page:
    """The agent's page."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return read(answer.read().decode())


def node_once_there(port: int) -> Page:
    pages: list[Page] = []

    def there() -> bool:
        with contextlib.suppress(OSError):
            pages.append(node(port))
        return bool(pages)

    until(there, "the page is served", 30.0)
    return pages[0]


def own(pod: HeldPod) -> Page:
    """The pod's."""
    status, text = pod.get("/metrics", 9091)
    assert status == 200
    return read(text.decode())


def never_down(before: dict[Key, float], after: dict[Key, float]) -> None:
    for key, value in before.items():
        if not key[0].startswith("process_"):  # of the worker, or of the agent
            assert after.get(key, -1.0) >= value, key


def test_every_request_is_on_the_agents_page_by_the_path_that_it_took(
    pod: HeldPod, tmp_path: Path, port: int
) -> None:
    with closing(agent := started(tmp_path, port, pod)):
        agent.until_held().until_open()
        for _ in range(3):
            assert pod.get(port=DIRECT_PORT)[0] == 200
        for _ in range(2):
            assert pod.get()[0] == 200
        until(lambda: node(port).value("weir_requests_total", path="relayed") == 2, "reported")
        found = node(port)
        assert found.value("weir_requests_total", path="direct") == 3
        assert found.value(f"{DURATION}_count", path="direct") == 3
        assert found.value(f"{DURATION}_count", path="relayed") == 2
        assert found.value("weir_relayed_responses_total", code="2xx") == 2
        assert found.value("weir_direct_connections_total", k8s_pod_name=pod.pod.name) == 3
        assert found.value("weir_direct_open") == found.value("weir_pod_ready") == 1
        assert not found.found("weir_direct_ineligible")
        assert found.value("weir_lease_state", state="held") == 1
        assert found.value("weir_kernel_able") == found.value("weir_workers") == 1
        assert agent.stop() == 0


def test_a_request_in_flight_is_seen_on_both_pages_and_its_seconds_add_up(
    pod: HeldPod, tmp_path: Path, port: int
) -> None:
    with closing(agent := started(tmp_path, port, pod)):
        agent.until_held().until_open()
        with socket.create_connection((pod.pod.address, DIRECT_PORT)) as caller:
            begun = time.monotonic()
            caller.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            until(
                lambda: (
                    own(pod).found("weir_direct_requests_in_flight")
                    and own(pod).value("weir_direct_requests_in_flight") == 1
                ),
                "the pod's own page has it",
            )
            assert node(port).value("weir_requests_in_flight", path="direct") == 1
            pod.let_slow_ones_go()
            assert caller.recv(1) == b"H"
            longest = time.monotonic() - begun
            until(lambda: node(port).value(f"{DURATION}_count", path="direct") == 1, "it ended")
            until(lambda: own(pod).value("weir_direct_request_duration_seconds_count") == 1)
        for seconds in (
            node(port).value("weir_request_seconds_total", path="direct"),
            own(pod).value("weir_direct_request_seconds_total"),
        ):
            assert 0 < seconds <= longest


def asked(pod: HeldPod, agent: Agent, requests: int) -> None:
    """Five more by each path, of which both pages know."""
    for _ in range(5):
        assert pod.get()[0] == pod.get(port=DIRECT_PORT)[0] == 200
    until(lambda: agent.relayed() == requests, "reported")

    def told() -> bool:
        page = own(pod)
        names = ("weir_direct_requests_total", "revision_app_request_count")
        return [sum(page.samples[key] for key in page.found(name)) for name in names] == [
            requests
        ] * 2

    until(told, "the pod's page has them")


def test_nothing_goes_down_when_the_worker_is_killed_and_the_pods_page_goes_on_where_it_was(
    pod: HeldPod, tmp_path: Path, port: int
) -> None:
    with closing(agent := started(tmp_path, port, pod)):
        agent.until_held().until_open()
        for number in range(1, 4):
            asked(pod, agent, 5 * number)
            of_pod, of_node = own(pod).counters(), node(port).counters()
            (worker,) = agent.workers
            os.kill(worker, signal.SIGKILL)
            until(lambda: agent.workers not in ([], [worker]), "another worker")  # noqa: B023
            never_down(of_pod, own(pod).counters())
            assert own(pod).value("revision_app_request_count") == 5 * number
            agent.until_open()
            never_down(of_node, node(port).counters())
            until(
                lambda: node(port).value("weir_worker_restarts_total") == number,  # noqa: B023
                "the page tells of the restart",
            )


def test_direct_counters_go_on_in_the_next_agent_though_the_pod_is_idle(
    pod: HeldPod, tmp_path: Path, port: int, root: Path
) -> None:
    with closing(first := started(tmp_path / "0", port, pod, pins=root)):
        first.until_held().until_open()
        with closing(clients := Clients(pod, 2, DIRECT_PORT)):
            clients.more(20)
        assert clients.failures == []
        until(
            lambda: node(port).value(f"{DURATION}_count", path="direct") == clients.answers,
            "all are counted",
        )
        before = node(port)
        first.close()
    with closing(second := started(tmp_path / "1", port, pod, pins=root)):
        second.until_held()
        page = own(pod)
        assert page.value("weir_direct_requests_total") == clients.answers
        assert page.value("weir_direct_request_duration_seconds_count") == clients.answers
        second.until_open()
        after = node_once_there(port)
        direct = {key: v for key, v in before.counters().items() if ("path", "direct") in key[1]}
        never_down(direct, after.counters())
        assert len(direct) > 20
        pod.get(port=DIRECT_PORT)
        until(
            lambda: own(pod).value("weir_direct_requests_total") == clients.answers + 1,
            "counted on",
        )
        assert second.stop() == 0


def test_a_cold_start_is_known_to_the_agent_that_was_there_and_to_no_later_one(
    tmp_path: Path, port: int
) -> None:
    pod = HeldPod()
    with closing(agent := started(tmp_path / "0", port, pod)):
        until(lambda: agent.workers, "the agent is there before the pod", 30.0)
        begun = time.monotonic()
        with pod:
            agent.until_open()
            took = time.monotonic() - begun
            found = node(port)
            (known,) = found.found("weir_cold_start_seconds")
            assert 0 < found.samples[known] <= took
            assert agent.pod()["cold_start"] == pytest.approx(found.samples[known])
            assert found.value("weir_cold_start_duration_seconds_count") == 1
            # whoever is lent a younger hold can't know that there was somebody before
            until(lambda: time.monotonic() - begun > 2 * FRESH_SECONDS, "it is old enough")
            agent.stop()
            with closing(later := started(tmp_path / "1", port, pod)):
                later.until_held().until_open()
                found = node_once_there(port)
                assert not found.found("weir_cold_start_seconds")
                assert found.value("weir_cold_start_duration_seconds_count") == 0


def test_a_pod_that_is_not_direct_is_so_for_one_of_a_few_reasons(tmp_path: Path, port: int) -> None:
    with (
        HeldPod(CONTAINER_CONCURRENCY="3") as limited,
        HeldPod(SERVING_REQUEST_METRICS_BACKEND="opencensus") as left,
        closing(agent := started(tmp_path, port, limited, left)),
    ):
        agent.until_held(0).until_reason("left to the sidecar", 1)
        until(lambda: agent.pod()["ready"], "ready")
        until(
            lambda: node(port).found("weir_direct_ineligible", reason="container_concurrency"),
            "the reason",
        )
        found = node(port)
        name = left.pod.name
        assert found.value("weir_direct_ineligible", reason="not_held", k8s_pod_name=name) == 1
        assert found.value("weir_lease_state", state="left_to_sidecar", k8s_pod_name=name) == 1


# --- the server -----------------------------------------------------------------------------------


@pytest.fixture
def scraped(tmp_path: Path, port: int) -> Iterator[int]:
    """The port of an agent that waits for a pod that never comes."""
    with closing(started(tmp_path, port, HeldPod())):
        node_once_there(port)
        yield port


def said(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(data)
        parts = []
        while part := client.recv(65536):
            parts.append(part)
        return b"".join(parts)


def test_there_is_nothing_but_the_page(scraped: int) -> None:
    close = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert b" 404 " in said(scraped, b"GET /other" + close).splitlines()[0]
    assert b" 405 " in said(scraped, b"POST /metrics" + close).splitlines()[0]
    assert said(scraped, b"HEAD /metrics" + close).endswith(b"\r\n\r\n")
    assert b" 400 " in said(scraped, b"\x16\x03\x01" + close).splitlines()[0]
    long = b"GET /metrics HTTP/1.1\r\nX: " + b"x" * LARGEST_HEAD
    assert b" 431 " in said(scraped, long).splitlines()[0]


def test_connections_that_stay_do_not_keep_others_out(scraped: int) -> None:
    with contextlib.ExitStack() as stack:
        staying = [
            stack.enter_context(socket.create_connection(("127.0.0.1", scraped), timeout=30))
            for _ in range(3 * MOST_CONNECTIONS)
        ]
        staying[-1].sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert staying[-1].recv(12) == b"HTTP/1.1 200"
        assert node(scraped).value("weir_pods") == 1
        with contextlib.suppress(ConnectionResetError):
            assert staying[0].recv(1) == b""


def test_a_port_that_is_taken_costs_nothing_but_the_page_until_it_is_free(
    pod: HeldPod, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        agent = started(tmp_path, port, pod)
        with contextlib.ExitStack() as stack:
            stack.enter_context(closing(agent))
            agent.until_held()
            assert pod.get() == (200, b"hello")
            other.close()
            until(lambda: node_once_there(port).value("weir_pods") == 1, "it is served")


@pytest.mark.parametrize("where", ["", "x", "host:", "127.0.0.1:0", "70000", "-1", "1.5"])
def test_what_is_no_port_is_refused(where: str, tmp_path: Path) -> None:
    agent = Agent(tmp_path, HeldPod(), options=("--metrics", where))
    with closing(agent):
        assert agent.process.wait(60) == 2
        assert "--metrics" in (tmp_path / "log").read_text()
