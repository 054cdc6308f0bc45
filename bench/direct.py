"""The direct path against no proxy: the same nginx in the same pod, user port and direct port.

Both go through the same veth pair. What is added is steering (once per connection) and counting
(twice per request): CPU of the whole machine per request, because it is spent in softirq.
"""

import contextlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench import load
from weir.local import enter
from weir.local.pod import LocalPod
from weir.proxy.contract import DIRECT_PORT
from weir.proxy.kernel import AttachedPod, Kernel, PodTarget

USER_PORT = 8080


def measure(seconds: float, rounds: int = 5) -> dict[str, float]:
    """Medians over `rounds` alternating pairs of `seconds` each, at 1 and 16 connections.

    Raises LocalPodError or KernelUnavailable where this machine can't do it.
    """
    found: dict[str, float] = {}
    with _pod() as (address, attached):
        for connections in (1, 16):
            plain: list[load.Load] = []
            direct: list[load.Load] = []
            for number in range(rounds):
                ports = ((USER_PORT, plain), (DIRECT_PORT, direct))
                for port, results in ports if number % 2 == 0 else reversed(ports):
                    before = attached.counters().started
                    one = load.wrk(f"http://{address}:{port}/", connections, seconds)
                    counted = attached.counters().started - before
                    # wrk drops the last request of each connection without telling
                    expected = one.requests if port == DIRECT_PORT else 0
                    if not expected <= counted <= expected + connections:
                        raise RuntimeError(f"{expected} requests on {port}, {counted} counted")
                    results.append(one)
            pairs = list(zip(plain, direct, strict=True))
            key = f"c{connections}"
            found |= {
                f"{key} no proxy, requests/s": _median(p.requests_per_second for p in plain),
                f"{key} direct, requests/s": _median(d.requests_per_second for d in direct),
                f"{key} direct / no proxy": _median(
                    d.requests_per_second / p.requests_per_second for p, d in pairs
                ),
                f"{key} no proxy, machine us/request": _median(p.machine_us for p in plain),
                f"{key} added by direct, us/request": _median(
                    d.machine_us - p.machine_us for p, d in pairs
                ),
                f"{key} no proxy, p50 us": _median(p.p50_us for p in plain),
                f"{key} direct, p50 us": _median(d.p50_us for d in direct),
            }
    return found


def _median(values: Iterator[float]) -> float:
    return statistics.median(values)


@contextlib.contextmanager
def _pod() -> Iterator[tuple[str, AttachedPod]]:
    """nginx in a pod of its own, attached and open."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as undo:
        configuration = load.nginx_configuration(Path(directory), USER_PORT)
        pod = LocalPod.make()
        undo.callback(pod.close)
        kernel = Kernel.load()
        undo.callback(kernel.close)
        attached = kernel.attach(
            PodTarget("bench", pod.netns, pod.cgroup, (pod.address,), USER_PORT, DIRECT_PORT)
        )
        server = subprocess.Popen(
            enter.command(
                [load.tool("nginx"), "-p", directory, "-c", str(configuration)],
                pod.netns,
                pod.cgroup,
            )
        )
        undo.callback(server.wait)
        undo.callback(server.terminate)
        deadline = time.monotonic() + 10
        while attached.steering() == "none":
            if time.monotonic() > deadline:
                raise RuntimeError("nginx did not listen within 10 s")
            time.sleep(0.01)
        attached.open_direct()
        yield pod.address, attached
