"""When a pod that is told to stop has drained (contract section 6), without a clock or a socket.

Owns the phases and the times between them. What is refused, closed or answered in which phase is
decided by whoever serves the pod.
"""

from __future__ import annotations

from enum import Enum
from math import inf

from weir.proxy import contract


class Phase(Enum):
    SERVING = "serving"
    DRAINING = "draining"
    DRAINED = "drained"


class Drain:
    """`terminate` on SIGTERM, `hook` when the kubelet's preStop hook asks; then `look` when `due`.

    Times are seconds of any monotonic clock. `grace` is the pod's termination grace period: in it,
    requests in flight hold the end of the drain, so that the user container is not stopped under
    them (docs/deviations.md), but leave it SHUTDOWN_MARGIN_SECONDS for an end of its own.
    """

    def __init__(self, grace: float, quiet: float = contract.QUIET_SECONDS) -> None:
        self.phase = Phase.SERVING
        self._grace = grace
        self._quiet = quiet
        self._since = inf
        self._cancel_at = inf
        self._terminated_at = inf

    @property
    def terminating(self) -> bool:
        return self._terminated_at < inf

    def terminate(self, now: float) -> None:
        """SIGTERM: the pod goes, whatever else is asked."""
        if not self.terminating:
            self._terminated_at = now
            self._cancel_at = inf
            self._begin(now)

    def hook(self, now: float) -> None:
        """The preStop hook: without a SIGTERM within a second only the user container restarts."""
        if self.phase is not Phase.DRAINED:
            self._begin(now)
            if not self.terminating:
                self._cancel_at = min(self._cancel_at, now + contract.RESTART_SECONDS)

    def due(self, last_arrival: float) -> float:
        """When to look again at the earliest; inf unless draining."""
        if self.phase is not Phase.DRAINING:
            return inf
        return min(self._cancel_at, self._quiet_at(last_arrival))

    def look(self, now: float, last_arrival: float, in_flight: int) -> Phase:
        """The phase by now. `last_arrival` of a request that is no probe, -inf for none."""
        if self.phase is Phase.DRAINING:
            if now >= self._cancel_at:
                self.phase = Phase.SERVING
                self._cancel_at = self._since = inf
            elif now >= self._quiet_at(last_arrival) and not (in_flight and self._may_hold(now)):
                self.phase = Phase.DRAINED
        return self.phase

    def _begin(self, now: float) -> None:
        if self.phase is Phase.SERVING:
            self.phase = Phase.DRAINING
            self._since = now

    def _quiet_at(self, last_arrival: float) -> float:
        return max(self._since, last_arrival) + self._quiet

    def _may_hold(self, now: float) -> bool:
        return now < self._terminated_at + self._grace - contract.SHUTDOWN_MARGIN_SECONDS
