"""One sidecar in a network namespace of its own, with a user container and clients around it.

Owns the process as the kubelet would start it (contract section 1.1), and the facts that a
scenario brings to light. Does not know which of the two sidecars it is, nor what is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

from tests.contract.place import Place
from tests.contract.reports import Stat, counts, decode_stat, parse_exposition
from tests.contract.user import User
from tests.relay.rig import PATIENCE, Client, Closed, Request, Response

DATA, ADMIN, AUTOSCALER, METRICS, USER = 8012, 8022, 9090, 9091, 8080
POD = "bench-00001-deployment-6c8f7d9b5c-abcde"
TCP_PROBE = '{"tcpSocket":{"port":8080,"host":"127.0.0.1"},"successThreshold":1}'
ENVIRONMENT = {
    "SERVING_NAMESPACE": "default",
    "SERVING_SERVICE": "bench",
    "SERVING_CONFIGURATION": "bench",
    "SERVING_REVISION": "bench-00001",
    "SERVING_POD": POD,
    "SERVING_POD_IP": "10.244.0.17",
    "QUEUE_SERVING_PORT": str(DATA),
    "QUEUE_SERVING_TLS_PORT": "8112",
    "USER_PORT": str(USER),
    "CONTAINER_CONCURRENCY": "0",
    "REVISION_TIMEOUT_SECONDS": "300",
    "REVISION_RESPONSE_START_TIMEOUT_SECONDS": "0",
    "REVISION_IDLE_TIMEOUT_SECONDS": "0",
    "SERVING_READINESS_PROBE": TCP_PROBE,
    "ENABLE_MULTI_CONTAINER_PROBES": "false",
    "ENABLE_HTTP2_AUTO_DETECTION": "false",
    "ENABLE_HTTP_FULL_DUPLEX": "false",
    "SERVING_LOGGING_CONFIG": "",
    "SERVING_LOGGING_LEVEL": "",
    "SERVING_REQUEST_LOG_TEMPLATE": "",
    "SERVING_ENABLE_REQUEST_LOG": "false",
    "SERVING_ENABLE_PROBE_REQUEST_LOG": "false",
    "SERVING_REQUEST_METRICS_BACKEND": "prometheus",
    "SERVING_REQUEST_METRICS_REPORTING_PERIOD_SECONDS": "5",
    "METRICS_COLLECTOR_ADDRESS": "",
    "METRICS_DOMAIN": "knative.dev/internal/serving",
    "TRACING_CONFIG_BACKEND": "none",
    "TRACING_CONFIG_ZIPKIN_ENDPOINT": "",
    "TRACING_CONFIG_DEBUG": "false",
    "TRACING_CONFIG_SAMPLE_RATE": "0",
    "ENABLE_PROFILING": "false",
    "SYSTEM_NAMESPACE": "knative-serving",
    "HOST_IP": "192.0.2.4",
    "ROOT_CA": "",
    "HOSTNAME": POD,
    "PATH": "/usr/bin:/bin",
}
"""What the controller of Knative 1.15 injects, and what the kubelet adds."""

METRIC_LABELS = {
    "namespace_name": "default",
    "service_name": "bench",
    "configuration_name": "bench",
    "revision_name": "bench-00001",
    "pod_name": POD,
    "container_name": "queue-proxy",
}
"""Of every metric (contract section 7.2)."""

LATE = 1.5
"""How much later than due something may come on a busy machine and still be on time."""


class Caller(Client):
    """A client that can be more patient for the head of a response than others."""

    patience = PATIENCE

    async def head(self) -> bytes:
        try:
            async with asyncio.timeout(self.patience):
                return await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Closed(repr(error)) from None

    async def silent(self, seconds: float) -> bool:
        """Nothing comes for so long."""
        try:
            async with asyncio.timeout(seconds):
                return not await self.reader.read(1)
        except TimeoutError:
            return True


class World:
    """`facts` are in the order they were noted; both sidecars must have the same ones."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str | None], *, ready: bool = True
    ) -> None:
        settings: dict[str, str | None] = {**ENVIRONMENT, **environment}
        self.environment = {k: v for k, v in settings.items() if v is not None}
        self.facts: dict[str, str] = {}
        self.user = User()
        self.command = list(command)
        self.place = Place()
        self._ready = ready
        self.stalled = False
        """Something was late, or may have been missed: the machine may be to blame."""
        self._told = 0
        self._clients: list[Client] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._output = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - until stop
        self._process: subprocess.Popen[bytes] | None = None
        self._windows: dict[float, Stat] = {}
        self._sampler: asyncio.Task[None] | None = None

    async def __aenter__(self) -> World:
        await self.user.start(self.place.listen(USER))
        if self._ready:
            await self.launch()
            await self.listens(*self.ports)
            self._sampler = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._sampler is not None:
            self._sampler.cancel()
        for task in self._tasks:
            task.cancel()
        for client in self._clients:
            client.reset()
        await self.user.stop()
        self.user.abort()
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            await asyncio.to_thread(self._process.wait)
        for output in self._output:
            output.close()
        self.place.close()

    # --- the process -----------------------------------------------------------------------------
    @property
    def ports(self) -> list[int]:
        """Those that must accept before a scenario begins."""
        ports = [int(self.environment["QUEUE_SERVING_PORT"]), ADMIN, AUTOSCALER]
        if self.environment.get("SERVING_REQUEST_METRICS_BACKEND") == "prometheus":
            ports.append(METRICS)
        return ports

    async def launch(self, *wrapped: str) -> None:
        """Start the sidecar; `wrapped` is a command that starts it, if something must be set up."""

        def start() -> subprocess.Popen[bytes]:
            out, err = self._output
            return self.place.start(
                [*wrapped, *self.command], env=self.environment, stdout=out, stderr=err, cwd="/"
            )

        self._process = await asyncio.to_thread(start)

    async def listens(self, *ports: int) -> None:
        """Wait until all of them accept. Raises AssertionError with its last words if it died."""
        for port in ports:
            await self.until(functools.partial(self.place.accepts, port), f"port {port}")

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        os.kill(self.pid, number)

    async def exited(self, seconds: float = 150.0) -> int:
        """Its exit code, once it has one."""
        await self.until(lambda: not self.running, "exit", seconds, dead=True)
        code = self.exit_code
        assert code is not None
        return code

    @property
    def stdout(self) -> str:
        return self._read(0)

    @property
    def stderr(self) -> str:
        return self._read(1)

    def _read(self, which: int) -> str:
        fd = self._output[which].fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")

    # --- clients ---------------------------------------------------------------------------------
    async def client(self, port: int = 0) -> Caller:
        """Connected to the data port, or another one."""
        sock = self.place.socket()
        port = port or int(self.environment["QUEUE_SERVING_PORT"])
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        client = Caller(*await asyncio.open_connection(sock=sock, limit=1 << 22))
        self._clients.append(client)
        return client

    async def ask(
        self,
        name: str,
        data: bytes,
        *,
        port: int = 0,
        client: Client | None = None,
        due: float = 0.0,
    ) -> Response | None:
        """Say it, and note what is answered, when, and if the connection is kept."""
        client = client or await self.client(port)
        await client.send(data)
        return await self.answer(name, client, data.split(b" ", 1)[0].decode(), due=due)

    async def answer(
        self,
        name: str,
        client: Client,
        method: str = "GET",
        *,
        due: float = 0.0,
        since: float | None = None,
    ) -> Response | None:
        """Note the next response on this connection; None if it was closed instead.

        `due`: so many seconds from now, or `since` then.
        """
        begun = time.monotonic() if since is None else since
        response: Response | None = None
        try:
            response = await client.response(method)
            self.told(name, response)
        except Closed:
            self.note(f"{name}: status", "closed without an answer, or within it")
        self.when(name, time.monotonic() - begun, due)
        return response

    async def rest(self, client: Client) -> bytes:
        """What still comes when the client has nothing more to say."""
        with contextlib.suppress(OSError):
            client.writer.write_eof()
        return re.sub(rb"(?<=\r\nDate: )[^\r]+", b"-", await client.rest())

    def keep(self, task: asyncio.Task[None]) -> None:
        """A task of a scenario, to be cancelled at its end."""
        self._tasks.append(task)

    # --- facts -----------------------------------------------------------------------------------
    def note(self, fact: str, value: object) -> None:
        assert fact not in self.facts, f"noted twice: {fact}"
        self.facts[fact] = str(value)

    def when(self, name: str, elapsed: float, due: float) -> None:
        """Timing is compared by class: at its due time, or somewhere else."""
        self.stalled |= elapsed > due + LATE
        on_time = due - 0.1 <= elapsed <= due + LATE
        self.note(f"{name}: when", f"at {due:g} s" if on_time else f"after {elapsed:.2f} s")

    def told(self, name: str, response: Response) -> None:
        self.note(f"{name}: status", response.head.split(b"\r\n", 1)[0].decode("latin-1"))
        self.fields(name, response.fields)
        self.note(f"{name}: body", _text(response.body))
        if response.trailers:
            self.note(f"{name}: trailers", _text(response.trailers))

    def saw(self, request: Request) -> None:
        """Note what the user container was asked."""
        self._told += 1
        name = f"user {self._told}"
        self.note(f"{name}: line", request.line)
        self.fields(name, request.fields)
        self.note(f"{name}: body", _text(request.body))
        if request.trailers:
            self.note(f"{name}: trailers", _text(request.trailers))

    def fields(self, name: str, fields: list[tuple[str, str]]) -> None:
        """By lower-case name: order and spelling have a scenario of their own."""
        values: dict[str, list[str]] = {}
        for key, value in fields:
            values.setdefault(key.lower(), []).append(value)
        for key, several in values.items():
            text = " | ".join(several)
            self.note(f"{name}: {key}", _date(text) if key == "date" else text)

    async def until(
        self,
        condition: Callable[[], object],
        what: str,
        seconds: float = PATIENCE,
        *,
        dead: bool = False,
    ) -> None:
        """Wait for it; a sidecar that is `dead` may still be waited for."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"never happened: {what}"
            assert dead or self.running, f"exited with {self.exit_code} before: {what}"
            await asyncio.sleep(0.01)

    # --- what it reports -------------------------------------------------------------------------
    async def stat(self) -> Stat:
        """The last window that was closed."""
        client = await self.client(AUTOSCALER)
        try:
            response = await client.get("/metrics", "Accept: application/protobuf")
        finally:
            client.close()
            self._clients.remove(client)
        assert response.status == 200, response
        return decode_stat(response.body)

    async def metrics(self) -> str:
        client = await self.client(METRICS)
        try:
            response = await client.get("/metrics")
        finally:
            client.close()
            self._clients.remove(client)
        assert response.status == 200, response
        return response.body.decode()

    async def report(self) -> None:
        """Note what the user container saw, and what 9090 and 9091 say now that all is over."""
        for request in self.user.requests:
            self.saw(request)
        if not self.running:
            return
        await self._note_metrics()
        await self._look()
        before = len(self._windows)
        await self.until(lambda: len(self._windows) > before, "the window that this ended in")
        for name in ("request_count", "proxied_request_count"):
            total = sum(stat[name] for stat in self._windows.values())
            self.note(f"9090 {name}, all windows", f"{total:g}")

    async def windows(self, count: int) -> list[Stat]:
        """The next `count` windows that begin after now."""
        before = set(self._windows)
        await self.until(
            lambda: len(self._windows) > len(before) + count, f"{count} windows", count + PATIENCE
        )
        return [self._windows[t] for t in sorted(set(self._windows) - before)[1 : count + 1]]

    async def _sample(self) -> None:
        """Windows are told apart by their uptime; scrapes reset nothing (contract section 5.2).

        A window is a second long, so none is missed if less than that lies between two looks.
        """
        last = time.monotonic()
        while True:
            with contextlib.suppress(OSError, Closed):
                await self._look()
                now = time.monotonic()
                self.stalled |= now - last > 0.95 and self.running
                last = now
            await asyncio.sleep(0.25)

    async def _look(self) -> None:
        stat = await self.stat()
        if stat.numbers:
            self._windows[stat["process_uptime"]] = stat

    async def settled_metrics(self) -> dict[str, str]:
        """How many of what, once it no longer changes: recording may lag behind."""
        last: dict[str, str] | None = None
        for _ in range(50):
            now = counts(parse_exposition(await self.metrics()), "revision_", METRIC_LABELS)
            if now == last:
                break
            last = now
            await asyncio.sleep(0.1)
        return last or {}

    async def _note_metrics(self) -> None:
        if METRICS not in self.ports:
            return
        try:
            settled = await self.settled_metrics()
        except (Closed, OSError, ValueError) as error:
            settled = {"9091": f"no metrics: {error}"}
        for fact, value in settled.items():
            self.note(fact, value)


def _date(value: str) -> str:
    good = re.fullmatch(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", value)
    return "a date" if good else value


def _text(data: bytes) -> str:
    text = data.decode("latin-1")
    return text if len(text) <= 2000 else f"{text[:100]}... {len(text)} bytes"
