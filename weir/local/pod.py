"""A pod on this machine: a network namespace, a veth pair and a cgroup, as on Kubernetes.

Owns their making and removal, and the sweep of what a killed run left behind. Needs root; without
it `weir run` starts the function as a plain process (`PlainProcess`).
"""

import contextlib
import ipaddress
import json
import os
import select
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from weir.proxy.cgroups import cgroup2_mount

PREFIX = "weir-"
NETNS_DIRECTORY = Path("/run/netns")
# carved into /30s; a range that overlaps an address or a route of this machine is passed over
NETWORKS = ipaddress.ip_network("10.201.0.0/16")


class LocalPodError(Exception):
    """Why no pod can be made here, in one line; the caller falls back to a plain process."""


@dataclass(frozen=True)
class LocalPod:
    """What was made: names, paths and the two ends' addresses. `close()` removes all of it."""

    name: str
    netns: Path
    cgroup: Path
    address: str
    host_address: str

    @classmethod
    def make(cls) -> "LocalPod":
        """Make a pod named after this process. Raises LocalPodError; leaves nothing behind then."""
        if os.geteuid() != 0:
            raise LocalPodError(
                "not root: run it with sudo for a pod of its own and the direct path"
            )
        if shutil.which("ip") is None:
            raise LocalPodError("the `ip` command is missing: apt-get install iproute2")
        mount = cgroup2_mount()
        if mount is None:
            raise LocalPodError(
                "no cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified"
            )
        sweep(mount)
        name = f"{PREFIX}{os.getpid()}"
        host, inside = _free_addresses()
        pod = cls(name, NETNS_DIRECTORY / name, mount / name, str(inside), str(host))
        try:
            pod._make(host, inside)
        except (OSError, subprocess.CalledProcessError) as e:
            pod.close()
            detail = e.stderr.strip() if isinstance(e, subprocess.CalledProcessError) else str(e)
            raise LocalPodError(f"can't make a network namespace and cgroup: {detail}") from e
        return pod

    def close(self) -> None:
        """End what still runs in the cgroup and remove everything. Idempotent."""
        _remove(self.name, self.cgroup)

    def _make(self, host: ipaddress.IPv4Address, inside: ipaddress.IPv4Address) -> None:
        self.cgroup.mkdir()
        outer = self.name.replace("-", "")
        for line in (
            f"netns add {self.name}",
            f"link add {outer} type veth peer name eth0 netns {self.name}",
            f"addr add {host}/30 dev {outer}",
            f"link set {outer} up",
            f"-n {self.name} addr add {inside}/30 dev eth0",
            f"-n {self.name} link set lo up",
            f"-n {self.name} link set eth0 up",
            f"-n {self.name} route add default via {host}",
        ):
            _ip(line)


def sweep(mount: Path) -> list[str]:
    """Remove pods whose `weir run` was killed before it could; returns their names."""
    names = {p.name for p in (*NETNS_DIRECTORY.glob(f"{PREFIX}*"), *mount.glob(f"{PREFIX}*"))}
    stale = []
    for name in sorted(names):
        owner = name.removeprefix(PREFIX)
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _remove(name, mount / name)
            stale.append(name)
    return stale


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


def _remove(name: str, cgroup: Path) -> None:
    with contextlib.suppress(OSError):
        (cgroup / "cgroup.kill").write_text("1")
    # the veth pair goes with the namespace, but only when its last process has: delete it first
    for line in (f"link del {name.replace('-', '')}", f"netns del {name}"):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            _ip(line)
    for _ in range(100):  # killed processes leave the cgroup a moment later
        try:
            for nested in sorted(cgroup.glob("**/"), reverse=True):
                nested.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            _wait_for_change(cgroup)
        else:
            return


def _wait_for_change(cgroup: Path) -> None:
    """Block until the kernel says that the cgroup's population changed, at most 50 ms."""
    with contextlib.suppress(OSError), (cgroup / "cgroup.events").open() as events:
        events.read()
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        poll.poll(50)


def _free_addresses() -> tuple[ipaddress.IPv4Address, ipaddress.IPv4Address]:
    """The two hosts of the first /30 that nothing on this machine uses or routes."""
    used = []
    for query in ("-j -4 addr show", "-j -4 route show table all"):
        out = subprocess.run(["ip", *query.split()], capture_output=True, text=True, check=False)
        for entry in json.loads(out.stdout or "[]"):
            for text in (
                entry.get("dst"),
                *(f"{a['local']}/{a['prefixlen']}" for a in entry.get("addr_info", ())),
            ):
                with contextlib.suppress(ValueError, TypeError):
                    used.append(ipaddress.ip_network(text, strict=False))
    for network in NETWORKS.subnets(new_prefix=30):
        if not any(network.overlaps(u) for u in used if u.prefixlen > 0 and u.version == 4):
            host, inside = list(network.hosts())[:2]
            assert isinstance(host, ipaddress.IPv4Address)
            assert isinstance(inside, ipaddress.IPv4Address)
            return host, inside
    raise LocalPodError(f"no free /30 in {NETWORKS}: every one overlaps a route of this machine")
