"""Pods that are not as most pods are, and are served like any other: user namespaces, nested
cgroups as in kind, several containers and processes, one address family or both."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
from pathlib import Path

import pytest

from tests.agent.borrowed import DATA_PORT, Agent, Clients, HeldPod, closing
from tests.agent.odd import (
    FIRST,
    Containers,
    HeldInNode,
    Node,
    OwnUsers,
    filled,
    get,
    refuses,
    why_no_users,
)
from tests.agent.test_privileges import NEEDED, allowed
from tests.hold.rig import HOLD
from tests.kernel.bpffs import mounted
from tests.kernel.test_mptcp import why_no_mptcp
from tests.pods import DIRECT_PORT, USER_PORT, Pod, needs_kernel, until

pytestmark = [
    needs_kernel,
    pytest.mark.skipif(not HOLD.exists(), reason="needs hold/weir-hold (make hold)"),
]


# ---- namespaces ------------------------------------------------------------------------------

_NS_GET_USERNS = 0xB701


def owned_elsewhere(namespace: Path) -> bool:
    """Does another user namespace than ours own it?"""
    with namespace.open() as file:
        owner = fcntl.ioctl(file, _NS_GET_USERNS)
    try:
        return os.fstat(owner).st_ino != Path("/proc/self/ns/user").stat().st_ino
    finally:
        os.close(owner)


HANDLER = """
import http.server, socket
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")
    def log_message(self, *_): pass
"""

MPTCP = f"""{HANDLER}
server = http.server.ThreadingHTTPServer(("", {USER_PORT}), Handler, bind_and_activate=False)
server.socket.close()
server.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
server.server_bind()
server.server_activate()
server.serve_forever()
"""


class Mptcp(HeldPod):
    """Its app listens as every Go server does by default."""

    program = MPTCP


@pytest.mark.skipif(why_no_users() is not None, reason=str(why_no_users()))
@pytest.mark.parametrize(
    ("kind", "steering"),
    [
        (HeldPod, "sk_lookup"),
        pytest.param(
            Mptcp,
            "tc",
            marks=pytest.mark.skipif(why_no_mptcp() is not None, reason=str(why_no_mptcp())),
        ),
    ],
)
def test_a_pod_with_a_user_namespace_is_served_like_any_other_by_seven_capabilities(
    tmp_path: Path, kind: type[HeldPod], steering: str
) -> None:
    with (
        filled(OwnUsers(), "env", kind=kind) as held,
        closing(agent := Agent(tmp_path, held, prefix=allowed(*NEEDED))),
    ):
        until(lambda: agent.workers, "the worker")
        held.start_hold()
        owner = Path(f"/proc/{held.hold.pid}").stat().st_uid
        assert owner == FIRST
        assert owned_elsewhere(held.pod.netns)
        agent.until_held().until_open()
        assert held.get() == (200, b"hello")
        assert held.get(port=DIRECT_PORT) == (200, b"hello")
        until(lambda: agent.pod()["direct"]["finished"] == 1, "it is counted")
        assert agent.pod()["direct"]["steering"] == steering


def test_the_agent_in_a_node_within_a_node_serves_counts_adopts_and_sweeps(tmp_path: Path) -> None:
    pins = tmp_path / "bpffs"
    pins.mkdir()
    with mounted(pins) as root, Node() as node, HeldInNode(node) as living:
        with (
            HeldInNode(node) as dead,
            closing(agent := Agent(tmp_path / "a", living, dead, prefix=node.agent, pins=root)),
        ):
            assert not Path(living.described["cgroup"]).exists(), "only inside it is called so"
            for number in (0, 1):  # the apps were there before: adopted
                agent.until_held(number).until_open(number)
            assert living.get() == (200, b"hello")
            with closing(clients := Clients(living, 2, DIRECT_PORT)):
                clients.more()
            assert clients.failures == []
            until(
                lambda: agent.pod()["direct"]["finished"] == clients.answers,
                "every direct request is counted",
            )
            assert len(list(root.glob("*/pods/*"))) == 2
            node.kill_agent()
        with closing(agent := Agent(tmp_path / "b", living, prefix=node.agent, pins=root)):
            agent.until_held().until_open()
            assert len(list(root.glob("*/pods/*"))) == 1, "what the dead pod left is swept"
            assert agent.pod()["direct"]["finished"] == clients.answers, "counters go on"
            node.kill_agent()


def test_without_the_nodes_pid_namespace_the_reason_says_so(tmp_path: Path) -> None:
    with HeldPod() as held:
        alone = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
        with closing(agent := Agent(tmp_path, held, prefix=alone)):
            agent.until_reason("in another PID namespace (hostPID?)")
            until(lambda: held.by_sidecar, "the sidecar serves it")


# ---- several containers, several processes ---------------------------------------------------

MEMBERS = 4
GROUP = f"""
import os, socket, sys
def serve():
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("0.0.0.0", {USER_PORT}))
    listener.listen(64)
    body = str(os.getpid()).encode()
    while True:
        connection, _ = listener.accept()
        while connection.recv(65536):
            head = "HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body)
            connection.sendall(head.encode() + body)
        connection.close()
for _ in range({MEMBERS}):
    if not os.fork():
        serve()
sys.stdin.readline()
"""


class Group(HeldPod):
    program = GROUP


def members(held: HeldPod) -> set[bytes]:
    children = Path(f"/proc/{held.app.pid}/task/{held.app.pid}/children")
    return {pid.encode() for pid in children.read_text().split()}


def test_all_processes_of_a_reuseport_group_get_direct_connections_and_one_may_die(
    tmp_path: Path,
) -> None:
    with filled(Containers(), kind=Group) as held, closing(agent := Agent(tmp_path, held)):
        agent.until_held().until_open()
        asked = itertools.count(1)

        def answers_of(wanted: set[bytes]) -> int:
            seen: set[bytes] = set()
            for number in asked:
                status, body = held.get(port=DIRECT_PORT)
                assert status == 200
                assert body in wanted
                seen.add(body)
                if seen == wanted:
                    return number
            raise AssertionError

        everybody = members(held)
        assert len(everybody) == MEMBERS
        answers_of(everybody)
        dead = sorted(everybody)[0]
        os.kill(int(dead), signal.SIGKILL)
        until(lambda: _ended(int(dead)), "it is gone, and its listener with it")
        total = answers_of(everybody - {dead})
        until(lambda: agent.pod()["direct"]["finished"] == total, "every one is counted")
        assert held.get()[0] == 200


def _ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}/fd").exists() or not list(Path(f"/proc/{pid}/fd").iterdir())


def test_of_several_containers_the_one_with_the_user_port_is_steered_to(tmp_path: Path) -> None:
    with filled(Containers()) as held:
        other = held.pod.backend()
        other.listen("0.0.0.0", USER_PORT + 1)
        with closing(agent := Agent(tmp_path, held)):
            agent.until_held().until_open()
            assert held.get(port=DIRECT_PORT) == (200, b"hello")
            another = held.pod.backend()
            another.listen("0.0.0.0", USER_PORT + 2)
            assert held.get(port=DIRECT_PORT) == (200, b"hello")
            other.stop()
            assert held.get(port=DIRECT_PORT) == (200, b"hello")
            assert agent.pod()["direct"]["listeners"] == 0  # the one was adopted, nobody else's


# ---- IPv4, IPv6, both ------------------------------------------------------------------------

EVERYWHERE = f"""{HANDLER}
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
Server(("::", {USER_PORT}), Handler).serve_forever()
"""


class Everywhere(HeldPod):
    """Its app listens as most do: on [::], for both families."""

    program = EVERYWHERE


@pytest.mark.parametrize(
    ("ipv4", "ipv6"), [(True, False), (False, True), (True, True)], ids=["IPv4", "IPv6", "both"]
)
def test_a_pod_is_called_both_ways_by_every_address_that_it_has(
    tmp_path: Path, ipv4: bool, ipv6: bool
) -> None:
    with (
        filled(Pod(ipv4=ipv4, ipv6=ipv6), kind=Everywhere) as held,
        closing(agent := Agent(tmp_path, held)),
    ):
        agent.until_held().until_open()
        for number, address in enumerate(held.pod.addresses, 1):
            assert get(address, DATA_PORT) == (200, b"hello")
            assert get(address, DIRECT_PORT) == (200, b"hello")
            until(
                lambda number=number: agent.pod()["direct"]["finished"] == number,  # type: ignore[misc]
                "it is counted",
            )


def test_of_a_dual_stack_pod_that_is_only_named_hold_tells_one_address(tmp_path: Path) -> None:
    class Named(Everywhere):
        @property
        def described(self) -> dict[str, object]:
            return {k: v for k, v in super().described.items() if k != "addresses"}

    with Named() as held, closing(agent := Agent(tmp_path, held)):
        agent.until_held().until_open()
        assert agent.pod()["addresses"] == [held.pod.address]
        assert get(held.pod.address, DIRECT_PORT) == (200, b"hello")
        assert refuses(held.pod.address6, DIRECT_PORT)
        assert get(held.pod.address6, DATA_PORT) == (200, b"hello")


def test_a_pod_with_ipv6_whose_app_knows_only_ipv4_is_relayed_with_the_reason(
    tmp_path: Path,
) -> None:
    with filled(Pod(ipv4=False)) as held, closing(agent := Agent(tmp_path, held)):
        agent.until_held()
        until(lambda: agent.pod()["ready"], "ready")
        assert held.get() == (200, b"hello")
        assert "no listener on port 8080 that" in agent.pod()["direct"]["reason"]
        assert refuses(held.address, DIRECT_PORT)
