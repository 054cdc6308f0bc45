"""The three timers of a request (contract section 3.7), without a clock.

Owns when which timer fires. What is then sent, and how the exchange is torn down, is decided by
whoever holds the connections.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf

from weir.proxy.contract import RevisionSettings


class Cause(Enum):
    """Which timer fired, in the words of the queue-proxy's log."""

    REQUEST = "Request timeout"
    RESPONSE_START = "Response start timeout"
    IDLE = "Idle timeout"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; 0 is off. All three start together, before any waiting in a queue."""

    request: float
    response_start: float = 0.0
    idle: float = 0.0

    @property
    def shortest(self) -> float:
        """No timer fires earlier than this after the start; inf when all are off."""
        return min((t for t in (self.request, self.response_start, self.idle) if t), default=inf)

    @classmethod
    def of(cls, settings: RevisionSettings) -> Timeouts:
        return cls(settings.timeout, settings.response_start_timeout, settings.idle_timeout)


class Deadlines:
    """The timers of one request. Only writes of the response count as activity, uploads don't."""

    __slots__ = ("_request_at", "_start_at", "_timeouts", "_touched", "begun")

    def __init__(self, timeouts: Timeouts, now: float) -> None:
        self._timeouts = timeouts
        self._request_at = now + timeouts.request if timeouts.request else inf
        self._start_at = now + timeouts.response_start if timeouts.response_start else inf
        self._touched = now
        self.begun = False

    def wrote(self, now: float) -> None:
        """Bytes of the response went to the client: it has begun, and is not idle."""
        self.begun = True
        self._touched = now

    def next(self) -> float:
        """When to look again; inf when no timer is armed."""
        at = self._request_at
        if not self.begun and self._start_at < at:
            at = self._start_at
        idle = self._timeouts.idle
        if idle and self._touched + idle < at:
            at = self._touched + idle
        return at

    def fired(self, now: float) -> Cause | None:
        """The timer that ends the request now, the longest one first; None: it may go on."""
        if now >= self._request_at:
            return Cause.REQUEST
        if not self.begun and now >= self._start_at:
            return Cause.RESPONSE_START
        idle = self._timeouts.idle
        if idle and now >= self._touched + idle:
            return Cause.IDLE
        return None
