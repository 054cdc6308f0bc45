"""What `weir top` shows: one row for each pod, from two looks at the agent's status.

Pure. Owns which numbers a row has, the rates between two looks and the order of the rows; who asks
the agent and how rows are drawn is proxy/topview.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

Pod = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Look:
    """The agent's status, and when it was read (any monotonic clock, in seconds)."""

    at: float
    status: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raises ValueError for the status of something else."""
        if not isinstance(self.status.get("pods"), list) or "supervisor" not in self.status:
            raise ValueError("this is not the status of a weir agent")


@dataclass(frozen=True, slots=True)
class Row:
    """One pod. None is unknown: a rate without an earlier look, or a path that counts nothing.

    Rates are per second between the two looks; latencies are of all requests since the counters
    began, in seconds, as are `aborted` (on both paths) and `restarts` of the pod's workers.
    """

    pod: str
    state: str
    direct: str
    """Empty while the direct port is open, else the reason why not."""
    direct_rate: float | None
    relayed_rate: float | None
    in_flight: int
    waiting: int
    direct_p50: float | None
    direct_p99: float | None
    relayed_p50: float | None
    relayed_p99: float | None
    aborted: int
    restarts: int


SORTS: dict[str, Callable[[Row], tuple[float, ...]]] = {
    "pod": lambda row: (),
    "direct": lambda row: (-(row.direct_rate or 0),),
    "relayed": lambda row: (-(row.relayed_rate or 0),),
    "in-flight": lambda row: (-row.in_flight,),
    "latency": lambda row: (-max(row.direct_p99 or 0, row.relayed_p99 or 0),),
    "aborted": lambda row: (-row.aborted,),
    "waiting": lambda row: (-row.waiting,),
    "restarts": lambda row: (-row.restarts,),
}
"""Largest first; what is equal stands by name."""


def rows(before: Look | None, now: Look, sort: str = "pod") -> list[Row]:
    """Every pod of `now`; one that `before` did not have has no rates yet."""
    earlier, seconds = {}, 0.0
    if before is not None:
        earlier = {pod["name"]: pod for pod in before.status["pods"]}
        seconds = now.at - before.at
    found = [_row(earlier.get(pod["name"]), pod, seconds) for pod in now.status["pods"]]
    return sorted(found, key=lambda row: (SORTS[sort](row), row.pod))


def record(before: Look | None, now: Look, sort: str = "pod") -> dict[str, Any]:
    """The same for machines."""
    return {
        "supervisor": now.status["supervisor"],
        "kernel": now.status.get("kernel", ""),
        "seconds": round(now.at - before.at, 3) if before is not None else None,
        "pods": [asdict(row) for row in rows(before, now, sort)],
    }


def _row(before: Pod | None, pod: Pod, seconds: float) -> Row:
    direct, relayed = pod["direct"], pod["relayed"]
    counted = bool(direct.get("finished"))
    return Row(
        pod=pod["name"],
        state=_state(pod),
        direct="" if direct["open"] else direct["reason"],
        direct_rate=_rate(before, pod, "direct", "started", seconds),
        relayed_rate=_rate(before, pod, "relayed", "requests", seconds),
        in_flight=int(direct.get("in_flight", 0) + relayed.get("in_flight", 0)),
        waiting=int(relayed.get("waiting", 0)),
        direct_p50=direct["p50"] if counted else None,
        direct_p99=direct["p99"] if counted else None,
        relayed_p50=relayed.get("p50") or None,  # 0 before the first response
        relayed_p99=relayed.get("p99") or None,
        aborted=int(direct.get("aborted", 0) + relayed.get("aborted", 0)),
        restarts=pod["worker_restarts"],
    )


def _state(pod: Pod) -> str:
    if pod["draining"]:
        return "draining"
    if pod["lease"] not in ("own", "held"):
        return "not held"  # by whom or why not is the reason next to it
    return "ready" if pod["ready"] else "not ready"


def _rate(before: Pod | None, pod: Pod, path: str, name: str, seconds: float) -> float | None:
    """None also when the count began anew (another agent, another attachment)."""
    now = pod[path].get(name)
    if before is None or now is None or seconds <= 0:
        return None
    grown = now - before[path].get(name, 0)
    return grown / seconds if grown >= 0 else None
