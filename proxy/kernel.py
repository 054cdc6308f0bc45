"""The direct path of pods: steering and counting in the kernel.

Owns the loaded object, what is attached to each pod, and the meaning of its maps. Refuses to
know when a pod may be called directly (the agent says so) and never reads a byte of traffic.

What is guaranteed: counting starts with the attachment and covers every connection accepted on
the direct port from then on; a snapshot of the counters is consistent; detaching leaves nothing
behind in the kernel. A connection that was open when the pod was detached is not counted again
after a new attachment.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from weir.bpf import OBJECT
from weir.bpf.btf import Btf, BtfError
from weir.bpf.libbpf import BpfError, BpfObject, LibbpfMissing, Link
from weir.bpf.maps import Map
from weir.proxy import listeners, netns
from weir.proxy.counters import PodCounters

__all__ = ["AttachedPod", "Kernel", "KernelUnavailable", "PodCounters", "PodTarget", "Steering"]

Steering = Literal["sk_lookup", "tc", "none"]

MINIMUM_KERNEL = (5, 17)  # bpf_loop
# in this order: before the program that opens connections, those that follow them
_CGROUP_PROGRAMS = ("follow_in", "follow_out", "peer_is_local4", "peer_is_local6", "socket_event")
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class KernelUnavailable(Exception):
    """The direct path can't be had here. str() is one line: why, and what to do about it."""


@dataclass(frozen=True)
class PodTarget:
    name: str
    netns: Path
    cgroup: Path
    addresses: tuple[str, ...]
    user_port: int
    direct_port: int
    interface: str = "eth0"


class Kernel:
    """One loaded object, which serves many pods."""

    def __init__(self, loaded: BpfObject, btf: Btf) -> None:
        def typed(name: str) -> Map:
            return Map(name, loaded.map_fd(name), btf.maps[name])

        self.object = loaded
        self.pods, self.addresses = typed("pods"), typed("addresses")
        self.listeners, self.meters = typed("listeners"), typed("meters")
        self.slots = btf.enum("listener_slot")["LISTENER_SLOTS"]
        self.lanes = min(btf.enum("meter_lane")["LANES"], _possible_cpus())
        self._attached: dict[int, AttachedPod] = {}
        self._closed = False

    @classmethod
    def load(cls, object_path: Path | None = None) -> Kernel:
        """Raises KernelUnavailable."""
        path = object_path or OBJECT
        _check_machine()
        if not path.exists():
            raise KernelUnavailable(f"{path} is not built: run `make bpf`")
        try:
            btf = Btf.of_object(path)
            return cls(BpfObject(path), btf)
        except LibbpfMissing as error:
            raise KernelUnavailable(
                f"libbpf.so.1 can't be loaded ({error}): install it (Debian package libbpf1)"
            ) from error
        except BtfError as error:
            raise KernelUnavailable(f"{error}: rebuild it with `make bpf`") from error
        except BpfError as error:
            raise KernelUnavailable(_explain(error)) from error

    def attach(self, target: PodTarget) -> AttachedPod:
        """Attached and counting, but not steering yet. Raises KernelUnavailable; nothing is
        left attached then."""
        try:
            cookie = netns.cookie(target.netns)
        except OSError as error:
            raise KernelUnavailable(f"pod {target.name}: {error}; is the pod running?") from error
        if cookie in self._attached:
            raise KernelUnavailable(
                f"pod {target.name}: {target.netns} is attached as pod "
                f"{self._attached[cookie].target.name}; detach that first"
            )
        pod = AttachedPod(self, target, cookie)
        self._attached[cookie] = pod
        try:
            pod._attach()
        except OSError as error:
            pod.detach()
            raise KernelUnavailable(f"pod {target.name}: {_explain(error)}") from error
        return pod

    def close(self) -> None:
        """Detach every pod and unload. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for pod in tuple(self._attached.values()):
            pod.detach()
        self.object.close()

    def _forget(self, cookie: int) -> None:
        self._attached.pop(cookie, None)

    def _make_way(self, newcomer: PodTarget, owner: int | None) -> None:
        """A new pod has the address of another one. Of a dead one: addresses are reused, so
        detach that. Of a living one: connections would reach the wrong pod, so refuse."""
        pod = self._attached.get(owner) if owner is not None else None
        if pod is None:
            return
        try:
            alive = netns.cookie(pod.target.netns) == owner
        except OSError:
            alive = False
        if alive:
            raise OSError(
                f"has an address of pod {pod.target.name} ({', '.join(newcomer.addresses)}); "
                "two pods of one node can't share one"
            )
        pod.detach()


class AttachedPod:
    """One pod under a Kernel. Made by Kernel.attach()."""

    def __init__(self, kernel: Kernel, target: PodTarget, cookie: int) -> None:
        self.target, self.cookie = target, cookie
        self._kernel = kernel
        self.links: dict[str, Link] = {}
        self._tc: Link | None = None
        self._mptcp_found = False
        self._last: PodCounters | None = None
        self._detached = False

    def open_direct(self) -> None:
        """Steer new connections to the direct port. Idempotent."""
        self._configure(enabled=True)

    def close_direct(self) -> None:
        """Refuse new connections (RST); established ones go on and stay counted. Idempotent."""
        self._configure(enabled=False)

    def adopt_listeners(self) -> int:
        """Listeners on the user port that were there before the attachment enter the map now;
        how many did. Sockets of the app are held only for the moment of the insertion."""
        known = {cookie for _, cookie in self._entries()}
        adopted = 0
        for listener in listeners.of_cgroup(
            self.target.cgroup, self.target.netns, self.target.user_port
        ):
            with listener:
                if listeners.is_mptcp(listener):
                    self._mptcp_found = True
                elif listeners.cookie(listener) not in known:
                    known.add(listeners.cookie(listener))
                    adopted += self._insert(listener)
        return adopted

    def steering(self) -> Steering:
        """What reaches the app's listener now. Attaches the tc variant when an MPTCP listener
        needs it, and takes it off when the app listens on plain TCP again. Raises
        KernelUnavailable when the pod's interface isn't there."""
        if any(True for _ in self._entries()):
            self._detach_tc()
            return "sk_lookup"
        if not self._mptcp_listens():
            return "none"
        if self._tc is None:
            self._tc = self._attach_tc()
        return "tc"

    def counters(self) -> PodCounters:
        """A consistent snapshot; after detach() the last one before it."""
        if self._detached and self._last is not None:
            return self._last
        meter = self._meter()
        if meter is None:
            raise RuntimeError(f"pod {self.target.name} is not attached")
        at = time.monotonic_ns()
        return PodCounters(
            started=meter["started"],
            finished=meter["finished"],
            aborted=meter["aborted"],
            in_flight=max(meter["in_flight"], 0),
            integral_ns=(meter["wsum"] + meter["in_flight"] * at) % (1 << 64),
            at_ns=at,
            connections=meter["connections"],
            open_connections=meter["connections"] - meter["closed"],
            upgraded=meter["upgraded"],
            http2=meter["http2"],
            crowded=meter["crowded"],
            over_budget=meter["over_budget"],
            malformed=meter["malformed"],
            out_of_order=meter["out_of_order"],
            framing_lost=meter["framing_lost"],
            listeners=meter["listeners"],
            mptcp_refused=meter["refused"],
            steered=meter["steered"],
            missed=meter["missed"],
            latency=meter["latency"],
        )

    def detach(self) -> None:
        """Steering and counting end, nothing stays in the kernel. Idempotent."""
        if self._detached:
            return
        kernel = self._kernel
        if self._meter() is not None:
            self._last = self.counters()
        self._detached = True
        self._detach_tc()
        while self.links:
            self.links.popitem()[1].close()
        for key, _ in tuple(self._entries()):
            kernel.listeners.delete(key)
        for address in self._addresses():
            if kernel.addresses.get(address) == self.cookie:
                kernel.addresses.delete(address)
        kernel.pods.delete(self.cookie)
        for lane in self._lanes():
            kernel.meters.delete(lane)
        kernel._forget(self.cookie)

    def _attach(self) -> None:
        kernel, target = self._kernel, self.target
        epoch = time.monotonic_ns()
        for lane in self._lanes():
            kernel.meters.put(lane, {"epoch": epoch})
        self._configure(enabled=False)
        for address in self._addresses():
            if not kernel.addresses.add(address, self.cookie):
                kernel._make_way(target, kernel.addresses.get(address))
                kernel.addresses.put(address, self.cookie)
        for program in _CGROUP_PROGRAMS:
            self.links[program] = kernel.object.attach_cgroup(program, target.cgroup)
        self.links["steer"] = kernel.object.attach_netns("steer", target.netns)

    def _configure(self, enabled: bool) -> None:
        if self._detached:
            return
        self._kernel.pods.put(
            self.cookie,
            {
                "user_port": self.target.user_port,
                "direct_port": self.target.direct_port,
                "enabled": int(enabled),
            },
        )

    def _addresses(self) -> Iterator[dict[str, tuple[int, ...]]]:
        for text in self.target.addresses:
            parsed = ip_address(text)
            raw = parsed.packed if parsed.version == 6 else b"\0" * 10 + b"\xff" * 2 + parsed.packed
            words = tuple(int.from_bytes(raw[i : i + 4], "little") for i in range(0, 16, 4))
            yield {"word": words}

    def _lanes(self) -> Iterator[dict[str, int]]:
        for lane in range(self._kernel.lanes):
            yield {"netns": self.cookie, "lane": lane}

    def _meter(self) -> dict[str, Any] | None:
        """The sums over the lanes, each read under its lock. Of a request that begins on one lane
        and ends on another between the two reads only the end may be seen: `in_flight` can be
        negative, and with it the integral is off by no more than those microseconds."""
        lanes: list[dict[str, Any]] = []
        for key in self._lanes():
            lane = self._kernel.meters.get(key, locked=True)
            if lane is None:
                return None
            lanes.append(lane)
        total: dict[str, Any] = {
            name: sum(lane[name] for lane in lanes) % (1 << 64)
            for name in lanes[0]
            if name not in ("lock", "epoch", "latency")
        }
        total["in_flight"] = (total["in_flight"] + (1 << 31)) % (1 << 32) - (1 << 31)
        total["latency"] = tuple(map(sum, zip(*(lane["latency"] for lane in lanes), strict=True)))
        return total

    def _key(self, family: int, slot: int) -> dict[str, int]:
        return {
            "netns": self.cookie,
            "port": self.target.user_port,
            "family": family,
            "slot": slot,
        }

    def _entries(self) -> Iterator[tuple[dict[str, int], int]]:
        """(key, socket cookie) of every listener that sk_lookup can reach."""
        for family in _FAMILIES:
            for slot in range(self._kernel.slots):
                key = self._key(family, slot)
                found = self._kernel.listeners.get(key)
                if found is not None:
                    yield key, found

    def _insert(self, listener: socket.socket) -> bool:
        return any(
            self._kernel.listeners.add(self._key(listener.family, slot), listener.fileno())
            for slot in range(self._kernel.slots)
        )

    def _mptcp_listens(self) -> bool:
        """MPTCP listeners can't be held in a map: there was one, and something listens now."""
        refused = self._mptcp_found
        if not refused:
            meter = self._meter()
            refused = meter is not None and meter["refused"] > 0
        return refused and bool(listeners.inodes(self.target.netns, self.target.user_port))

    def _attach_tc(self) -> Link:
        target = self.target

        def attach() -> Link:
            index = socket.if_nametoindex(target.interface)
            return self._kernel.object.attach_tc_ingress("steer_mptcp", index)

        try:
            return netns.run_in(target.netns, attach)
        except OSError as error:
            raise KernelUnavailable(
                f"pod {target.name}, interface {target.interface}: {_explain(error)}"
            ) from error

    def _detach_tc(self) -> None:
        link, self._tc = self._tc, None
        if link is None:
            return
        try:
            netns.run_in(self.target.netns, link.close)
        except FileNotFoundError:
            link.close()  # the namespace went away, and its interfaces with it


def kernel_version() -> tuple[int, ...]:
    """Major and minor number of the running kernel."""
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def _possible_cpus() -> int:
    """How many CPU numbers there may ever be here."""
    ranges = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(ranges.replace(",", "-").split("-")[-1]) + 1


def _check_machine() -> None:
    if platform.system() != "Linux":
        raise KernelUnavailable("eBPF needs Linux: everything is relayed here")
    if kernel_version() < MINIMUM_KERNEL:
        raise KernelUnavailable(
            f"Linux {os.uname().release} is too old: the direct path needs 5.17 or later, "
            "update the kernel"
        )
    effective = next(
        int(line.split()[1], 16)
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("CapEff:")
    )
    # CAP_SYS_ADMIN because of setns(); it includes what CAP_BPF and CAP_PERFMON allow
    for name, bit in (("CAP_SYS_ADMIN", _CAP_SYS_ADMIN), ("CAP_NET_ADMIN", _CAP_NET_ADMIN)):
        if not effective >> bit & 1:
            raise KernelUnavailable(f"no {name}: run as root to use the direct path")


def _explain(error: OSError) -> str:
    """One line. The verifier's reason is the last line of its log before the statistics."""
    said = [
        line
        for line in getattr(error, "log", [])
        if line and not line.startswith(("libbpf: ", "-- ", "processed ", ";"))
    ]
    if said:
        return f"{error}; the verifier said: {said[-1].strip()}; please report it"
    if isinstance(error, BpfError) and error.log:
        return f"{error}; {error.log[-1].strip()}"
    return str(error)
