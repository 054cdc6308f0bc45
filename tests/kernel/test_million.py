"""Exactness at length: the kernel's count is the client's, over a million requests."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.pods import DIRECT_PORT, USER_PORT, Pod, needs_kernel, until
from weir.proxy.kernel import Kernel

_PATH = "/usr/sbin:/usr/bin:/usr/local/bin"
_NGINX, _H2LOAD = shutil.which("nginx", path=_PATH), shutil.which("h2load", path=_PATH)
pytestmark = [
    needs_kernel,
    pytest.mark.skipif(not _NGINX, reason="needs nginx (Debian package nginx-light)"),
    pytest.mark.skipif(not _H2LOAD, reason="needs h2load (Debian package nghttp2-client)"),
]
CONNECTIONS = 64
REQUESTS = 1_000_000


def test_the_count_is_the_clients(kernel: Kernel, pod: Pod, tmp_path: Path) -> None:
    """h2load, told to speak HTTP/1.1, asks exactly so often; nginx has a worker on each CPU."""
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; worker_processes 2; pid {tmp_path}/pid; error_log stderr crit;\n"
        "events { worker_connections 1024; }\n"
        "http { access_log off; keepalive_requests 1000000000;\n"
        f"  server {{ listen {USER_PORT}; location / {{ return 200 'hello'; }} }} }}\n"
    )
    attached = kernel.attach(pod.target())
    try:
        attached.open_direct()
        pod.run([str(_NGINX), "-p", str(tmp_path), "-c", str(config)])
        until(pod.listening)
        said = subprocess.run(
            [
                *(str(_H2LOAD), "--h1", f"-n{REQUESTS}", f"-c{CONNECTIONS}"),
                f"http://{pod.address}:{DIRECT_PORT}/",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        match = re.search(r"(\d+) done, (\d+) succeeded, (\d+) failed", said)
        assert match is not None, said
        done, succeeded, failed = map(int, match.groups())
        assert (done, succeeded, failed) == (REQUESTS, REQUESTS, 0), said
        until(lambda: attached.counters().open_connections == 0)
        counters = attached.counters()
        assert (counters.started, counters.finished) == (REQUESTS, REQUESTS)
        assert (counters.aborted, counters.in_flight) == (0, 0)
        assert sum(counters.latency) == REQUESTS
        assert counters.connections == CONNECTIONS
    finally:
        attached.detach()
