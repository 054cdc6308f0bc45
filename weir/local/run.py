"""`weir run`: broker, function, agent and adaptor on this machine, started and stopped in order.

Owns the order: what is needed first starts first, and on the way down each one has finished what
it acknowledged before the next goes. The parts are the ordinary commands (`weir agent`,
`weir adaptor`) as processes of their own.
"""

import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weir.local import broker as brokers
from weir.local import state as states
from weir.local import view as views
from weir.local.children import Child, cpu_seconds
from weir.local.pod import LocalPod, LocalPodError
from weir.local.sample import Sample, Sampler
from weir.local.summary import Result
from weir.proxy.wire.client import HttpClient, TransportError
from weir.proxy.wire.status import read_status

SAMPLE_SECONDS = 0.5
START_SECONDS = 30.0
IDLE_SECONDS = 1.0  # nothing received, nothing unacknowledged for this long: drained
DRAIN_SECONDS = 15.0
CRASHES = 3  # exits before it was ever ready, after which the function is given up


class RunError(Exception):
    """Why the run could not start or go on, in one line."""


@dataclass(frozen=True)
class RunOptions:
    """The command line of `weir run`. Seconds; `seconds` 0 runs until Ctrl-C."""

    routes: Path
    command: tuple[str, ...]
    broker: str | None = None
    port: int = 8080
    isolated: bool = True
    devices: int = 0
    interval: float = 0.1
    seconds: float = 0.0
    verify: str | None = None
    as_json: bool = False
    state: Path | None = None


async def run(options: RunOptions) -> int:
    """The whole run. Returns the exit status: 0 when all was delivered and the counts agree."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    with views.make(options.as_json) as view, tempfile.TemporaryDirectory(prefix="weir-") as tmp:
        try:
            with states.directory(options.routes, options.state, Path(tmp)) as state:
                return await LocalRun(options, view, Path(tmp), state).run(stop)
        except (RunError, brokers.BrokerError, states.StateError) as e:
            view.note("weir", f"error: {e}")
            return 1


class LocalRun:
    """One run's parts. Each `_start_...` adds how to undo it; `run` undoes in reverse."""

    def __init__(self, options: RunOptions, view: views.View, tmp: Path, state: Path) -> None:
        self._options = options
        self._view = view
        self._tmp = tmp
        self._state = state
        self._quarantine = state / "quarantine.sqlite"
        self._pod: LocalPod | None = None
        self._agent = Child("agent", view.note)
        self._adaptor = Child("adaptor", view.note)
        self._function = Child("function", view.note)
        self._fleet = Child("fleet", self._fleet_line)
        self._published: int | None = None
        self._sampler: Sampler | None = None

    async def run(self, stop: asyncio.Event) -> int:
        """Start, show until `stop` (or the time is over), drain, sum up, clean up."""
        async with contextlib.AsyncExitStack() as undo:
            await self._start(undo, stop)
            if stop.is_set():
                return 130
            keeper = asyncio.create_task(self._keep_function())
            undo.push_async_callback(_cancel, keeper)
            began = time.monotonic()
            cpu = self._cpu()
            if self._options.devices:
                await self._start_fleet()
                undo.push_async_callback(self._fleet.stop, 5.0)
            await self._show(stop, keeper)
            await self._fleet.stop(DRAIN_SECONDS)
            sample = await self._drain()
            cpu = {name: value - cpu[name] for name, value in self._cpu().items()}
            return await self._summary(sample, time.monotonic() - began, cpu)

    async def _start(self, undo: contextlib.AsyncExitStack, stop: asyncio.Event) -> None:
        options, note = self._options, self._view.note
        self._broker = broker = await brokers.start(options.broker, self._state, note)
        undo.push_async_callback(broker.close)
        note("weir", f"broker {broker.name} ({broker.note})")
        self._make_pod(undo)
        undo.push_async_callback(self._function.stop, 10.0)
        await self._start_agent(undo)
        await self._start_function()
        ready = await self._until(
            stop,
            lambda: bool(self._agent_status()["pods"][0]["ready"]),
            self._agent,
            self._function,
        )
        if ready:
            await self._start_adaptor(undo, broker.version, stop)

    def _make_pod(self, undo: contextlib.AsyncExitStack) -> None:
        why = "asked for with --no-pod"
        if self._options.isolated:
            try:
                self._pod = LocalPod.make()
            except LocalPodError as e:
                why = str(e)
        if self._pod is not None:
            undo.callback(self._pod.close)
            self._user_port = self._options.port
            self._view.note("weir", f"pod {self._pod.name} at {self._pod.address}")
        else:
            self._user_port = brokers.free_port()
            self._view.note("weir", f"the function is a plain process, relayed only: {why}")

    async def _start_agent(self, undo: contextlib.AsyncExitStack) -> None:
        pod: dict[str, Any] = {"name": "function", "userPort": self._user_port}
        if self._pod is not None:
            pod |= {
                "netns": str(self._pod.netns),
                "cgroup": str(self._pod.cgroup),
                "addresses": [self._pod.address],
            }
        else:
            pod |= {"listen": "127.0.0.1", "dataPort": 0}
        pods = self._tmp / "pods.json"
        pods.write_text(json.dumps({"pods": [pod]}))
        undo.push_async_callback(self._agent.stop, 40.0)
        await self._agent.start(
            [
                *(sys.executable, "-P", "-m", "weir", "agent"),
                *("--pods", str(pods), "--status", str(self._tmp / "agent.sock")),
            ]
        )
        await self._until(
            asyncio.Event(), lambda: bool(self._agent_status()["workers"]), self._agent
        )
        status = self._agent_status()
        if status["kernel"] != "ok":
            self._view.note("weir", f"no direct path: {status['kernel']}")
        host = self._pod.address if self._pod is not None else "127.0.0.1"
        self._function_url = f"http://{host}:{status['pods'][0]['data_port']}"

    async def _start_function(self) -> None:
        pod = self._pod
        environment = {
            "PORT": str(self._user_port),
            "K_SERVICE": "function",
            "K_CONFIGURATION": "function",
            "K_REVISION": "function-00001",
            "WEIR_HOST": pod.host_address if pod is not None else "127.0.0.1",
        }
        await self._function.start(
            self._options.command,
            environment,
            netns=pod.netns if pod is not None else None,
            cgroup=pod.cgroup if pod is not None else None,
        )

    async def _start_adaptor(
        self, undo: contextlib.AsyncExitStack, version: str, stop: asyncio.Event
    ) -> None:
        undo.push_async_callback(self._adaptor.stop, 40.0)
        await self._adaptor.start(
            [
                *(sys.executable, "-P", "-m", "weir", "adaptor"),
                *(
                    "--routes",
                    str(self._options.routes),
                    "--client-id",
                    states.client_id(self._state),
                ),
                *("--function-url", self._function_url, "--mqtt-version", version),
                *("--quarantine", str(self._quarantine)),
                *("--status", str(self._tmp / "adaptor.sock")),
            ],
            # by environment: a password must not stand in the list of processes
            {"WEIR_BROKER": self._broker.url},
        )
        self._sampler = Sampler(self._adaptor.pid)
        sinks: list[dict[str, Any]] = []

        def connected() -> bool:
            sinks[:] = self._adaptor_status()["sinks"]
            return all(s["connected"] for s in sinks)

        try:
            await self._until(stop, connected, self._adaptor)
        except RunError as e:
            if not sinks or self._broker.child is not None or self._options.devices:
                raise RunError(f"{e}: {sinks[0]['session']}" if sinks else str(e)) from None
            # it goes on trying, and the view shows for how long
            note = next(s["session"] for s in sinks if not s["connected"])
            self._view.note("weir", f"not connected to the broker yet: {note}")

    async def _start_fleet(self) -> None:
        options = self._options
        await self._fleet.start(
            [
                *(sys.executable, "-P", "-m", "weir.local.fleet"),
                *("--devices", str(options.devices), "--interval", str(options.interval)),
            ],
            {"WEIR_BROKER": self._broker.url},
        )

    async def _show(self, stop: asyncio.Event, keeper: "asyncio.Task[None]") -> None:
        """Samples until told to stop; raises RunError when a part of ours ends by itself."""
        until = time.monotonic() + (self._options.seconds or float("inf"))
        while not stop.is_set() and time.monotonic() < until:
            fleet = self._fleet if self._options.devices else None
            for child in (self._broker.child, self._agent, self._adaptor, fleet):
                if child is not None and not child.running:
                    raise RunError(f"{child.name} ended: {' / '.join(child.tail) or 'no output'}")
            if keeper.done():
                keeper.result()
            with contextlib.suppress(OSError, ValueError):  # a status of a process that is ending
                self._view.show(self._sample())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), SAMPLE_SECONDS)

    async def _keep_function(self) -> None:
        """Restart the function when it exits, as kubelet would; RunError if it never gets up."""
        crashes = 0
        while True:
            began = time.monotonic()
            status = await self._function.wait()
            crashes = crashes + 1 if time.monotonic() - began < 5.0 else 1
            if crashes >= CRASHES:
                raise RunError(f"the function exited {crashes} times in a row with status {status}")
            self._view.note("weir", f"the function exited with status {status}; starting it again")
            await asyncio.sleep(crashes - 1)
            await self._start_function()

    async def _drain(self) -> Sample:
        """Wait until nothing is under way, or the bound is over; the last sample."""
        deadline = time.monotonic() + DRAIN_SECONDS
        idle_since = time.monotonic()
        sample = self._sample()
        while time.monotonic() < deadline:
            before, sample = sample, self._sample()
            if sample.unacknowledged or sample.received != before.received:
                idle_since = time.monotonic()
            if time.monotonic() - idle_since > IDLE_SECONDS:
                break
            await asyncio.sleep(0.1)
        return sample

    async def _summary(self, sample: Sample, seconds: float, cpu: dict[str, float]) -> int:
        claimed = await self._function_count()
        result = Result(sample, seconds, self._quarantine, cpu, self._published, claimed)
        self._view.summary(result.lines(), result.facts())
        return 1 if result.problems() else 0

    async def _function_count(self) -> int | None:
        """The function's own count at `--verify PATH`, None when not asked for."""
        if self._options.verify is None:
            return None
        host, port = self._function_url.removeprefix("http://").rsplit(":", 1)
        client = HttpClient(host, int(port))
        try:
            head = f"GET {self._options.verify} HTTP/1.1\r\nHost: {host}\r\n".encode()
            count = json.loads((await client.request(head, b"", 10.0)).body)["events"]
        except (TransportError, ValueError, LookupError, TypeError) as e:
            raise RunError(
                f'--verify {self._options.verify}: the function must answer {{"events": N}}: {e!r}'
            ) from None
        finally:
            await client.close()
        return int(count)

    async def _until(
        self, stop: asyncio.Event, condition: Callable[[], bool], *children: Child
    ) -> bool:
        """Wait for a condition over the statuses; False when told to stop.

        Raises RunError when one of the children ends first or the time is over.
        """
        deadline = time.monotonic() + START_SECONDS
        while not stop.is_set():
            for child in children:
                if not child.running:
                    status = await child.wait()
                    raise RunError(f"the {child.name} ended at its start with status {status}")
            with contextlib.suppress(OSError, ValueError, LookupError):  # no status yet
                if condition():
                    return True
            if time.monotonic() > deadline:
                raise RunError(
                    f"the {children[-1].name} was not ready after {START_SECONDS:.0f} s"
                    + (f": does it listen on $PORT ({self._user_port})?"
                       if children[-1] is self._function else "")
                )  # fmt: skip
            await asyncio.sleep(0.05)
        return False

    def _agent_status(self) -> dict[str, Any]:
        return read_status(self._tmp / "agent.sock")

    def _adaptor_status(self) -> dict[str, Any]:
        return read_status(self._tmp / "adaptor.sock")

    def _sample(self) -> Sample:
        assert self._sampler is not None
        return self._sampler.sample(self._agent_status(), self._adaptor_status())

    def _cpu(self) -> dict[str, float]:
        agent = self._agent_status()
        return {
            "adaptor": cpu_seconds([self._adaptor.pid]),
            "agent": cpu_seconds([agent["supervisor"], *agent["workers"]]),
        }

    def _fleet_line(self, name: str, line: str) -> None:
        try:
            self._published = int(json.loads(line)["published"])
        except (ValueError, LookupError, TypeError):
            self._view.note(name, line)


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])
