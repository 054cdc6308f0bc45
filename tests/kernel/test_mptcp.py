"""Listeners that no map can hold (MPTCP: Go's default) are reached through the tc variant."""

from __future__ import annotations

import ctypes
import errno
import http.client
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pods import DIRECT_PORT, Pod, go_command, needs_go, needs_kernel, until
from weir.bpf.libbpf import library
from weir.bpf.loaded import TCX_INGRESS
from weir.proxy.kernel import AttachedPod, Kernel

IPPROTO_MPTCP = 262


def why_no_mptcp() -> str | None:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP).close()
    except OSError as error:
        return f"needs MPTCP in the kernel ({error})"
    return None


pytestmark = [
    needs_kernel,
    pytest.mark.skipif(why_no_mptcp() is not None, reason=str(why_no_mptcp())),
]


@pytest.fixture(scope="module")
def go_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    go = go_command()
    assert go is not None
    built = tmp_path_factory.mktemp("go") / "server"
    done = subprocess.run(
        [go, "build", "-o", built, "."],
        cwd=Path(__file__).parent / "goserver",
        env=os.environ | {"GOTOOLCHAIN": "local", "CGO_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "requires go >=" in done.stderr:
        pytest.skip("needs Go 1.24 or later")
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture
def attached(kernel: Kernel, pod: Pod) -> Iterator[AttachedPod]:
    made = kernel.attach(pod.target())
    try:
        made.open_direct()
        yield made
    finally:
        made.detach()


def get(pod: Pod, family: int = socket.AF_INET, requests: int = 1) -> str:
    address = pod.address if family == socket.AF_INET else pod.address6
    connection = http.client.HTTPConnection(address, DIRECT_PORT, timeout=10)
    try:
        for _ in range(requests):
            connection.request("GET", "/")
            body = connection.getresponse().read().decode()
    finally:
        connection.close()
    return body


def refused(pod: Pod, family: int = socket.AF_INET) -> bool:
    try:
        get(pod, family)
    except ConnectionRefusedError:
        return True
    return False


@needs_go
@pytest.mark.parametrize("bind", [":8080", "127.0.0.1:8080", "0.0.0.0:8080"])
def test_a_go_server_as_it_comes_is_reached_and_counted(
    pod: Pod, attached: AttachedPod, go_server: Path, bind: str
) -> None:
    pod.run([go_server, bind])
    until(pod.listening)
    assert attached.steering() == "tc"
    assert get(pod, requests=3).startswith("127.0.0.1:")
    until(lambda: attached.counters().open_connections == 0)
    counters = attached.counters()
    assert (counters.started, counters.finished, counters.connections) == (3, 3, 1)
    assert (counters.listeners, counters.mptcp_refused, counters.steered) == (0, 1, 1)


@needs_go
def test_a_go_server_is_reached_over_ipv6(pod: Pod, attached: AttachedPod, go_server: Path) -> None:
    pod.run([go_server, ":8080"])
    until(pod.listening)
    assert attached.steering() == "tc"
    assert "127.0.0.1" in get(pod, socket.AF_INET6)
    assert attached.counters().finished == 1


def test_an_ipv4_mptcp_listener_refuses_an_ipv6_caller(pod: Pod, attached: AttachedPod) -> None:
    pod.backend().listen("0.0.0.0", protocol=IPPROTO_MPTCP)
    assert attached.steering() == "tc"
    assert refused(pod, socket.AF_INET6)


def test_the_tc_variant_is_attached_only_while_an_mptcp_listener_needs_it(
    pod: Pod, attached: AttachedPod
) -> None:
    assert attached.steering() == "none"
    assert tc_programs(pod) == 0
    plain = pod.backend()
    plain.listen()
    assert attached.steering() == "sk_lookup"
    assert tc_programs(pod) == 0
    plain.stop()
    app = pod.backend()
    app.listen(protocol=IPPROTO_MPTCP)
    assert attached.steering() == "tc"
    assert attached.steering() == "tc"
    assert tc_programs(pod) == 1
    app.stop()
    assert attached.steering() == "none"
    pod.backend().listen()
    assert attached.steering() == "sk_lookup"
    assert tc_programs(pod) == 0


def test_an_mptcp_listener_from_before_the_attachment_is_found(kernel: Kernel, pod: Pod) -> None:
    pod.backend().listen(protocol=IPPROTO_MPTCP)
    attached = kernel.attach(pod.target())
    assert attached.adopt_listeners() == 0
    assert attached.steering() == "tc"
    attached.detach()
    assert tc_programs(pod) == 0


def test_the_tc_variant_obeys_the_switch_and_the_death_of_the_app(
    pod: Pod, attached: AttachedPod
) -> None:
    app = pod.backend()
    listener = app.listen(protocol=IPPROTO_MPTCP)
    assert attached.steering() == "tc"
    address = (pod.address, DIRECT_PORT)
    with socket.create_connection(address, 10):
        listener.accept()
    attached.close_direct()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 10)
    attached.open_direct()
    app.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 10)


def test_a_kernel_without_tcx_gets_the_tc_variant_by_clsact(
    kernel: Kernel, pod: Pod, attached: AttachedPod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library(), "bpf_link_create", lambda *_: -errno.EINVAL)
    app = pod.backend()
    listener = app.listen(protocol=IPPROTO_MPTCP)
    assert attached.steering() == "tc"
    assert tc_programs(pod) == 1
    with socket.create_connection((pod.address, DIRECT_PORT), 10):
        listener.accept()
    attached.detach()
    assert tc_programs(pod) == 0
    assert "clsact" not in qdiscs(pod)


@needs_go
def test_a_go_app_that_replaces_a_python_app_is_reached(
    pod: Pod, attached: AttachedPod, go_server: Path
) -> None:
    python = pod.backend()
    python.listen()
    assert attached.steering() == "sk_lookup"
    python.stop()
    go = pod.run([go_server, ":8080"])
    until(pod.listening)
    assert refused(pod), "until someone asks what reaches the listener"
    assert attached.steering() == "tc"
    get(pod)
    go.kill()
    go.wait()
    assert refused(pod)
    assert attached.steering() == "none"


@needs_go
def test_a_go_server_without_mptcp_is_reached_by_sk_lookup(
    pod: Pod, attached: AttachedPod, go_server: Path
) -> None:
    pod.run([go_server, ":8080"], env=os.environ | {"GODEBUG": "multipathtcp=0"})
    until(pod.listening)
    assert attached.steering() == "sk_lookup"
    get(pod)
    assert attached.counters().finished == 1


def tc_programs(pod: Pod) -> int:
    """How many programs the pod's interface has at tc ingress, by TCX and by clsact."""

    def query_tcx() -> int:
        count = ctypes.c_uint32(16)
        ids = (ctypes.c_uint32 * 16)()
        index = socket.if_nametoindex(pod.interface)
        library().bpf_prog_query(index, TCX_INGRESS, 0, None, ids, ctypes.byref(count))
        return sum(1 for each in ids if each)

    classic = subprocess.run(
        ["tc", "-n", pod.name, "filter", "show", "dev", pod.interface, "ingress"],
        capture_output=True,
        text=True,
        check=False,
    )
    return pod.call(query_tcx) + classic.stdout.count("direct-action")


def qdiscs(pod: Pod) -> str:
    command = ["tc", "-n", pod.name, "qdisc", "show", "dev", pod.interface]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_an_ipv4_mptcp_listener_is_no_use_to_a_pod_with_ipv6_only(kernel: Kernel) -> None:
    with Pod(ipv4=False) as pod:
        attached = kernel.attach(pod.target())
        attached.open_direct()
        backend = pod.backend()
        listener = backend.listen("0.0.0.0", protocol=IPPROTO_MPTCP)
        assert attached.steering() == "none"
        listener.close()
        backend.listen("::", protocol=IPPROTO_MPTCP)
        assert attached.steering() == "tc"
        attached.detach()
