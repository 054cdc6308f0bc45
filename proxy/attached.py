"""One pod's direct path: its links, its entries in the maps, its counters.

Owns what is attached to one pod and the meaning of its entries. Refuses to know when a pod may be
called directly (the agent says so) and how programs are loaded (proxy/kernel.py).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, NamedTuple

from weir.bpf.libbpf import Link, pinned, replace
from weir.bpf.loaded import Loaded
from weir.proxy import listeners, netns
from weir.proxy.counters import PodCounters
from weir.proxy.tables import LAST, Tables

Steering = Literal["sk_lookup", "tc", "none"]

# in this order: before the program that opens connections, those that follow them
CGROUP_PROGRAMS = ("follow_in", "follow_out", "peer_is_local4", "peer_is_local6", "socket_event")
TC = "steer_mptcp"
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Load(NamedTuple):
    """As in PodCounters."""

    started: int
    in_flight: int
    integral_ns: int


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


class AttachedPod:
    """One pod under a Kernel. Made by Kernel.attach()."""

    def __init__(
        self,
        tables: Tables,
        target: PodTarget,
        cookie: int,
        exclusive: Callable[[], AbstractContextManager[None]],
        forget: Callable[[int], None],
    ) -> None:
        self.target, self.cookie = target, cookie
        self.links: dict[str, Link] = {}
        self.tables = tables
        self._lanes = list(map(tables.meters.encoded, tables.meter_keys(cookie)))
        self._exclusive, self._forget = exclusive, forget
        self._mptcp_found = False
        self._last: PodCounters | None = None
        self._detached = False

    @property
    def earlier(self) -> bool:
        """Steered and counted by the programs of an earlier version, until the pod ends."""
        return self.tables.programs is None

    @property
    def opened(self) -> bool:
        """Is the direct port open, as it may be already when the pod is adopted?"""
        return not self._detached and self.tables.opened(self.cookie)

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
        needs it, and takes it off when the app listens on plain TCP again. Raises OSError when
        the pod's interface isn't there."""
        # without an address of that kind an IPv4 listener is of no use to anybody
        ipv4 = any("." in address for address in self.target.addresses)
        if any(ipv4 or key["family"] == socket.AF_INET6 for key, _ in self._entries()):
            self._detach_tc()
            return "sk_lookup"
        if not self._mptcp_listens():
            return "none"
        if TC not in self.links:
            if self.tables.programs is None:
                return "none"
            self._attach_tc(self.tables.programs)
        return "tc"

    def load(self) -> Load:
        """What is looked at all the time, cheaply. Raises RuntimeError after detach()."""
        meter = self._meter("started", "in_flight", "wsum")
        if meter is None:
            raise RuntimeError(f"pod {self.target.name} is not attached")
        integral = _integral(meter, time.monotonic_ns())
        return Load(meter["started"], max(meter["in_flight"], 0), integral)

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
            integral_ns=_integral(meter, at),
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

    def reset_overdue(self, seconds: float) -> int:
        """Reset the direct connections with a request that has been running for longer, by RST to
        the caller and an error to the app; how many. Tunnels, and what is not parsed, stay."""
        if self._detached:
            return 0
        find = self.tables.overdue.reset
        return netns.run_in(self.target.netns, lambda: find(self.target.direct_port, seconds))

    def detach(self) -> None:
        """Steering and counting end, nothing stays in the kernel. Idempotent."""
        if self._detached:
            return
        with self._exclusive():
            self._leave()
            while self.links:
                self._close(self.links.popitem()[1])
            self.tables.remove(self.cookie)

    def release(self) -> None:
        """The pod is somebody else's now: what is pinned goes on steering and counting, unless
        the pod has ended. What is not pinned ends here. Idempotent."""
        layout = self.tables.layout
        if self._detached:
            return
        with self._exclusive():
            if layout is not None and not layout.dead(self.cookie):
                self._leave()
                return
        self.detach()

    def attach(self, make_way: Callable[[PodTarget, int | None], None]) -> None:
        """Called by the Kernel, once. Adopts what is pinned and replaces its programs."""
        tables, target = self.tables, self.target
        layout = tables.layout
        adopted = tables.whole(self.cookie) and self._meter() is not None
        if layout is not None:
            if not adopted:
                tables.remove(self.cookie)
            layout.begin(self.cookie)
        if adopted and tables.programs is None:
            assert layout is not None
            self.links = {name: _Pinned(at) for name, at in layout.links(self.cookie).items()}
            return
        if not adopted:
            epoch = time.monotonic_ns()
            for lane in tables.meter_keys(self.cookie):
                tables.meters.put(lane, {"epoch": epoch})
        self._configure(enabled=adopted and self.opened)
        for address in self._addresses():
            if not tables.addresses.add(address, self.cookie):
                owner = tables.addresses.get(address)
                if owner != self.cookie:
                    make_way(target, owner)
                    tables.addresses.put(address, self.cookie)
        assert tables.programs is not None
        for program in CGROUP_PROGRAMS:
            self._link(program, lambda p, name: p.attach_cgroup(name, target.cgroup))
        if layout is not None and TC in layout.links(self.cookie):
            self._adopt(TC, layout.links(self.cookie)[TC], tables.programs)
        self._link(LAST, lambda p, name: p.attach_netns(name, target.netns))

    def _link(self, program: str, attach: Callable[[Loaded, str], Link]) -> None:
        programs, layout = self.tables.programs, self.tables.layout
        assert programs is not None
        if layout is None:
            self.links[program] = attach(programs, program)
            return
        path = layout.pod(self.cookie) / program
        if path.exists():
            self._adopt(program, path, programs)
            return
        link = attach(programs, program)
        try:
            if link.pins:
                link.pin(path)
        except OSError:
            link.close()
            raise
        if link.pins:
            link.close()  # only our descriptor: the pin keeps it attached
            link = _Pinned(path)
        self.links[program] = link

    def _adopt(self, program: str, path: Path, programs: Loaded) -> None:
        link = pinned(path)
        try:
            replace(link, programs.program_fd(program))
        finally:
            os.close(link)
        self.links[program] = _Pinned(path)

    def _leave(self) -> None:
        if self._meter() is not None:
            self._last = self.counters()
        self._detached = True
        self._forget(self.cookie)

    def _configure(self, enabled: bool) -> None:
        if self._detached:
            return
        self.tables.pods.put(
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

    def _meter(self, *names: str) -> dict[str, Any] | None:
        """The sums over the lanes, each read under its lock; of all fields, or of some. Of a
        request that begins on one lane and ends on another between the two reads only the end may
        be seen: `in_flight` can be negative, and with it the integral is off by no more than those
        microseconds."""
        lanes: list[dict[str, Any]] = []
        for key in self._lanes:
            lane = self.tables.meters.get(key, *names, locked=True)
            if lane is None:
                return None
            lanes.append(lane)
        total: dict[str, Any] = {
            name: sum(lane[name] for lane in lanes) % (1 << 64)
            for name in lanes[0]
            if name not in ("lock", "epoch", "latency")
        }
        if "in_flight" in total:
            total["in_flight"] = (total["in_flight"] + (1 << 31)) % (1 << 32) - (1 << 31)
        if "latency" in lanes[0]:
            both = zip(*(lane["latency"] for lane in lanes), strict=True)
            total["latency"] = tuple(map(sum, both))
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
            for slot in range(self.tables.slots):
                key = self._key(family, slot)
                found = self.tables.listeners.get(key)
                if found is not None:
                    yield key, found

    def _insert(self, listener: socket.socket) -> bool:
        return any(
            self.tables.listeners.add(self._key(listener.family, slot), listener.fileno())
            for slot in range(self.tables.slots)
        )

    def _mptcp_listens(self) -> bool:
        """MPTCP listeners can't be held in a map: there was one, and something listens now."""
        refused = self._mptcp_found
        if not refused:
            meter = self._meter("refused")
            refused = meter is not None and meter["refused"] > 0
        own = self.target.addresses
        loopback = {"::1" if ":" in address else "127.0.0.1" for address in own}
        port = (self.target.user_port,)
        return refused and bool(listeners.listening(self.target.netns, port, (*loopback, *own)))

    def _attach_tc(self, programs: Loaded) -> None:
        target = self.target

        def attach() -> None:
            index = socket.if_nametoindex(target.interface)
            self._link(TC, lambda p, name: p.attach_tc_ingress(name, index))

        try:
            netns.run_in(target.netns, attach)
        except OSError as error:
            raise OSError(error.errno, f"interface {target.interface}: {error.strerror}") from error

    def _detach_tc(self) -> None:
        if TC in self.links:
            self._close(self.links.pop(TC))

    def _close(self, link: Link) -> None:
        if link.pins:
            link.close()
            return
        try:  # clsact, which goes by the interface's number
            netns.run_in(self.target.netns, link.close)
        except FileNotFoundError:
            link.close()  # the namespace went away, and its interfaces with it


def _integral(meter: dict[str, Any], at: int) -> int:
    return int(meter["wsum"] + meter["in_flight"] * at) % (1 << 64)


class _Pinned(Link):
    """Attached as long as its pin is there."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = str(path)  # a Path is six times as large

    def close(self) -> None:
        Path(self._path).unlink(missing_ok=True)
