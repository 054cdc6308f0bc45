"""Doing something in another network namespace leaves the caller where it is."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.pods import Pod, needs_pods
from weir.proxy import netns

pytestmark = needs_pods


def test_a_call_sees_the_interfaces_of_the_namespace(pod: Pod) -> None:
    inside = netns.run_in(pod.netns, socket.if_nameindex)
    assert {name for _, name in inside} >= {"lo", pod.interface}
    assert pod.host_interface not in {name for _, name in inside}
    assert pod.host_interface in {name for _, name in socket.if_nameindex()}


def test_a_namespace_that_is_not_there_is_named() -> None:
    with pytest.raises(OSError, match="weirt-not-there"):
        netns.run_in("/run/netns/weirt-not-there", lambda: None)


def test_what_is_no_namespace_is_named(tmp_path: Path) -> None:
    plain = tmp_path / "file"
    plain.touch()
    with pytest.raises(OSError, match=str(plain)):
        netns.run_in(plain, lambda: None)


def test_what_the_call_raises_comes_back(pod: Pod) -> None:
    with pytest.raises(ZeroDivisionError):
        netns.run_in(pod.netns, lambda: 1 // 0)


def test_a_cookie_belongs_to_its_namespace(pod: Pod) -> None:
    assert netns.cookie(pod.netns) == netns.cookie(pod.netns)
    assert netns.cookie(pod.netns) != netns.cookie("/proc/self/ns/net")


def test_a_socket_made_inside_connects_inside(pod: Pod) -> None:
    listener = pod.backend().listen("127.0.0.1", 8080)
    with netns.tcp_sockets(pod.netns, 1)[0] as client:
        assert client.getblocking() is False
        client.setblocking(True)
        client.connect(("127.0.0.1", 8080))
        listener.accept()


def test_the_ipv6_wildcard_listens_for_ipv4_too(pod: Pod) -> None:
    with netns.listen(pod.netns, "::", 8012) as listener:
        for address in pod.addresses:
            socket.create_connection((address, 8012), timeout=10).close()
        listener.setblocking(True)
        for _ in pod.addresses:
            listener.accept()[0].close()


def test_a_port_that_is_taken_is_named(pod: Pod) -> None:
    with (
        netns.listen(pod.netns, "0.0.0.0", 8012),
        pytest.raises(OSError, match=r"0\.0\.0\.0 port 8012"),
    ):
        netns.listen(pod.netns, "0.0.0.0", 8012)
