"""What was counted for one pod, in the kernel and by relay workers: values, and what adds them up.

Pure. How the kernel's numbers come about is bpf/meter.h; who reads them is weir.proxy.kernel. What
a worker says is taken for no more than it is: it reads all traffic of its pods.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeGuard

from weir.proxy.policy.histogram import EDGES, Fold, quantile


@dataclass(frozen=True)
class PodCounters:
    """One pod's direct path, since its attachment.

    `in_flight` counts connections with at least one outstanding request. `integral_ns` is the
    sum of in_flight * dt up to `at_ns` (CLOCK_MONOTONIC), modulo 2**64: use differences.
    """

    started: int
    finished: int
    aborted: int
    in_flight: int
    integral_ns: int
    at_ns: int
    connections: int
    open_connections: int
    upgraded: int
    http2: int
    crowded: int
    over_budget: int
    malformed: int
    out_of_order: int
    framing_lost: int
    listeners: int
    mptcp_refused: int
    steered: int
    missed: int
    latency: tuple[int, ...]

    def quantile(self, q: float) -> float:
        """Latency in seconds below which a share `q` of the finished requests stayed; 0.0 if
        there were none. Four buckets per power of two: at most 12 % off."""
        return quantile(self.latency, bucket_start, q)

    def after(self, before: PodCounters) -> PodCounters:
        """Both together, of which these are the later ones."""
        sums: dict[str, Any] = {
            name: getattr(self, name) + getattr(before, name) for name in _NUMBERS
        }
        sums["integral_ns"] %= 1 << 64
        both = zip(self.latency, before.latency, strict=True)
        return replace(self, **sums, latency=tuple(a + b for a, b in both))

    def told(self) -> dict[str, Any]:
        """What whoever serves the pod's own metrics shows of it: seconds, and counts by EDGES."""
        return {
            "started": self.started,
            "aborted": self.aborted,
            "in_flight": self.in_flight,
            "integral": self.integral_ns / 1e9 if self.integral_ns < 1 << 63 else 0.0,
            "latency": FOLD.of(self.latency),
            "seconds": round(FOLD.seconds(self.latency), 6),
        }


_GAUGES = ("in_flight", "at_ns", "open_connections")
_NUMBERS = [f.name for f in fields(PodCounters) if f.name not in (*_GAUGES, "latency")]


def bucket_start(bucket: int) -> int:
    """Lower bound of a latency bucket in microseconds (latency_bucket() in bpf/meter.h)."""
    if bucket < 4:
        return bucket
    return (4 + bucket % 4) << (bucket // 4 - 1)


FOLD = Fold(128, bucket_start)
"""For `PodCounters.latency` (LATENCY_BUCKETS in bpf/maps.h)."""


class Direct:
    """What the kernel counted for one pod as long as an agent knows it, over its attachments.

    Nothing goes backwards: a meter that begins anew, since nothing was pinned, is added to those
    before; and of what changed while a meter's lanes were read, the larger number stays.
    """

    def __init__(self) -> None:
        self.last: PodCounters | None = None
        """As of the last look."""
        self._raw: PodCounters | None = None
        self._before: PodCounters | None = None

    def look(self, counters: PodCounters) -> PodCounters:
        """The sums, when the attachment has these counters now."""
        last, raw, self._raw = self.last, self._raw, counters
        if last is not None and raw is not None and counters.connections < raw.connections:
            self._before = last
        if self._before is not None:
            counters = counters.after(self._before)
        if last is not None:
            # a preface of HTTP/2 counts as a request for a moment; a lane may be read too early
            started = max(counters.started, last.started)
            grown = (counters.integral_ns - last.integral_ns) % (1 << 64)
            integral = counters.integral_ns if grown < 1 << 63 else last.integral_ns
            if (started, integral) != (counters.started, counters.integral_ns):
                counters = replace(counters, started=started, integral_ns=integral)
        self.last = counters
        return counters


class ColdStarts:
    """From a container's start until it was ready for the first time, of all pods of a node."""

    BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS) + 1)
        self.seconds = 0.0

    def record(self, seconds: float) -> None:
        self.counts[bisect_left(self.BOUNDS, seconds)] += 1
        self.seconds += seconds


_ALWAYS = ("requests", "integral")
_SUMS = (*_ALWAYS, "aborted", "probes", "1xx", "2xx", "3xx", "4xx", "5xx", "seconds", "cut", "full")
_IN_USE = ("in_flight", "connections")


class Relayed:
    """What relay workers counted for one pod, by tenancy; sums outlive the worker, gauges don't."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[str, float]] = {}
        self._latency: dict[str, list[int]] = {}
        self._earlier: dict[str, float] = dict.fromkeys(_ALWAYS, 0)
        self._earlier_latency = [0] * (len(EDGES) + 1)

    def report(self, tenancy: str, counters: Mapping[str, Any]) -> None:
        """What its worker says now; whatever is no number that sums can bear is left out."""
        self._counters[tenancy] = {name: v for name, v in counters.items() if is_count(v)}
        latency = counters.get("latency")
        if is_histogram(latency):
            self._latency[tenancy] = latency

    def ended(self, tenancy: str) -> None:
        """Its counters grow no more."""
        counters = self._counters.pop(tenancy, {})
        for name in _SUMS:
            if name in counters:
                self._earlier[name] = self._earlier.get(name, 0) + counters[name]
        latency = self._latency.pop(tenancy, [])
        for index, count in enumerate(latency):
            self._earlier_latency[index] += count

    def totals(self) -> dict[str, float]:
        """The numbers of the tenancy that accepts last, and the sums and connections of all."""
        found: dict[str, float] = {}
        for last in self._counters.values():
            found = dict(last)
        for name in (*_SUMS, *_IN_USE):
            if name in self._earlier or name in found:
                now = sum(counters.get(name, 0) for counters in self._counters.values())
                found[name] = now + self._earlier.get(name, 0)
        return found

    def latency(self) -> list[int]:
        """Of all requests that were answered: how many by EDGES, see Fold.of."""
        return list(map(sum, zip(self._earlier_latency, *self._latency.values(), strict=True)))


class Shown:
    """What a worker last told of the metrics it showed, in pieces; for the next one, unread."""

    MOST = 64 << 10

    def __init__(self) -> None:
        self._text = ""
        self._begun = ""

    def take(self, piece: Any, last: bool) -> None:
        """One after the other; the text changes with the last one. Nonsense is no text."""
        self._begun += piece if isinstance(piece, str) else ""
        if len(self._begun) > self.MOST:
            self._begun = self._text = ""
        elif last:
            self._text, self._begun = self._begun, ""

    def handed_on(self) -> str:
        """To another worker, which begins anew."""
        self._begun = ""
        return self._text


def is_count(value: Any) -> bool:
    """A number that sums can bear, unlike NaN or an integer of a thousand digits."""
    return isinstance(value, int | float) and 0 <= value < 1e18


def is_histogram(value: Any) -> TypeGuard[list[int]]:
    """As Fold.of makes them."""
    return (
        isinstance(value, list)
        and len(value) == len(EDGES) + 1
        and all(isinstance(count, int) and is_count(count) for count in value)
    )
