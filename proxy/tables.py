"""The maps of the kernel side, typed, and what all pods have in them.

Owns which entries belong to a pod, for whoever finds them. What they mean for a pod that is
attached is proxy/attached.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import IPv6Address
from pathlib import Path

from weir.bpf.btf import Btf
from weir.bpf.loaded import Loaded
from weir.bpf.maps import Map
from weir.proxy.overdue import Overdue
from weir.proxy.pins import Layout
from weir.proxy.places import Places

LAST = "steer"
"""The program that is attached last: a pod that has it is whole."""


class Tables:
    """The maps of one layout, with the types they were made with; `layout` None: not pinned.

    `programs` None: those of an earlier version, which stay as they are.
    """

    def __init__(
        self,
        fds: Mapping[str, int],
        btf: Btf,
        layout: Layout | None,
        programs: Loaded | None,
    ) -> None:
        def typed(name: str) -> Map:
            return Map(name, fds[name], btf.maps[name])

        self.pods, self.addresses = typed("pods"), typed("addresses")
        self.listeners, self.meters = typed("listeners"), typed("meters")
        self.places = Places(fds["places"], btf)
        self.overdue = Overdue(fds, btf, self.places)
        self.slots = btf.enum("listener_slot")["LISTENER_SLOTS"]
        self.lanes = min(btf.enum("meter_lane")["LANES"], _possible_cpus())
        self.layout, self.programs = layout, programs

    def meter_keys(self, cookie: int) -> Iterator[dict[str, int]]:
        for lane in range(self.lanes):
            yield {"netns": cookie, "lane": lane}

    def whole(self, cookie: int) -> bool:
        """Is everything of the pod pinned? Not so if its maker was killed in between."""
        return self.layout is not None and LAST in self.layout.links(cookie)

    def opened(self, cookie: int) -> bool:
        """Are new connections to its direct port steered?"""
        settings = self.pods.get(cookie)
        return settings is not None and bool(settings["enabled"])

    def shut(self, cookie: int) -> tuple[str, ...]:
        """Refuse new direct connections of a pod whoever has attached it; its addresses."""
        settings = self.pods.get(cookie)
        if settings is not None:
            self.pods.put(cookie, {**settings, "enabled": 0})
        found = (key["word"] for key, owner in self.addresses.items() if owner == cookie)
        raw = (b"".join(word.to_bytes(4, "little") for word in words) for words in found)
        return tuple(sorted(str(a.ipv4_mapped or a) for a in map(IPv6Address, raw)))

    def remove(self, cookie: int) -> None:
        """Everything of a pod, whatever is left of it: links first, its directory last."""
        if self.layout is not None:
            for path in self.layout.links(cookie).values():
                path.unlink(missing_ok=True)
        for key in [key for key in self.listeners.keys() if key["netns"] == cookie]:  # noqa: SIM118
            self.listeners.delete(key)
        for address in [key for key, owner in self.addresses.items() if owner == cookie]:
            self.addresses.delete(address)
        self.pods.delete(cookie)
        for lane in self.meter_keys(cookie):
            self.meters.delete(lane)
        self.places.clear(cookie)
        if self.layout is not None:
            self.layout.end(cookie)


def _possible_cpus() -> int:
    """How many CPU numbers there may ever be here."""
    ranges = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(ranges.replace(",", "-").split("-")[-1]) + 1
