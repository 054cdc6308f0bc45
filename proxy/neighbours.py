"""What else runs in a pod and keeps the agent from serving it, or from steering to it.

Owns the names and ports by which sandboxes (gVisor, Kata) and service meshes are recognised, from
processes and listeners alone. What follows is the caller's business. Nothing is watched: each
call is one look.

Where the names come from: gVisor calls its processes `runsc-sandbox` and `runsc-gofer`
(runsc/sandbox/sandbox.go, runsc/container/container.go); with `sandbox_cgroup_only`, the only way
on cgroup v2, Kata's shim, virtual machine and virtiofsd are in the pod's cgroup
(docs/design/host-cgroups.md). Istio's sidecar is pilot-agent and envoy, its ports are in
istio.io/latest/docs/ops/deployment/application-requirements; in ambient mode ztunnel, a process
of the node, listens on them inside the pod (istio.io/latest/docs/ambient/architecture/
traffic-redirection). Linkerd's proxy and its ports 4140 and 4143: linkerd.io/2/reference/
proxy-configuration. Consul has consul-dataplane and Kuma kuma-dp beside envoy, which takes what
goes out on 15001.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from weir.proxy import listeners

_SANDBOXES = {
    "runsc": "gVisor",
    "runsc-sandbox": "gVisor",
    "runsc-gofer": "gVisor",
    "containerd-shim-kata-v2": "a virtual machine (Kata)",
    "cloud-hypervisor": "a virtual machine (Kata)",
    "firecracker": "a virtual machine (Kata)",
    "stratovirt": "a virtual machine (Kata)",
    "virtiofsd": "a virtual machine (Kata)",
}
_QEMU = "qemu-system-"  # and the machine's architecture
_MESH = {
    "pilot-agent": "Istio",
    "envoy": "Envoy",
    "linkerd2-proxy": "Linkerd",
    "linkerd2-proxy-identity": "Linkerd",
    "consul-dataplane": "Consul",
    "kuma-dp": "Kuma",
}
_MESH_PORTS = {
    15008: "Istio's ambient mode",
    15006: "Istio or Kuma",
    15001: "Istio, Kuma or Consul",
    4143: "Linkerd",
    4140: "Linkerd",
}
_LOOPBACK = ("127.0.0.1", "::1")  # which whoever takes everything in listens to, too


def sandbox(pids: Iterable[int]) -> str:
    """What the pod runs in, if not in this machine's own kernel, or ""."""
    for pid in pids:
        for name in sorted(_names(pid)):
            kind = _SANDBOXES.get(name) or (_SANDBOXES["virtiofsd"] if _QEMU in name else "")
            if kind:
                return f"{kind}: {name}, pid {pid}"
    return ""


def mesh(cgroup: Path, namespace: Path, user_port: int) -> str:
    """The service mesh that the pod's connections go through, or "". Raises OSError if the pod
    has ended."""
    for pid in listeners.pids_of(cgroup):
        for name in sorted(_names(pid) & _MESH.keys()):
            return f"{_MESH[name]}: {name}, pid {pid}"
    taken = listeners.listening(namespace, _MESH_PORTS.keys() - {user_port}, _LOOPBACK)
    for port in sorted(taken, reverse=True):
        return f"{_MESH_PORTS[port]}: port {port}"
    return ""


def _names(pid: int) -> set[str]:
    """What the process is called by its program and by whoever started it: gVisor starts itself as
    /proc/self/exe, and a wrapper may have renamed a proxy. A process that has ended has none."""
    names = set()
    with contextlib.suppress(OSError):  # of a kernel thread, or not for us to see
        names.add(os.readlink(f"/proc/{pid}/exe"))  # noqa: PTH115 - not a path of ours
    with contextlib.suppress(OSError):
        names.add(os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]))
    return {name.removesuffix(" (deleted)").rpartition("/")[2] for name in names}
