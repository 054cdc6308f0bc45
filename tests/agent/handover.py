"""Changes of the holder of a pod, as steps around a test's traffic, and pods that speak other than
plain requests: streams of HTTP/1.1, WebSockets, gRPC, TLS.

A change yields twice: when the first holder serves, and when another one does while what began
before still runs. What comes after the second yield is checked when that has ended.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from tests.agent.borrowed import DATA_PORT, Agent, Clients, HeldPod, closing, stop_process
from tests.hold.rig import HOLD, WEIR
from tests.pods import USER_PORT, until
from tests.relay.certificates import NAMES, Pair

TLS_PORT = 8112

# --- who holds the pod ------------------------------------------------------------------------

Change = Callable[[HeldPod, Path], Iterator[None]]


def from_agent_to_agent(pod: HeldPod, folder: Path) -> Iterator[None]:
    with closing(old := Agent(folder / "old", pod)):
        old.until_held()
        yield
        with closing(new := Agent(folder / "new", pod)):
            new.until_reason("rung")
            old.process.terminate()
            new.until_held()
            until(lambda: new.pod()["ready"], "the new one serves")
            yield
            assert old.process.wait(60) == 0
            assert not pod.by_sidecar


def from_agent_to_sidecar(pod: HeldPod, folder: Path) -> Iterator[None]:
    with closing(agent := Agent(folder / "agent", pod)):
        agent.until_held()
        yield
        agent.process.terminate()
        until(lambda: pod.by_sidecar, "the sidecar", 30.0)
        yield
        assert agent.process.wait(60) == 0


def from_sidecar_to_agent(pod: HeldPod, folder: Path) -> Iterator[None]:
    """The sidecar ends what it has before it gives the pod away, however long that takes."""
    until(lambda: pod.by_sidecar, "the sidecar", 30.0)
    yield
    with closing(agent := Agent(folder / "agent", pod)):
        agent.until_reason("rung")
        yield
        agent.until_held()
        until(lambda: not pod.by_sidecar, "hold")


def from_a_stopped_agent_that_wakes_up(pod: HeldPod, folder: Path) -> Iterator[None]:
    """Supervisor and worker stand still until another one accepts, with all they have in flight."""
    with closing(agent := Agent(folder / "agent", pod)):
        agent.until_held()
        (worker,) = until(lambda: agent.workers, "the worker")
        yield
        for pid in (agent.process.pid, worker):
            stop_process(pid)
        until(lambda: pod.by_sidecar, "the sidecar has taken over", 30.0)
        for pid in (worker, agent.process.pid):
            os.kill(pid, 18)
        agent.until_reason("rung")
        yield
        agent.until_held()


CHANGES: tuple[Change, ...] = (
    from_agent_to_agent,
    from_agent_to_sidecar,
    from_sidecar_to_agent,
    from_a_stopped_agent_that_wakes_up,
)

# --- pods -------------------------------------------------------------------------------------


class StreamingPod(HeldPod):
    """HTTP/1.1: `/events` goes on until they may go, a POST is answered with a checksum."""

    program = f"""
import hashlib, http.server, sys, threading
go = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), go.set()), daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path != "/events":
            self.answer(b"hello")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        number = 0
        while True:
            last = go.wait(0.01)
            event = b"data: %d\\n\\n" % number
            self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(event), event))
            number += 1
            if last:
                self.wfile.write(b"0\\r\\n\\r\\n")
                return
    def do_POST(self):
        left, sum = int(self.headers["Content-Length"]), hashlib.sha256()
        while left:
            piece = self.rfile.read(min(left, 65536))
            sum.update(piece)
            left -= len(piece)
        self.answer(sum.hexdigest().encode())
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer.request_queue_size = 512
http.server.ThreadingHTTPServer(("127.0.0.1", {USER_PORT}), Handler).serve_forever()
"""


class EchoPod(HeldPod):
    """WebSockets, by the library; a plain request is answered as well."""

    program = f"""
import http
from websockets.sync.server import serve
def plain(connection, request):
    if "Upgrade" not in request.headers:
        return connection.respond(http.HTTPStatus.OK, "hello")
def echo(connection):
    for message in connection:
        connection.send(message.upper())
serve(echo, "127.0.0.1", {USER_PORT}, process_request=plain).serve_forever()
"""


class GrpcPod(HeldPod):
    """gRPC: `Echo`, `Chat`, and `Watch`, which goes on until it may go."""

    program = f"""
import concurrent.futures, itertools, sys, threading
import grpc
go = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), go.set()), daemon=True).start()
def echo(message, context):
    return message
def watch(message, context):
    for number in itertools.count():
        last = go.wait(0.01)
        yield b"%d" % number
        if last:
            return
def chat(messages, context):
    for message in messages:
        yield message.upper()
class Service(grpc.GenericRpcHandler):
    def service(self, details):
        return {{
            "Echo": grpc.unary_unary_rpc_method_handler(echo),
            "Watch": grpc.unary_stream_rpc_method_handler(watch),
            "Chat": grpc.stream_stream_rpc_method_handler(chat),
        }}[details.method.rpartition("/")[2]]
server = grpc.server(concurrent.futures.ThreadPoolExecutor(32))
server.add_generic_rpc_handlers((Service(),))
server.add_insecure_port("127.0.0.1:{USER_PORT}")
server.start()
server.wait_for_termination()
"""


_WITH_CERTIFICATE = """
mount -t tmpfs none /var/lib && mkdir -p /var/lib/knative/certs && cp "$0"/* /var/lib/knative/certs
exec "$@"
"""


def secured(kind: type[HeldPod], pair: Pair) -> HeldPod:
    """The same with a certificate where the queue-proxy looks for it, and a sidecar as well."""

    class Secured(kind):  # type: ignore[valid-type, misc]
        def _command(self) -> list[str]:
            enter = ["unshare", "--mount", "/bin/sh", "-c", _WITH_CERTIFICATE, str(pair.folder)]
            return [*enter, str(HOLD), *WEIR]

    made: HeldPod = Secured()
    return made


# --- clients ----------------------------------------------------------------------------------


def channel(pod: HeldPod, pair: Pair | None = None) -> grpc.Channel:
    """On a connection of its own; made again by the library when it is told to go."""
    options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
    if pair is None:
        return grpc.insecure_channel(f"{pod.pod.address}:{DATA_PORT}", options=options)
    credentials = grpc.ssl_channel_credentials(pair.certificate.read_bytes())
    name = NAMES[0].removeprefix("DNS:")
    options.append(("grpc.ssl_target_name_override", name))
    return grpc.secure_channel(f"{pod.pod.address}:{TLS_PORT}", credentials, options=options)


class GrpcClients:
    """Unary calls all the time, each client on a channel of its own. Nothing is retried here."""

    def __init__(self, pod: HeldPod, count: int = 4, pair: Pair | None = None) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self._ended = False
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(channel(pod, pair),)) for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def more(self, count: int = 50) -> None:
        wanted = self.answers + count
        until(lambda: self.answers >= wanted, f"answers come: {self.failures}", 60.0)

    def stop(self) -> None:
        self._ended = True
        for thread in self._threads:
            thread.join()

    def _run(self, line: grpc.Channel) -> None:
        with line:
            echo = line.unary_unary("/s/Echo")
            while not self._ended:
                try:
                    answer, failure = echo(b"hello", timeout=60), ""
                except grpc.RpcError as error:
                    answer, failure = b"", f"{error.code()}: {error.details()}"
                with self._lock:
                    if answer == b"hello":
                        self.answers += 1
                    else:
                        self.failures.append(failure or repr(answer))


class SecureClients(Clients):
    """`Clients` of the TLS port; those that don't keep their connections shake hands each time."""

    def __init__(self, pod: HeldPod, pair: Pair, count: int = 4) -> None:
        self._context = ssl.create_default_context(cafile=str(pair.certificate))
        self._context.check_hostname = False
        super().__init__(pod, count, TLS_PORT)

    def _connection(self) -> Any:
        import http.client

        return http.client.HTTPSConnection(
            self._address, self._port, timeout=30, context=self._context
        )
