"""How the process starts and ends, and in how little it can live (contract sections 1.5 and 6)."""

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pods import needs_pods, until
from tests.sidecar.pod import (
    ADMIN,
    AUTOSCALER,
    DATA,
    GET,
    METRICS,
    OK,
    PATIENCE,
    PROBE,
    USER,
    WEIR,
    Pod,
    received,
    rest,
    user_container,
)

pytestmark = needs_pods

CONFINE = Path(__file__).with_name("confine.sh")
REPOSITORY = Path(__file__).parents[2]


# --- sockets ------------------------------------------------------------------------------------


def test_a_connection_that_was_there_before_the_process_is_served(pod: Pod) -> None:
    with pod.place.listen(DATA) as listener, user_container(pod.place):
        client = pod.connect()
        client.sendall(GET)
        pod.start_with_sockets(listener)
        assert rest(client).endswith(b"hello")
        client.close()


def test_a_request_that_comes_as_soon_as_the_port_is_open_is_served(pod: Pod) -> None:
    """The sockets listen before anything heavy is loaded."""
    with user_container(pod.place):
        pod.start()
        until(lambda: pod.running and pod.place.accepts(DATA))
        assert pod.ask().endswith(b"hello")


def test_sockets_that_were_passed_are_served_each_by_its_port(pod: Pod) -> None:
    with (
        pod.place.listen(ADMIN) as admin,
        pod.place.listen(DATA) as data,
        user_container(pod.place),
    ):
        pod.start_with_sockets(admin, data)
        assert pod.ask().endswith(b"hello")
        assert pod.ask(GET, ADMIN).startswith(b"HTTP/1.1 404")
        assert pod.ask(GET.replace(b" / ", b" /metrics "), AUTOSCALER).startswith(b"HTTP/1.1 200")


def test_a_socket_for_a_port_nobody_serves_is_closed(pod: Pod) -> None:
    listener = pod.place.listen(4711)
    pod.start_with_sockets(listener)
    listener.close()
    until(lambda: pod.running and not pod.place.accepts(4711), "it is closed")
    pod.serving()


def test_sockets_meant_for_another_process_are_left_alone(pod: Pod) -> None:
    with Path("/dev/null").open("rb") as other:
        pod.start_with_sockets(other, LISTEN_PID="1")  # type: ignore[arg-type]
        pod.serving()


def test_a_passed_descriptor_that_does_not_listen_ends_the_start(pod: Pod) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        pod.start_with_sockets(sock)
        assert pod.exited() == 1
    assert "descriptor 3 of LISTEN_FDS does not listen" in pod.said
    assert "Traceback" not in pod.said


def test_a_passed_descriptor_that_is_no_socket_ends_the_start(pod: Pod) -> None:
    with Path("/dev/null").open("rb") as file:
        pod.start_with_sockets(file)  # type: ignore[arg-type]
        assert pod.exited() == 1
    assert "descriptor 3 of LISTEN_FDS" in pod.said
    assert "Traceback" not in pod.said


@pytest.mark.parametrize("port", [DATA, ADMIN, AUTOSCALER])
def test_a_port_that_is_taken_ends_the_start_and_is_named(pod: Pod, port: int) -> None:
    with pod.place.listen(port):
        pod.start()
        assert pod.exited() == 1
    assert f"port {port}" in pod.said
    assert "Traceback" not in pod.said


def test_a_taken_metrics_port_is_only_told(pod: Pod) -> None:
    with pod.place.listen(METRICS), user_container(pod.place):
        pod.start()
        pod.serving()
        assert pod.ask().endswith(b"hello")
    assert f"port {METRICS}" in pod.said


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def test_the_preface_of_http2_may_come_in_pieces(pod: Pod) -> None:
    with user_container(pod.place):
        pod.start()
        pod.serving()
        for cut in range(1, len(PREFACE)):
            with pod.connect() as client:
                client.sendall(PREFACE[:cut])
                assert pod.ask(PROBE).startswith(b"HTTP/1.1 200")  # so that was read by now
                client.sendall(PREFACE[cut:] + SETTINGS)
                assert client.recv(9)[3] == SETTINGS[3], f"cut behind {PREFACE[:cut]!r}"


# --- the end --------------------------------------------------------------------------------------


def test_a_second_sigterm_ends_it_at_once(pod: Pod) -> None:
    with user_container(pod.place):
        pod.start()
        until(lambda: pod.running and pod.place.accepts(DATA))
        assert pod.ask(PROBE).startswith(b"HTTP/1.1 200")
        pod.signal(signal.SIGTERM)
        until(lambda: pod.ask(PROBE).startswith(b"HTTP/1.1 503"), "probes fail in the drain")
        assert pod.running
        pod.signal(signal.SIGTERM)
        assert pod.exited() == 1


def test_a_kill_leaves_nothing(pod: Pod) -> None:
    """Its clients learn of it, and the next one can have the same ports at once."""
    with pod.place.listen(USER) as user:
        user.settimeout(PATIENCE)
        pod.start()
        pod.serving()
        client = pod.connect()
        client.sendall(GET)
        backend, _ = user.accept()
        received(backend, b"\r\n\r\n")
        folder = Path(f"/proc/{pod.process.pid}/task")  # type: ignore[union-attr]
        children = [int(c) for t in folder.iterdir() for c in (t / "children").read_text().split()]
        assert not children
        pod.signal(signal.SIGKILL)
        assert pod.exited() == -signal.SIGKILL
        assert rest(client) == b""
        assert rest(backend) == b""
        pod.start()
        pod.serving()
        with pod.connect() as again:
            again.sendall(GET)
            backend, _ = user.accept()
            received(backend, b"\r\n\r\n")
            backend.sendall(OK)
            assert rest(again).endswith(b"hello")


# --- a restricted pod -----------------------------------------------------------------------------


def why_not_confined() -> str | None:
    for tool in ("unshare", "setpriv", "chroot", "mount"):
        if shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            return f"needs {tool}"
    made = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    return f"cannot make a mount namespace: {made.stderr}" if made.returncode else None


REASON = why_not_confined()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_it_lives_without_rights_files_and_home(pod: Pod, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    needed = {Path(sys.base_prefix), Path(sys.prefix), REPOSITORY}
    paths = "\n".join(sorted(str(path) for path in needed if not path.is_relative_to("/usr")))
    confined = ["unshare", "--mount", str(CONFINE), str(root), paths]
    with user_container(pod.place):
        pod.start([*confined, *WEIR], TMPDIR="/nowhere", CONTAINER_CONCURRENCY="10")
        pod.serving()
        assert pod.ask(PROBE).startswith(b"HTTP/1.1 200")
        assert pod.ask().endswith(b"hello")
        page = pod.ask(GET.replace(b" / ", b" /metrics "), METRICS)
        assert b"revision_request_count" in page
        assert pod.status("Uid").split() == ["65532"] * 4
        assert int(pod.status("CapEff"), 16) == int(pod.status("CapBnd"), 16) == 0
        assert pod.status("NoNewPrivs") == "1"
        inside = Path(f"/proc/{pod.process.pid}")  # type: ignore[union-attr]
        with pytest.raises(OSError, match="Read-only"):
            (inside / "root/file").touch()
        assert "Traceback" not in pod.said
        pod.signal(signal.SIGTERM)
        until(lambda: pod.ask(PROBE).startswith(b"HTTP/1.1 503"), "the drain")
    assert "rror" not in pod.said
