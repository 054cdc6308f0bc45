"""One pod in the node agent's supervisor: its kernel path, its listeners, what is known of it.

Owns the attachment of the pod, the opening and closing of its direct port and its status. What may
be steered is decided by proxy/policy/eligible.py; who accepts is the agent's business.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import asdict
from typing import Any

from weir.proxy import netns
from weir.proxy.direct import Offer
from weir.proxy.kernel import AttachedPod, Kernel, KernelUnavailable, PodTarget, Steering
from weir.proxy.pod import PodSpec
from weir.proxy.policy.deadlines import Timeouts
from weir.proxy.policy.eligible import DirectFacts, refusal

log = logging.getLogger("weir.agent")

# sums that go on growing over the death of a worker; gauges don't
_SUMS = ("requests", "integral")


class ServedPod:
    """One pod's state in the supervisor: kernel path, listeners, what its worker last said."""

    def __init__(self, spec: PodSpec, kernel: Kernel | None, no_kernel: str) -> None:
        self.spec = spec
        self.ready = False
        self.draining = False
        self.attached: AttachedPod | None = None
        self.no_kernel = no_kernel
        self.listeners: list[socket.socket] = []
        self.relayed: dict[str, Any] = {}
        self.offer: str | None = None
        self.refused = "not ready"
        self.steering: Steering = "none"
        self.restarts = 0
        self._earlier: dict[str, float] = dict.fromkeys(_SUMS, 0)
        if spec.netns is None or spec.cgroup is None:
            self.no_kernel = no_kernel or "a plain process without a network namespace of its own"
        elif kernel is not None:
            self._attach(kernel, spec.netns)

    def open(self) -> None:
        """Listen on the data port, inside the pod's netns. Raises OSError naming the address."""
        spec = self.spec
        try:
            self.listeners.append(netns.listen(spec.netns, spec.listen, spec.data_port))
        except OSError as e:
            raise OSError(e.errno, f"pod {spec.name}: data port: {e.strerror}") from None

    def decide(self) -> bool:
        """Open or close the direct port as the facts stand; True when the offer changed."""
        spec, settings = self.spec, self.spec.settings
        listener = self._steerable()  # first: it may find that the kernel can't
        self.refused = refusal(
            DirectFacts(
                container_concurrency=settings.container_concurrency,
                user_port=settings.user_port,
                direct_port=spec.direct_port,
                ready=self.ready,
                draining=self.draining,
                listener=listener,
                kernel=self.no_kernel,
            )
        )
        if (self.offer is None) == bool(self.refused):
            return False
        if self.refused:
            self.offer = None
            if self.attached is not None:
                self.attached.close_direct()
        elif self.attached is not None:
            self.attached.open_direct()
            self.offer = str(Offer(spec.direct_port, Timeouts.of(settings)))
        return True

    def worker_died(self) -> None:
        """Keep the sums of the dead worker; its in-flight requests are gone."""
        for name in _SUMS:
            self._earlier[name] += self.relayed.get(name, 0)
        self.relayed = {}
        self.ready = False
        self.restarts += 1

    def close(self) -> None:
        """Detach and stop listening. Idempotent."""
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()
        if self.attached is not None:
            self.attached.detach()
            self.attached = None

    def snapshot(self) -> dict[str, Any]:
        """What the status API and `weir run` show; times in seconds, `direct` from the kernel."""
        port = self.listeners[0].getsockname()[1] if self.listeners else self.spec.data_port
        direct: dict[str, Any] = {"open": not self.refused, "reason": self.refused}
        if self.attached is not None:
            counters = self.attached.counters()
            direct |= {k: v for k, v in asdict(counters).items() if k != "latency"}
            direct |= {
                "steering": self.steering,
                "p50": counters.quantile(0.5),
                "p99": counters.quantile(0.99),
            }
        relayed = dict(self.relayed)
        for name in _SUMS:
            relayed[name] = relayed.get(name, 0) + self._earlier[name]
        return {
            "name": self.spec.name,
            "addresses": list(self.spec.addresses),
            "data_port": port,
            "ready": self.ready,
            "draining": self.draining,
            "direct": direct,
            "relayed": relayed,
            "worker_restarts": self.restarts,
        }

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
            self.attached.adopt_listeners()
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

    def _relay_only(self, error: Exception) -> None:
        """Every doubt ends in the relay, for as long as this agent runs."""
        self.no_kernel = str(error)
        log.warning("pod %s is relayed only: %s", self.spec.name, error)
        if self.attached is not None:
            self.attached.detach()
            self.attached = None
