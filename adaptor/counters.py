"""What the adaptor counts, per route. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from weir.proxy.policy.histogram import Histogram


@dataclass(slots=True)
class RouteCounters:
    """Events, not messages: a message that two routes take counts in both.

    received = delivered + dead_lettered + quarantined + dropped + overflowed + expired + pending,
    always.
    """

    received: int = 0
    delivered: int = 0
    retried: int = 0
    dead_lettered: int = 0
    quarantined: int = 0
    dropped: int = 0
    """Given up by `onFailure: drop`."""
    overflowed: int = 0
    """QoS 0 events that a slow sink left no room for; the oldest go first."""
    expired: int = 0
    """Not delivered within the time that their publisher gave them (Message Expiry Interval)."""
    replied: int = 0
    """Replies that the broker has. Beside the sum, as is the next: no events of messages."""
    unreplied: int = 0
    """Replies that can't be published, which onFailure took."""
    latency: Histogram = field(default_factory=Histogram)
    """Seconds from receipt to the sink's 2xx."""

    @property
    def pending(self) -> int:
        safe = self.delivered + self.dead_lettered + self.quarantined
        return self.received - safe - self.dropped - self.overflowed - self.expired

    def snapshot(self) -> dict[str, object]:
        latency = self.latency.snapshot()
        return {
            "received": self.received,
            "delivered": self.delivered,
            "unacknowledged": self.pending,
            "retried": self.retried,
            "dead_lettered": self.dead_lettered,
            "quarantined": self.quarantined,
            "dropped": self.dropped,
            "overflowed": self.overflowed,
            "expired": self.expired,
            "replied": self.replied,
            "unreplied": self.unreplied,
            "p50": latency.quantile(0.5),
            "p99": latency.quantile(0.99),
        }
