"""What the kernel counted for one pod: a value, and what can be read from it.

Pure. How the numbers come about is bpf/meter.h; who reads them is weir.proxy.kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from weir.proxy.policy.histogram import quantile


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


def bucket_start(bucket: int) -> int:
    """Lower bound of a latency bucket in microseconds (latency_bucket() in bpf/meter.h)."""
    if bucket < 4:
        return bucket
    return (4 + bucket % 4) << (bucket // 4 - 1)
