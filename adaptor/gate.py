"""How many events of a route may be on their way at a time, and how many may start per second.

Pure: time is given, in seconds of any steady clock.
"""

from __future__ import annotations

import math

SLACK = 0.1
"""Seconds of the rate that may be caught up with after a pause; timers are coarse, and a rate that
forgets what they cost is never reached."""


class Gate:
    """`limit` at a time, `rate` per second; None: no bound of that kind."""

    def __init__(self, limit: int | None, rate: float | None) -> None:
        self._limit = math.inf if limit is None else limit
        self._every = 0.0 if rate is None else 1.0 / rate
        self._next = -math.inf
        self.inside = 0

    def wait(self, now: float) -> float:
        """Seconds until one more may enter: 0.0 for at once, inf for not before one leaves."""
        if self.inside >= self._limit:
            return math.inf
        return max(0.0, self._next - now)

    def enter(self, now: float) -> None:
        """After `wait` said 0.0; a probe of a sink that is down enters whatever it said."""
        self.inside += 1
        if self._every:
            self._next = max(self._next, now - SLACK) + self._every

    def leave(self) -> None:
        self.inside -= 1
