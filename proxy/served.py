"""One pod in the node agent's supervisor: its kernel path, its listeners, what is known of it.

Owns the attachment of the pod, the opening and closing of its direct port and its status. What may
be steered is decided by proxy/policy/eligible.py; who accepts is the agent's business.
"""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import asdict, replace
from typing import Any

from weir.proxy import neighbours, netns
from weir.proxy.certificates import Pair
from weir.proxy.counters import ColdStarts, Direct, PodCounters, Relayed
from weir.proxy.holds import Hold
from weir.proxy.kernel import AttachedPod, Kernel, KernelUnavailable, PodTarget, Steering
from weir.proxy.pod import PodSpec
from weir.proxy.policy.deadlines import Timeouts
from weir.proxy.policy.eligible import DirectFacts, refusal
from weir.proxy.policy.offer import Offer

log = logging.getLogger("weir.agent")

# for which a pod that was found open may stay so until its readiness is known
ADOPTION_SECONDS = 10.0
# a direct request is reset so long after its deadline, which its caller should have kept
OVERDUE_SECONDS = 60.0
# a hold that was lent so long after its start at most was nobody's before: its grace is half of it
FRESH_SECONDS = 1.0
LOOK_SECONDS = 10.0
# between two looks at the kernel's counters of a pod that had nothing to count
IDLE_LOOK_SECONDS = 4.0
# between two looks for a service mesh, which may take a pod in at any time
MESH_LOOK_SECONDS = 60.0
_PLAIN = "a plain process without a network namespace of its own"
_TLS = "system-internal TLS is on: nothing but the relay can decrypt"


class ServedPod:
    """One pod's state in the supervisor: kernel path, listeners, what its workers last said."""

    def __init__(
        self,
        spec: PodSpec,
        kernel: Kernel | None,
        no_kernel: str,
        cold_starts: ColdStarts | None = None,
    ) -> None:
        self.spec = spec
        self.ready = False
        self.draining = False
        self.attached: AttachedPod | None = None
        self.no_kernel = no_kernel
        self._kernel_word = "kernel"
        self.listeners: dict[str, list[socket.socket]] = {}
        self.lease = "looking for hold" if spec.borrowed else ""
        """What keeps a borrowed pod from being served by this agent; empty while it is."""
        self.unheld = "looking"
        """That in a word: looking, rung or left_to_sidecar."""
        self.environment: dict[str, str] | None = None
        self.certificate: Pair | None = None
        self.age = 0.0
        self.relayed = Relayed()
        self.direct = Direct()
        self.cold_start: float | None = None
        """Seconds from the start of the hold to the first time the pod was ready, where known."""
        self._cold_starts = cold_starts
        self._started: float | None = None
        self.offer: str | None = None
        self.refused_word, self.refused = "not_ready", "not ready"
        if spec.borrowed:
            self.refused_word, self.refused = "not_held", self.lease
        self.steering: Steering = "none"
        self.restarts = 0
        self._kernel = kernel
        self._unable = no_kernel
        self.overdue = 0
        self._adopted = 0.0
        self._look = 0.0
        self._mesh, self._mesh_look, self._was_ready = "", 0.0, False
        self._before: tuple[float, int, int] | None = None
        self._idle = False
        self._look_at = 0.0
        if not spec.borrowed:
            self.attach()

    def open(self) -> None:
        """Listen on the data port, inside the pod's netns. Raises OSError naming the address."""
        spec = self.spec
        try:
            listener = netns.listen(spec.netns, spec.listen, spec.data_port)
        except OSError as e:
            raise OSError(e.errno, f"pod {spec.name}: data port: {e.strerror}") from None
        self.listeners = {"data": [listener]}

    def describe(self, hold: Hold) -> None:
        """A borrowed pod is what its hold says it is."""
        self.spec = replace(
            self.spec,
            settings=hold.settings.revision,
            netns=hold.netns,
            addresses=self.spec.addresses or hold.addresses,
            data_port=hold.settings.data_port,
        )
        self.environment = hold.environment
        self.certificate = hold.certificate
        self.age = hold.age
        self._started = time.monotonic() - hold.age

    def attach(self) -> None:
        """Count and, once `decide` opens the direct port, steer. What is in the way is a reason."""
        spec = self.spec
        if self._started is not None and time.monotonic() - self._started > FRESH_SECONDS:
            self._started = None  # others may have found it ready before
        self._kernel_word, self.no_kernel = "kernel", self._unable
        if spec.netns is None or spec.cgroup is None:
            if not self._unable and spec.borrowed:
                self._kernel_word, self.no_kernel = "no_cgroup", "its cgroup is not given"
            elif not self._unable:
                self._kernel_word, self.no_kernel = "no_namespace", _PLAIN
        elif self.certificate is not None:
            self._kernel_word, self.no_kernel = "tls", _TLS
        elif self._kernel is not None:
            self._attach(self._kernel, spec.netns)

    def let_go(self) -> None:
        """Another will serve it: nothing of it stays open or attached here. Idempotent."""
        self.ready = False
        self._stop_listening()
        self._release()
        self.spec = replace(self.spec, netns=None)
        self.decide()

    def decide(self) -> bool:
        """Open or close the direct port as the facts stand; True when the offer changed."""
        spec, settings = self.spec, self.spec.settings
        listener = self._steerable()  # first: it may find that the kernel can't
        self.refused_word, self.refused = refusal(
            DirectFacts(
                container_concurrency=settings.container_concurrency,
                user_port=settings.user_port,
                direct_port=spec.direct_port,
                ready=self.ready,
                draining=self.draining,
                listener=listener,
                kernel=self.lease or self.no_kernel,
                kernel_word="not_held" if self.lease else self._kernel_word,
                mesh=self._find_mesh(),
            )
        )
        if self._adopted and (self.ready or self.draining or time.monotonic() >= self._adopted):
            self._adopted = 0.0
            if self.refused and self.attached is not None:
                self.attached.close_direct()
        if (self.offer is None) == bool(self.refused):
            return False
        if self.refused:
            self.offer = None
            if self.lease:  # it may be another's already: what is in the kernel is not ours
                self._release()
            elif self.attached is not None:
                self.attached.close_direct()
        elif self.attached is not None:
            self.attached.open_direct()
            self.offer = str(Offer(spec.direct_port, Timeouts.of(settings)))
        return True

    def found(self, ready: bool) -> None:
        """What its worker found out."""
        self.ready = ready
        if ready and self._started is not None and self.cold_start is None:
            self.cold_start = time.monotonic() - self._started
            if self._cold_starts is not None:
                self._cold_starts.record(self.cold_start)

    def worker_died(self, tenancy: str) -> None:
        """Keep the sums of the dead worker; its in-flight requests are gone."""
        self.tenancy_ended(tenancy)
        self.ready = False
        self.restarts += 1

    def tenancy_ended(self, tenancy: str) -> None:
        """Its counters grow no more."""
        self.relayed.ended(tenancy)

    def direct_load(self, now: float) -> tuple[float, float, int] | None:
        """Average concurrency and requests a second since the last look, and how many are in
        flight; None if that is nothing, again. An idle pod is looked at now and then only."""
        if self.attached is None or now < self._look_at:
            return None
        seen = self.attached.load()
        before, self._before = self._before, (now, seen.started, seen.integral_ns)
        if before is None or now <= before[0]:
            return None
        seconds = now - before[0]
        grown = (seen.integral_ns - before[2]) % (1 << 64)
        load = grown / 1e9 / seconds, (seen.started - before[1]) / seconds, seen.in_flight
        was_idle, self._idle = self._idle, not any(load)
        if self._idle and was_idle:
            self._look_at = now + IDLE_LOOK_SECONDS
            return None
        return load

    def backstop(self, now: float) -> None:
        """Reset direct requests that a caller has forgotten. To be called every second."""
        timeout = self.spec.settings.timeout
        if self._idle or self.attached is None or self.lease or not timeout or now < self._look:
            return
        self._look = now + LOOK_SECONDS
        if not self.direct_in_flight():
            return
        try:
            reset = self.attached.reset_overdue(timeout + OVERDUE_SECONDS)
        except OSError as e:  # the pod may be ending
            log.warning("pod %s: can't look for overdue requests: %s", self.spec.name, e)
            return
        if reset:
            log.warning("pod %s: reset %d overdue direct requests", self.spec.name, reset)
        self.overdue += reset

    def direct_in_flight(self) -> int:
        return self.attached.load().in_flight if self.attached is not None else 0

    def close(self) -> None:
        """Detach and stop listening. Idempotent."""
        self._stop_listening()
        if self.attached is not None:
            self.attached.detach()
            self.attached = None

    @property
    def lease_state(self) -> str:
        """In a word: own, held, draining, or what `unheld` says."""
        if not self.spec.borrowed:
            return "own"
        if self.lease:
            return self.unheld
        return "draining" if self.draining else "held"

    def counted(self) -> PodCounters | None:
        """What came directly while this agent has the pod; after its attachment as it was then."""
        if self.attached is not None:
            try:
                self.direct.look(self.attached.counters())
            except (RuntimeError, OSError) as e:  # the pod has ended, and another agent swept it
                log.debug("pod %s: its counters can't be read: %s", self.spec.name, e)
        return self.direct.last

    def told(self) -> dict[str, Any] | None:
        """What came directly, for the pod's own metrics; None if there are none, or it can't."""
        counted = self.counted() if "metrics" in self.listeners else None
        return None if counted is None else counted.told()

    def snapshot(self) -> dict[str, Any]:
        """What the status API and `weir run` show; times in seconds, `direct` from the kernel."""
        data = self.listeners.get("data")
        port = data[0].getsockname()[1] if data else self.spec.data_port
        direct: dict[str, Any] = {"open": not self.refused, "reason": self.refused}
        counters = self.counted()
        if self.attached is not None and counters is not None:
            direct |= {k: v for k, v in asdict(counters).items() if k != "latency"}
            direct |= {
                "steering": self.steering,
                "overdue": self.overdue,
                "p50": counters.quantile(0.5),
                "p99": counters.quantile(0.99),
            }
        return {
            "name": self.spec.name,
            "addresses": list(self.spec.addresses),
            "data_port": port,
            "lease": (self.lease or "held") if self.spec.borrowed else "own",
            "cold_start": self.cold_start,
            "ready": self.ready,
            "draining": self.draining,
            "direct": direct,
            "relayed": self.relayed.totals(),
            "worker_restarts": self.restarts,
        }

    def _stop_listening(self) -> None:
        for listeners in self.listeners.values():
            for listener in listeners:
                listener.close()
        self.listeners = {}
        self._before = None

    def _release(self) -> None:
        """What is pinned goes on, for the next agent to adopt."""
        if self.attached is not None:
            self.attached.release()
            self.counted()
            self.attached = None

    def _attach(self, kernel: Kernel, namespace: Any) -> None:
        spec = self.spec
        assert spec.cgroup is not None
        try:
            self.attached = kernel.attach(
                PodTarget(
                    name=spec.name,
                    netns=namespace,
                    cgroup=spec.cgroup,
                    addresses=spec.addresses,
                    user_port=spec.settings.user_port,
                    direct_port=spec.direct_port,
                    interface=spec.interface,
                )
            )
            self._adopted = 0.0
            if self.attached.opened:
                self._adopted = time.monotonic() + ADOPTION_SECONDS
                self._started = None  # somebody has found it ready
            self.attached.adopt_listeners()
            self.counted()
        except (KernelUnavailable, OSError) as e:
            self._relay_only(e)

    def _steerable(self) -> bool:
        self.steering = "none"
        try:
            if self.attached is not None:
                self.steering = self.attached.steering()
        except (KernelUnavailable, OSError) as e:
            self._relay_only(e)
        return self.steering != "none"

    def _find_mesh(self) -> str:
        """Looked for after the attachment, when the pod becomes ready, and now and then."""
        spec, now = self.spec, time.monotonic()
        became_ready = self.ready and not self._was_ready
        self._was_ready = self.ready
        if self.attached is None or spec.cgroup is None or spec.netns is None:
            self._mesh, self._mesh_look = "", 0.0
        elif became_ready or now >= self._mesh_look:
            self._mesh_look = now + MESH_LOOK_SECONDS
            try:
                self._mesh = neighbours.mesh(spec.cgroup, spec.netns, spec.settings.user_port)
            except OSError as e:  # the pod may be ending
                log.warning("pod %s: can't look for a service mesh: %s", spec.name, e)
        return self._mesh

    def _relay_only(self, error: Exception) -> None:
        """Every doubt ends in the relay, for as long as this agent runs."""
        self._kernel_word, self.no_kernel = "attachment", str(error)
        log.warning("pod %s is relayed only: %s", self.spec.name, error)
        if self.attached is not None:
            self.attached.detach()
            self.counted()
            self.attached = None
