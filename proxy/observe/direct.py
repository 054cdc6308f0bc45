"""What came directly, on a pod's own metrics port: series beside the queue-proxy's (weir_direct_*).

The kernel counted it, and the supervisor tells; a status or a route is not known of these
requests, so they are in none of the queue-proxy's own metrics.
"""

from __future__ import annotations

from typing import Any

from weir.proxy.observe.instruments import (
    Cell,
    HistogramFamily,
    Labels,
    Value,
    ValueFamily,
    written,
)
from weir.proxy.policy.histogram import EDGES

SECONDS = tuple(edge / 1e6 for edge in EDGES)


def cell(counts: list[int], seconds: float, bounds: tuple[float, ...] = SECONDS) -> Cell:
    made = Cell(bounds)
    made.counts = counts
    made.sum = float(seconds)
    return made


class DirectSeries:
    """`told` is what PodCounters.told makes, None as long as nothing is known."""

    def __init__(self, labels: Labels = ()) -> None:
        self._labels = written(labels)
        self.told: dict[str, Any] | None = None
        self._values = (
            (ValueFamily("weir_direct_requests_total", "Requests that began.", "counter"),
             "started"),
            (ValueFamily("weir_direct_aborted_requests_total",
                         "Requests that ended without a whole answer.", "counter"), "aborted"),
            (ValueFamily("weir_direct_requests_in_flight", "Requests that have not ended.",
                         "gauge"), "in_flight"),
            (ValueFamily("weir_direct_request_seconds_total",
                         "Requests in flight, summed up over time.", "counter"), "integral"),
        )  # fmt: skip
        self._duration = HistogramFamily(
            "weir_direct_request_duration_seconds",
            "From a request's first byte to its answer's last.",
            SECONDS,
        )

    def text(self) -> bytes:
        told = self.told
        if told is None:
            return b""
        lines: list[str] = []
        for family, name in self._values:
            lines += family.heading()
            lines += family.lines(self._labels, Value(float(told[name])))
        lines += self._duration.heading()
        lines += self._duration.lines(self._labels, cell(told["latency"], told["seconds"]))
        return "\n".join([*lines, ""]).encode("utf-8", "replace")
