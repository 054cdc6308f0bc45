"""Single steps of an agent, for tests that want them one by one."""

from __future__ import annotations

from pathlib import Path

from tests.hold.rig import HoldPod
from weir.proxy import lease, netns


def ring_without_fences(pod: HoldPod) -> bytes:
    """The word hold answers with, while the kernel would reset what waits."""
    assert pod.process is not None
    sysctl = Path("/proc/sys/net/ipv4/tcp_migrate_req")
    namespace = f"/proc/{pod.process.pid}/ns/net"
    netns.run_in(namespace, lambda: sysctl.write_text("0"))
    process = lease.find([pod.process.pid])
    assert process is not None
    with lease.ring(process) as ours:
        ours.settimeout(20.0)
        return ours.recv(64)
