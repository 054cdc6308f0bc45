"""The arithmetic of concurrency (contract section 5.2).

Owns the current concurrency, its time-weighted average over a reporting period and the integral
that only grows. Time is an argument, in seconds of any monotonic clock; who reports when, and in
which format, is decided elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Report:
    """One period as the autoscaler wants it; the proxied share came through the activator."""

    average: float
    average_proxied: float
    count: int
    count_proxied: int


class Meter:
    """Counts requests in and out, and how long how many were in."""

    __slots__ = (
        "_area",
        "_area_proxied",
        "_count",
        "_count_proxied",
        "_elapsed",
        "_integral",
        "_last",
        "arrived",
        "in_flight",
        "proxied",
    )

    def __init__(self, now: float) -> None:
        self.in_flight = 0
        self.proxied = 0
        self.arrived = 0
        self._last = now
        self._area = self._area_proxied = self._elapsed = self._integral = 0.0
        self._count = self._count_proxied = 0

    def arrive(self, now: float, proxied: bool = False) -> None:
        self._advance(now)
        self.in_flight += 1
        self.arrived += 1
        self._count += 1
        if proxied:
            self.proxied += 1
            self._count_proxied += 1

    def depart(self, now: float, proxied: bool = False) -> None:
        self._advance(now)
        self.in_flight -= 1
        if proxied:
            self.proxied -= 1

    def integral(self, now: float) -> float:
        """Request-seconds since the start: over any span, difference / length is the average."""
        self._advance(now)
        return self._integral

    def report(self, now: float) -> Report:
        """Close the period. Requests in flight stay, everything counted starts anew."""
        self._advance(now)
        seconds = self._elapsed
        report = Report(
            average=self._area / seconds if seconds else 0.0,
            average_proxied=self._area_proxied / seconds if seconds else 0.0,
            count=self._count,
            count_proxied=self._count_proxied,
        )
        self._area = self._area_proxied = self._elapsed = 0.0
        self._count = self._count_proxied = 0
        return report

    def _advance(self, now: float) -> None:
        seconds = now - self._last
        if seconds <= 0:
            return
        area = self.in_flight * seconds
        self._elapsed += seconds
        self._area += area
        self._area_proxied += self.proxied * seconds
        self._integral += area
        self._last = now
