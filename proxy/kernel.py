"""The direct path of pods: steering and counting in the kernel.

Owns the loaded object and which pods are attached. Refuses to know when a pod may be called
directly (the agent says so) and never reads a byte of traffic.

What is guaranteed: counting starts with the attachment and covers every connection accepted on
the direct port from then on; a snapshot of the counters is consistent; detaching leaves nothing
behind in the kernel. A connection that was open when the pod was detached is not counted again
after a new attachment. With pins, steering and counting go on without this process, and the next
one that loads adopts them (docs/decisions/027).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from weir.bpf import OBJECT
from weir.bpf.btf import Btf, BtfError
from weir.bpf.doorbell import Doorbell
from weir.bpf.libbpf import BpfError, LibbpfMissing, map_btf
from weir.bpf.loaded import BpfObject, Loaded
from weir.proxy import netns, pins
from weir.proxy.attached import AttachedPod, KernelUnavailable, PodTarget, Steering
from weir.proxy.counters import PodCounters
from weir.proxy.tables import Tables

__all__ = ["AttachedPod", "Kernel", "KernelUnavailable", "PodCounters", "PodTarget", "Steering"]

log = logging.getLogger("weir.kernel")

MINIMUM_KERNEL = (5, 17)  # bpf_loop
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21
Loader = Literal["libbpf", "bcc"]
MAPS = ("pods", "addresses", "listeners", "meters", "connections", "places", "open_streams", "bell")


class Kernel:
    """One loaded object, which serves many pods."""

    def __init__(
        self,
        loaded: Loaded,
        btf: Btf,
        root: Path | None = None,
        layout: pins.Layout | None = None,
        earlier: tuple[pins.Layout, ...] = (),
    ) -> None:
        self.object = loaded
        self.tables = Tables({name: loaded.map_fd(name) for name in MAPS}, btf, layout, loaded)
        self.pods, self.addresses = self.tables.pods, self.tables.addresses
        self.listeners, self.meters = self.tables.listeners, self.tables.meters
        self._root = root
        self._claims = None if root is None else pins.Claims(root)
        self.bell = Doorbell(loaded.map_fd("bell"), btf.map_settings("bell")["max_entries"])
        """Rings with the `cookie` of an attached pod when something begins to listen there."""
        self._abandoned: set[int] = set()
        self._fds: list[int] = []
        self._earlier = [tables for each in earlier if (tables := self._read(each)) is not None]
        self._attached: dict[int, AttachedPod] = {}
        self._closed = self._inside = False

    @classmethod
    def load(
        cls,
        object_path: Path | None = None,
        root: Path | None = None,
        loader: Loader = "libbpf",
    ) -> Kernel:
        """`root`: a directory of a bpffs where all is pinned, so that it outlives this process
        and is found there by the next; where that can't be had, the log says why.

        Raises KernelUnavailable."""
        _check_machine()
        make: Callable[[Mapping[str, int]], Loaded]
        try:
            if loader == "bcc":
                btf, make = _compiled_here()
            else:
                path = object_path or OBJECT
                if not path.exists():
                    raise KernelUnavailable(f"{path} is not built: run `make bpf`")
                btf, make = Btf.of_object(path), partial(BpfObject, path)
            if root is not None:
                try:
                    return cls._load_pinned(make, btf, root)
                except pins.PinsUnavailable as error:
                    log.warning("nothing is pinned: %s", error)
            return cls(make({}), btf)
        except LibbpfMissing as error:
            raise KernelUnavailable(
                f"libbpf.so.1 can't be loaded ({error}): install it (Debian package libbpf1)"
            ) from error
        except BtfError as error:
            raise KernelUnavailable(f"{error}: rebuild it with `make bpf`") from error
        except BpfError as error:
            raise KernelUnavailable(_explain(error)) from error

    @classmethod
    def _load_pinned(
        cls, make: Callable[[Mapping[str, int]], Loaded], btf: Btf, root: Path
    ) -> Kernel:
        with pins.opened(root), contextlib.ExitStack() as undo:
            layout = pins.layout(root, btf.fingerprint())
            undo.callback(layout.close)
            fds = layout.map_fds()
            for fd in fds.values():
                undo.callback(os.close, fd)
            if fds.keys() != set(MAPS):  # its maker was killed in between: no pod uses them yet
                for name in fds:
                    (layout.maps / name).unlink()
                fds = {}
            loaded = make(fds)
            undo.callback(loaded.close)
            if not fds:
                for name in MAPS:
                    loaded.pin_map(name, layout.maps / name)
            earlier = tuple(pins.others(root, layout.name))
            kernel = cls(loaded, btf, root, layout, earlier)
            undo.pop_all()
            for fd in fds.values():  # the object has descriptors of its own
                os.close(fd)
        kernel.sweep()
        return kernel

    def attach(self, target: PodTarget) -> AttachedPod:
        """Attached and counting, but not steering yet; or adopted as it was pinned. Raises
        KernelUnavailable; nothing is left attached then."""
        try:
            cookie = netns.cookie(target.netns)
        except OSError as error:
            raise KernelUnavailable(f"pod {target.name}: {error}; is the pod running?") from error
        if cookie in self._attached:
            raise KernelUnavailable(
                f"pod {target.name}: {target.netns} is attached as pod "
                f"{self._attached[cookie].target.name}; detach that first"
            )
        self.sweep()
        whole = (tables for tables in self._earlier if tables.whole(cookie))
        tables = next(whole, self.tables)
        pod = AttachedPod(tables, target, cookie, self._exclusive, self._forget)
        self._attached[cookie] = pod
        try:
            with self._exclusive():
                if self._claims is not None:
                    self._claims.take(cookie)
                pod.attach(self._make_way)
        except OSError as error:
            pod.detach()
            raise KernelUnavailable(f"pod {target.name}: {_explain(error)}") from error
        return pod

    def sweep(self) -> int:
        """Remove what is pinned of pods that have ended, or were attached halfway by an agent
        that was killed; of how many."""
        removed = 0
        with self._exclusive():
            for tables in (self.tables, *self._earlier):
                if tables.layout is None:
                    continue
                for cookie in tables.layout.pods():
                    if cookie in self._attached:
                        continue
                    if not tables.whole(cookie) or tables.layout.dead(cookie):
                        tables.remove(cookie)
                        removed += 1
        return removed

    def close_abandoned(self) -> None:
        """Close the direct ports of pods that live and that no agent has in its hands: nobody would
        close them when the pod drains. To be called now and then: a pod is closed if that is so at
        two looks in a row, since between two agents it is nobody's for a moment."""
        found: set[int] = set()
        with self._exclusive():
            for tables in (self.tables, *self._earlier):
                if tables.layout is None or self._claims is None:
                    continue
                for cookie in tables.layout.pods():
                    if (
                        cookie in self._attached
                        or self._claims.of_another(cookie)
                        or not tables.opened(cookie)
                    ):
                        continue
                    if cookie not in self._abandoned:
                        found.add(cookie)
                        continue
                    log.warning(
                        "no agent claims the pod with %s (network namespace %d): its direct port "
                        "is closed, connections that are open go on",
                        " and ".join(tables.shut(cookie)) or "no address",
                        cookie,
                    )
        self._abandoned = found

    def close(self) -> None:
        """Unload. Pods that are pinned stay as they are, all others are detached. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for pod in tuple(self._attached.values()):
            pod.release()
        self.sweep()
        with self._exclusive():
            for tables in (self.tables, *self._earlier):
                if tables.layout is not None:
                    tables.layout.close(remove_unused=True)
        for fd in self._fds:
            os.close(fd)
        if self._claims is not None:
            self._claims.close()
        self.bell.close()
        self.object.close()

    def _read(self, layout: pins.Layout) -> Tables | None:
        """The maps of an earlier version, by the types that they were made with."""
        if not layout.pods():
            layout.close(remove_unused=True)
            return None
        fds: dict[str, int] = {}
        try:
            fds = layout.map_fds()
            tables = Tables(fds, Btf(map_btf(fds["pods"]), str(layout.path)), layout, None)
        except (BpfError, BtfError, KeyError) as error:
            log.warning("%s can't be read, its pods are attached anew: %s", layout.path, error)
            for fd in fds.values():
                os.close(fd)
            layout.close()
            return None
        self._fds += fds.values()
        return tables

    def _forget(self, cookie: int) -> None:
        self._attached.pop(cookie, None)
        if self._claims is not None:
            self._claims.drop(cookie)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Two agents side by side don't make and remove the same things at once. Reentrant."""
        if self._root is None or self._inside:
            yield
            return
        with pins.opened(self._root):
            self._inside = True
            try:
                yield
            finally:
                self._inside = False

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


def kernel_version() -> tuple[int, ...]:
    """Major and minor number of the running kernel."""
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def _compiled_here() -> tuple[Btf, Callable[[Mapping[str, int]], Loaded]]:
    from weir.bpf import bcc  # and what it takes: 2 MB that the other loader needs not

    try:
        compiled = bcc.compile_here()
    except bcc.BccMissing as error:
        raise KernelUnavailable(f"--loader bcc: {error}") from error
    return compiled.btf, partial(bcc.BccObject, compiled)


def _check_machine() -> None:
    if os.uname().sysname != "Linux":
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
