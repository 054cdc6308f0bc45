"""The direct path against no proxy: the same nginx in the same pod, user port and direct port.

`tc` is the direct path to a listener of MPTCP, which nginx has beside its plain one. The relay of
an agent and the real queue-proxy are measured in the same pod, each in rounds with no proxy, too.

All go through the same veth pair. What is added is steering (once per connection) and counting
(twice per request), in softirq on behalf of client or server: so it is in their CPU per request,
and on a quiet machine in that of the whole machine, too. Without a proxy nothing at all is attached
to the pod; `attached` is the user port of a pod that has everything attached, and finds that its
connections are not the ones to count: what the kernel's hooks themselves cost; `steered` is the
direct path without its counting. Other work of the machine disturbs a
single run by far more than what is measured: many short rounds in turn, and the median of what
differs within each. nginx and wrk have a CPU each, as the scheduler's choice of one or two of them
makes more of a difference than anything else. What the counting programs themselves take is
measured by the kernel, in runs of their own; that figure includes the two looks at the clock that
it takes, some 35 ns per program.
"""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench import load, sidecars
from bench.sidecars import ORIGINAL
from weir.local import enter
from weir.local.pod import LocalPod
from weir.proxy import listeners
from weir.proxy.contract import DATA_PORT, DIRECT_PORT
from weir.proxy.kernel import Kernel, PodTarget
from weir.proxy.wire.status import read_status

USER_PORT = 8080
MPTCP_PORT = 8081
# nginx takes the listeners that $NGINX names, as from its predecessor in an upgrade; and sockets
# belong to the cgroup of the process that makes them
LISTEN_AND_EXEC = """
import os, socket, sys
made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)  # IPPROTO_MPTCP
made.bind(("0.0.0.0", int(sys.argv[1])))
made.listen(4096)
made.set_inheritable(True)
os.environ["NGINX"] = f"{made.fileno()};"
os.execv(sys.argv[2], sys.argv[2:])
"""
CONNECTIONS = (1, 16, 64)
VARIANTS = ("no proxy", "attached", "steered", "direct", "tc")
CASES = (*((f"keep c{c}", c, ()) for c in CONNECTIONS), ("close c16", 16, ("Connection: close",)))
COUNTING = ("follow_in", "follow_out", "socket_event")
STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")


@dataclass(frozen=True)
class Run:
    """`us`: CPU of client and server per request, in which the kernel's work for both is done."""

    load: load.Load
    us: float


def measure(seconds: float, rounds: int = 9) -> dict[str, float]:
    """Medians over `rounds`, each of which takes every variant once, for `seconds`.

    Raises LocalPodError or KernelUnavailable where this machine can't do it, RuntimeError if a
    request was not counted.
    """
    found: dict[str, float] = {}
    with _pod() as (address, target, kernel):
        for what, connections, fields in CASES:
            drive = partial(_drive, address, connections, fields)
            results: dict[str, list[Run]] = {variant: [] for variant in VARIANTS}
            for number in range(rounds):
                for variant in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
                    results[variant].append(_run(kernel, target, variant, drive, seconds))
            for variant, runs in results.items():
                found |= _row(f"{what} {variant}", runs, results["no proxy"])
            found[f"{what} in counting programs, ns/request"] = _in_programs(
                kernel, target, drive, rounds
            )
        for name, started in (("relayed", _agent), (ORIGINAL, _queue_proxy)):
            try:
                with started(target) as pids:
                    found |= _proxied(name, address, target, pids, seconds, rounds)
            except load.Missing as missing:
                print(f"  {name} is not measured: {missing}", flush=True)
    return found


def _proxied(
    name: str, address: str, target: PodTarget, pids: list[int], seconds: float, rounds: int
) -> dict[str, float]:
    found: dict[str, float] = {}
    for what, connections, fields in CASES:
        drive = partial(_drive, address, connections, fields)
        runs: list[Run] = []
        without: list[Run] = []
        for _ in range(rounds):
            without.append(_timed(target, partial(drive, USER_PORT, seconds)))
            runs.append(_timed(target, partial(drive, DATA_PORT, seconds), pids))
        found |= _row(f"{what} {name}", runs, without)
    return found


def _row(name: str, runs: list[Run], without: list[Run]) -> dict[str, float]:
    pairs = list(zip(runs, without, strict=True))
    return {
        f"{name} | requests/s": _median(x.load.requests_per_second for x in runs),
        f"{name} | / no proxy": _median(
            x.load.requests_per_second / base.load.requests_per_second for x, base in pairs
        ),
        f"{name} | us/request": _median(x.us for x in runs),
        f"{name} | added us": _median(x.us - base.us for x, base in pairs),
        f"{name} | added machine us": _median(
            x.load.machine_us - base.load.machine_us for x, base in pairs
        ),
        f"{name} | p50 us": _median(x.load.p50_us for x in runs),
    }


def _drive(
    address: str, connections: int, fields: Sequence[str], port: int, seconds: float
) -> load.Load:
    return load.wrk(f"http://{address}:{port}/", connections, seconds, None, fields)


def _run(
    kernel: Kernel,
    target: PodTarget,
    variant: str,
    drive: Callable[[int, float], load.Load],
    seconds: float,
) -> Run:
    """With what `variant` needs attached meanwhile."""
    if variant == "no proxy":
        return _timed(target, partial(drive, USER_PORT, seconds))
    if variant == "tc":
        target = replace(target, user_port=MPTCP_PORT)
    pod = kernel.attach(target)
    try:
        pod.adopt_listeners()
        if pod.steering() != ("tc" if variant == "tc" else "sk_lookup"):
            raise RuntimeError(f"{variant}: steered by {pod.steering()}")
        pod.open_direct()
        if variant == "attached":
            return _timed(target, partial(drive, USER_PORT, seconds))
        if variant == "steered":
            for program in COUNTING:
                pod.links.pop(program).close()
            return _timed(target, partial(drive, DIRECT_PORT, seconds))
        done = _timed(target, partial(drive, DIRECT_PORT, seconds))
        counters = pod.counters()
        # wrk doesn't tell of requests that it cut off at its end: one per connection it had then
        if not 0 <= counters.started - done.load.requests <= counters.connections:
            raise RuntimeError(f"{done.load.requests} requests, {counters.started} counted")
        return done
    finally:
        pod.detach()


def _timed(target: PodTarget, run: Callable[[], load.Load], pids: Sequence[int] = ()) -> Run:
    before = _microseconds(target, pids)
    done = run()
    return Run(done, (_microseconds(target, pids) - before) / done.requests)


def _microseconds(target: PodTarget, pids: Sequence[int]) -> float:
    """CPU that all in the pod's cgroup, `pids` and the clients that have ended used so far."""
    clients = resource.getrusage(resource.RUSAGE_CHILDREN)
    server = (target.cgroup / "cpu.stat").read_text().split("usage_usec ")[1].split()[0]
    proxy = sum(map(sidecars.cpu_seconds, pids))
    return (clients.ru_utime + clients.ru_stime + proxy) * 1e6 + int(server)


def _in_programs(
    kernel: Kernel, target: PodTarget, drive: Callable[[int, float], load.Load], rounds: int
) -> float:
    """Nanoseconds per request in the counting programs: the median of the rounds."""
    was = STATISTICS.read_text()
    STATISTICS.write_text("1")
    try:
        rows = []
        for _ in range(rounds):
            before = _run_time(kernel)
            requests = _run(kernel, target, "direct", drive, 1.0).load.requests
            rows.append((_run_time(kernel) - before) / requests)
    finally:
        STATISTICS.write_text(was)
    return statistics.median(rows)


def _run_time(kernel: Kernel) -> int:
    """Nanoseconds that the counting programs have run so far."""
    total = 0
    for program in COUNTING:
        info = Path(f"/proc/self/fdinfo/{kernel.object.program_fd(program)}").read_text()
        total += int(info.split("run_time_ns:")[1].split()[0])
    return total


def _median(values: Iterator[float]) -> float:
    return statistics.median(values)


@contextlib.contextmanager
def _pod() -> Iterator[tuple[str, PodTarget, Kernel]]:
    """nginx in a pod of its own, and what can be attached to it."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as undo:
        configuration = load.nginx_configuration(Path(directory), USER_PORT, MPTCP_PORT)
        cpus = os.sched_getaffinity(0)
        undo.callback(os.sched_setaffinity, 0, cpus)
        pod = LocalPod.make()
        undo.callback(pod.close)
        kernel = Kernel.load()
        undo.callback(kernel.close)
        target = PodTarget("bench", pod.netns, pod.cgroup, (pod.address,), USER_PORT, DIRECT_PORT)
        os.sched_setaffinity(0, {min(cpus)})
        nginx = (load.tool("nginx"), "-p", directory, "-c", str(configuration))
        listening = (sys.executable, "-c", LISTEN_AND_EXEC, str(MPTCP_PORT), *nginx)
        server = subprocess.Popen(enter.command(listening, pod.netns, pod.cgroup))
        os.sched_setaffinity(0, {max(cpus)})
        undo.callback(server.wait)
        undo.callback(server.terminate)
        deadline = time.monotonic() + 10
        while not listeners.inodes(pod.netns, USER_PORT):
            if time.monotonic() > deadline:
                raise RuntimeError("nginx did not listen within 10 s")
            time.sleep(0.01)
        yield pod.address, target, kernel


@contextlib.contextmanager
def _agent(target: PodTarget) -> Iterator[list[int]]:
    """The agent as it is in the image, with this pod."""
    with tempfile.TemporaryDirectory() as name:
        pods, socket_ = Path(name, "pods.json"), Path(name, "agent.sock")
        pod = {"name": target.name, "userPort": target.user_port, "netns": str(target.netns)}
        pod |= {"cgroup": str(target.cgroup), "addresses": list(target.addresses)}
        pods.write_text(json.dumps({"pods": [pod]}))
        command = sidecars.agent_command("--pods", str(pods), "--status", str(socket_))
        with _running(command, lambda: bool(read_status(socket_)["pods"][0]["ready"])):
            status = read_status(socket_)
            yield [status["supervisor"], *status["workers"]]


@contextlib.contextmanager
def _queue_proxy(target: PodTarget) -> Iterator[list[int]]:
    """Within the pod's cgroup, whose CPU is counted."""
    environment = sidecars.environment(0, target.user_port)
    command = enter.command(sidecars.command(ORIGINAL), target.netns, target.cgroup)
    with _running(command, lambda: bool(listeners.inodes(target.netns, DATA_PORT)), environment):
        yield []


@contextlib.contextmanager
def _running(
    command: Sequence[str], up: Callable[[], bool], environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """On any CPU."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stderr=subprocess.DEVNULL
    )
    os.sched_setaffinity(0, cpus)
    try:
        deadline = time.monotonic() + sidecars.PATIENCE
        while True:
            with contextlib.suppress(OSError, ValueError):
                if up():
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} did not come up")
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.wait()
