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
    """Counts requests in and out, and how long how many were in.

    `arrived` and the integrals only grow; a report is their difference since the last one.
    """

    __slots__ = (
        "_integral",
        "_integral_proxied",
        "_last",
        "_reported",
        "arrived",
        "arrived_proxied",
        "in_flight",
        "proxied",
    )

    def __init__(self, now: float) -> None:
        self.in_flight = 0
        self.proxied = 0
        self.arrived = 0
        self.arrived_proxied = 0
        self._last = now
        self._integral = 0.0
        self._integral_proxied = 0.0
        self._reported = (now, 0.0, 0.0, 0, 0)

    def arrive(self, now: float, proxied: bool = False) -> None:
        self._advance(now)
        self.in_flight += 1
        self.arrived += 1
        if proxied:
            self.proxied += 1
            self.arrived_proxied += 1

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
        then, integral, integral_proxied, arrived, arrived_proxied = self._reported
        seconds = self._last - then
        report = Report(
            average=(self._integral - integral) / seconds if seconds else 0.0,
            average_proxied=(self._integral_proxied - integral_proxied) / seconds
            if seconds
            else 0.0,
            count=self.arrived - arrived,
            count_proxied=self.arrived_proxied - arrived_proxied,
        )
        self._reported = (
            self._last,
            self._integral,
            self._integral_proxied,
            self.arrived,
            self.arrived_proxied,
        )
        return report

    def _advance(self, now: float) -> None:
        """Time that runs backwards adds nothing (contract: only `if now > last`)."""
        if now > self._last:
            seconds = now - self._last
            self._last = now
            self._integral += self.in_flight * seconds
            if self.proxied:
                self._integral_proxied += self.proxied * seconds
