"""What an answer of the sink means for an event, and when to try again.

Follows Knative's delivery contract (data-plane specification section on status codes) where its
code and its table differ: 408 and every transport error are retried as well. On top of it stands
our own distinction, which decides what becomes of an event once its retries are used up:

* the sink answered for *this* event (500, 408, 409, ...): the event is at fault, the route's
  onFailure policy takes it;
* nobody was there to take it (refused connection, 404, 429, 502, 503): the sink is down, no event
  is at fault, so the sink blocks until a probe gets through;
* the request went out and no answer came (reset, timeout, 504): either may be true. It is the
  event's fault if the sink took another event meanwhile, else the sink is down.

Pure: no clock, no timers, no randomness.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

LONGEST_BACKOFF = 3600.0
"""Seconds. Exponents grow without end; a wait of more than an hour helps nobody."""

LONGEST_RETRY_AFTER = 300.0
"""Seconds. What a sink may ask for with Retry-After unless the route says otherwise; it must not
silence a route for a day."""

BREAK_AFTER = 10
"""Events in a row without any answer, after which a sink counts as down though retries are left."""

LONGEST_PROBE = 30.0
"""Seconds between two probes of a sink that is down."""


class Verdict(enum.Enum):
    DELIVERED = "delivered"
    REJECTED = "rejected"
    """No retry can change it: 4xx other than below, 1xx, 3xx, an event that is not one."""
    FAILED = "failed"
    UNAVAILABLE = "unavailable"
    UNANSWERED = "unanswered"


_BY_STATUS = {
    404: Verdict.UNAVAILABLE,
    408: Verdict.FAILED,
    409: Verdict.FAILED,
    429: Verdict.UNAVAILABLE,
    502: Verdict.UNAVAILABLE,
    503: Verdict.UNAVAILABLE,
    504: Verdict.UNANSWERED,
}


def judge(status: int) -> Verdict:
    """The verdict on an HTTP status. Unknown codes are retried, as the specification says."""
    if 200 <= status <= 299:
        return Verdict.DELIVERED
    if 100 <= status <= 499:
        return _BY_STATUS.get(status, Verdict.REJECTED)
    return _BY_STATUS.get(status, Verdict.FAILED)


def judge_silence(*, sent: bool) -> Verdict:
    """The verdict when no answer came; `sent`: request bytes may have reached the sink."""
    return Verdict.UNANSWERED if sent else Verdict.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Delivery:
    """The retry part of Knative's delivery spec. Times in seconds."""

    retry: int = 5
    policy: Literal["linear", "exponential"] = "exponential"
    delay: float = 0.2
    timeout: float = 30.0
    retry_after_max: float = LONGEST_RETRY_AFTER
    """0.0: Retry-After is not looked at."""

    def backoff(self, attempt: int, retry_after: float = 0.0) -> float:
        """Seconds before retry number `attempt`, counted from 0 (so the first linear one is at
        once); `retry_after`: what the sink asked for."""
        if self.policy == "linear":
            wait = self.delay * attempt
        else:
            wait = self.delay * 2.0 ** min(attempt, 60)
        return max(min(wait, LONGEST_BACKOFF), min(retry_after, self.retry_after_max))

    def probe(self, attempt: int, retry_after: float = 0.0) -> float:
        """Seconds before probe number `attempt` of a sink that is down; never a busy loop."""
        wait = max(self.delay, 0.05) * 2.0 ** min(attempt, 60)
        return max(min(wait, LONGEST_PROBE), min(retry_after, self.retry_after_max))


def retry_after(status: int, value: bytes | None, now: float) -> float:
    """Seconds that a 429 or 503 asks us to wait (RFC 9110 10.2.3); 0.0 when it does not.

    `now`: seconds since the epoch, for the form with a date.
    """
    if value is None or status not in (429, 503):
        return 0.0
    text = value.decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.fromtimestamp(now, UTC)).total_seconds())


_DURATION = re.compile(
    r"P(?:(?P<days>\d+)D)?(?:T(?:(?P<hours>\d+)H)?(?:(?P<minutes>\d+)M)?"
    r"(?:(?P<seconds>\d+(?:\.\d+)?)S)?)?"
)


def parse_duration(text: str) -> float:
    """Seconds of an ISO 8601 duration such as PT0.2S, as in Knative's delivery spec.

    Raises ValueError. Years and months have no fixed length and are refused.
    """
    match = _DURATION.fullmatch(text)
    if not match or text.endswith(("P", "T")):
        raise ValueError(f"`{text}` is not an ISO 8601 duration; write for example PT0.2S or PT1M")
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
