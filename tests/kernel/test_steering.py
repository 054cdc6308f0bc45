"""A connection to the direct port reaches whatever the app listens with on its user port."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.kernel.direct import GET, OK, Exchange
from tests.pods import DIRECT_PORT, USER_PORT, Backend, Pod, RemoteSocket, needs_kernel, until
from weir.proxy.kernel import AttachedPod, Kernel

pytestmark = needs_kernel


@pytest.fixture
def attached(kernel: Kernel, pod: Pod) -> Iterator[AttachedPod]:
    made = kernel.attach(pod.target())
    try:
        made.open_direct()
        yield made
    finally:
        made.detach()


@pytest.fixture
def backend(pod: Pod) -> Backend:
    return pod.backend()


def dial(pod: Pod, family: int = socket.AF_INET, port: int = DIRECT_PORT) -> socket.socket:
    address = pod.address if family == socket.AF_INET else pod.address6
    return socket.create_connection((address, port), timeout=10)


def talk(pod: Pod, listener: RemoteSocket, family: int = socket.AF_INET) -> Exchange:
    """One request over the direct port, which the app answers."""
    exchange = Exchange(dial(pod, family), listener.accept())
    exchange.ask(GET)
    exchange.answer(OK)
    return exchange


def refused(pod: Pod, family: int = socket.AF_INET) -> bool:
    try:
        dial(pod, family).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize(
    ("host", "family"),
    [
        ("0.0.0.0", socket.AF_INET),
        ("127.0.0.1", socket.AF_INET),
        ("::", socket.AF_INET),
        ("::", socket.AF_INET6),
        ("::1", socket.AF_INET6),
    ],
    ids=["any IPv4", "loopback IPv4", "dual stack over IPv4", "dual stack over IPv6", "::1"],
)
def test_listeners_are_reached_wherever_they_are_bound(
    pod: Pod, attached: AttachedPod, backend: Backend, host: str, family: int
) -> None:
    assert attached.steering() == "none"
    listener = backend.listen(host)
    assert attached.steering() == "sk_lookup"
    talk(pod, listener, family)
    counters = attached.counters()
    assert (counters.steered, counters.missed, counters.listeners) == (1, 0, 1)
    assert (counters.started, counters.finished) == (1, 1)


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_an_ipv4_listener_refuses_an_ipv6_caller(
    pod: Pod, attached: AttachedPod, backend: Backend, host: str
) -> None:
    listener = backend.listen(host)
    assert refused(pod, socket.AF_INET6)
    assert attached.counters().missed == 1
    talk(pod, listener)


def test_an_ipv6_only_listener_refuses_an_ipv4_caller(
    pod: Pod, attached: AttachedPod, backend: Backend
) -> None:
    listener = backend.listen("::", v6only=1)
    assert refused(pod)
    talk(pod, listener, socket.AF_INET6)


def test_only_the_user_port_is_steered_to(
    pod: Pod, attached: AttachedPod, backend: Backend
) -> None:
    backend.listen("0.0.0.0", USER_PORT + 1)
    assert attached.steering() == "none"
    assert refused(pod)


def test_nothing_is_steered_before_the_pod_is_opened(kernel: Kernel, pod: Pod) -> None:
    attached = kernel.attach(pod.target())
    listener = pod.backend().listen()
    assert refused(pod)
    attached.open_direct()
    talk(pod, listener)
    attached.detach()


def test_a_closed_pod_refuses_new_connections_and_keeps_counting_those_it_has(
    pod: Pod, attached: AttachedPod, backend: Backend
) -> None:
    exchange = talk(pod, backend.listen())
    attached.close_direct()
    attached.close_direct()
    assert refused(pod)
    exchange.ask(GET)
    assert attached.counters().in_flight == 1
    exchange.answer(OK)
    assert attached.counters().finished == 2
    attached.open_direct()
    assert not refused(pod)


def test_the_user_port_itself_is_left_alone(
    pod: Pod, attached: AttachedPod, backend: Backend
) -> None:
    listener = backend.listen()
    attached.close_direct()
    exchange = Exchange(dial(pod, port=USER_PORT), listener.accept())
    assert exchange.server.peer[0] != "127.0.0.1"
    exchange.ask(GET)
    exchange.answer(OK)
    assert attached.counters().connections == 0


def test_the_app_sees_its_direct_peers_as_local(
    pod: Pod, attached: AttachedPod, backend: Backend
) -> None:
    exchange = talk(pod, backend.listen())
    assert exchange.server.peer[0] == "127.0.0.1"
    assert exchange.server.getpeername() == ("127.0.0.1", exchange.client.getsockname()[1])


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_dual_stack_app_sees_its_direct_peers_as_local(
    pod: Pod, attached: AttachedPod, backend: Backend, family: int
) -> None:
    exchange = talk(pod, backend.listen("::"), family)
    assert exchange.server.getpeername()[0] == "::ffff:127.0.0.1"


def test_a_dead_app_refuses_at_once_and_its_successor_is_reached_at_once(
    pod: Pod, attached: AttachedPod
) -> None:
    for generation in range(1, 4):
        app = pod.backend()
        talk(pod, app.listen())
        assert attached.steering() == "sk_lookup"
        app.stop()
        assert attached.steering() == "none"
        assert refused(pod)
        assert attached.counters().finished == generation


def test_an_app_that_dies_within_a_request_aborts_it(pod: Pod, attached: AttachedPod) -> None:
    app = pod.backend()
    exchange = talk(pod, app.listen())
    exchange.ask(GET)
    app.stop()
    until(lambda: attached.counters().open_connections == 0)
    counters = attached.counters()
    assert (counters.in_flight, counters.finished, counters.aborted) == (0, 1, 1)


def test_every_member_of_a_reuseport_group_gets_connections(
    pod: Pod, attached: AttachedPod, backend: Backend
) -> None:
    group = [backend.listen(reuse_port=True) for _ in range(3)]
    assert attached.counters().listeners == 3
    clients = [dial(pod) for _ in range(60)]
    assert all(listener.readable(5) for listener in group)
    for client in clients:
        client.close()


def test_a_reuseport_group_outlives_its_members(
    pod: Pod, attached: AttachedPod, backend: Backend
) -> None:
    group = [backend.listen(reuse_port=True) for _ in range(10)]  # more than there are slots
    while group:
        client = dial(pod)
        assert any(listener.readable(0.2) for listener in group)
        client.close()
        group.pop(0).close()
        if len(group) == 2:  # those that found no slot
            attached.adopt_listeners()
    assert refused(pod)
    assert attached.steering() == "none"


def test_a_listener_from_before_the_attachment_is_adopted_and_not_kept(
    kernel: Kernel, pod: Pod, backend: Backend
) -> None:
    listener = backend.listen()
    attached = kernel.attach(pod.target())
    attached.open_direct()
    assert refused(pod)
    assert attached.adopt_listeners() == 1
    assert attached.adopt_listeners() == 0
    assert attached.steering() == "sk_lookup"
    talk(pod, listener)
    listener.close()
    assert not pod.listening(), "no copy of the app's listener keeps its port busy"
    assert refused(pod)
    attached.detach()


def test_a_listener_in_a_nested_cgroup_is_steered_to_and_adopted(kernel: Kernel, pod: Pod) -> None:
    before = pod.backend(cgroup=pod.nested_cgroup("container-a"))
    old = before.listen("127.0.0.1")
    attached = kernel.attach(pod.target())
    attached.open_direct()
    assert attached.adopt_listeners() == 1
    talk(pod, old)
    before.stop()
    after = pod.backend(cgroup=pod.nested_cgroup("container-b"))
    talk(pod, after.listen("127.0.0.1"))
    assert attached.counters().finished == 2
    attached.detach()


def test_a_listener_that_is_in_the_map_already_is_not_adopted_again(
    pod: Pod, attached: AttachedPod, backend: Backend
) -> None:
    backend.listen()
    assert attached.adopt_listeners() == 0


def test_a_pod_with_ipv6_only(kernel: Kernel) -> None:
    with Pod(ipv4=False) as pod:
        attached = kernel.attach(pod.target())
        attached.open_direct()
        listener = pod.backend().listen("::")
        talk(pod, listener, socket.AF_INET6)
        counters = attached.counters()
        assert (counters.steered, counters.started, counters.finished) == (1, 1, 1)
        attached.detach()


def test_an_ipv4_listener_is_no_use_to_a_pod_with_ipv6_only(kernel: Kernel) -> None:
    with Pod(ipv4=False) as pod:
        attached = kernel.attach(pod.target())
        attached.open_direct()
        backend = pod.backend()
        listener = backend.listen("0.0.0.0")
        assert attached.steering() == "none"
        assert attached.adopt_listeners() == 0  # it is known all the same
        listener.close()
        backend.listen("::")
        assert attached.steering() == "sk_lookup"
        attached.detach()
