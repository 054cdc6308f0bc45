"""What a local run shows: one sample of the agent's and the adaptor's status, with rates.

Owns the arithmetic between two statuses. Reads /proc for CPU time; draws nothing.
"""

import time
from dataclasses import dataclass
from typing import Any

from weir.local.children import cpu_seconds


@dataclass(frozen=True)
class Sample:
    """Counts are since the start of the run; rates and CPU are over the time since the last sample.

    Times in seconds, CPU in microseconds per delivered event (0 when none was delivered).
    """

    seconds: float
    received: int
    delivered: int
    unacknowledged: int
    retried: int
    quarantined: int
    events_per_second: float
    event_p50: float
    event_p99: float
    session: str
    path: str
    reason: str
    direct_connections: int
    direct_open_connections: int
    direct_requests: int
    direct_in_flight: int
    direct_concurrency: float
    direct_p50: float
    direct_p99: float
    relayed_connections: int
    relayed_requests: int
    relayed_in_flight: int
    relayed_p50: float
    relayed_p99: float
    adaptor_cpu_us: float
    agent_cpu_us: float


@dataclass(frozen=True)
class _Reading:
    """What the rates are made of: one moment's sums. Seconds, but for the kernel's own clock."""

    at: float
    delivered: int
    cpu_adaptor: float
    cpu_agent: float
    integral_ns: int
    at_ns: int


class Sampler:
    """Turns two statuses and the pids in them into a `Sample`; remembers the last one."""

    def __init__(self, adaptor_pid: int) -> None:
        self._adaptor_pid = adaptor_pid
        self._start = time.monotonic()
        self._last: _Reading | None = None

    def sample(self, agent: dict[str, Any], adaptor: dict[str, Any]) -> Sample:
        """One sample for the only pod of a local run."""
        pod = agent["pods"][0]
        direct, relayed = pod["direct"], pod["relayed"]
        now = time.monotonic()
        delivered = sum(r["delivered"] for r in adaptor["routes"])
        new = _Reading(
            at=now,
            delivered=delivered,
            cpu_adaptor=cpu_seconds([self._adaptor_pid]),
            cpu_agent=cpu_seconds([agent["supervisor"], *agent["workers"]]),
            integral_ns=direct.get("integral_ns", 0),
            at_ns=direct.get("at_ns", 0),
        )
        old, self._last = self._last or new, new
        events = new.delivered - old.delivered
        span_ns = new.at_ns - old.at_ns
        concurrency_ns = (new.integral_ns - old.integral_ns) % 2**64  # it wraps
        sinks = adaptor["sinks"]
        sink = next((s for s in sinks if s["name"] == "function"), sinks[0])
        blocked = [f"{s['name']} blocked: {s['reason']}" for s in sinks if s["state"] != "up"]
        return Sample(
            seconds=now - self._start,
            received=sum(r["received"] for r in adaptor["routes"]),
            delivered=delivered,
            unacknowledged=sum(r["unacknowledged"] for r in adaptor["routes"]),
            retried=sum(r["retried"] for r in adaptor["routes"]),
            quarantined=sum(r["quarantined"] for r in adaptor["routes"]),
            events_per_second=events / (new.at - old.at) if new.at > old.at else 0.0,
            event_p50=adaptor["latency"]["p50"],
            event_p99=adaptor["latency"]["p99"],
            session="; ".join([sink["session"], *blocked]),
            path=sink["path"],
            reason=direct["reason"],
            direct_connections=direct.get("connections", 0),
            direct_open_connections=direct.get("open_connections", 0),
            direct_requests=direct.get("started", 0),
            direct_in_flight=direct.get("in_flight", 0),
            direct_concurrency=concurrency_ns / span_ns if span_ns > 0 else 0.0,
            direct_p50=direct.get("p50", 0.0),
            direct_p99=direct.get("p99", 0.0),
            relayed_connections=relayed.get("connections", 0),
            relayed_requests=relayed.get("requests", 0),
            relayed_in_flight=relayed.get("in_flight", 0),
            relayed_p50=relayed.get("p50", 0.0),
            relayed_p99=relayed.get("p99", 0.0),
            adaptor_cpu_us=(new.cpu_adaptor - old.cpu_adaptor) * 1e6 / events if events else 0.0,
            agent_cpu_us=(new.cpu_agent - old.cpu_agent) * 1e6 / events if events else 0.0,
        )
