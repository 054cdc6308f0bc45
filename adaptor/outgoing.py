"""An event on its way: what is known of it, of its route at work, and of an attempt that failed.

Values that the pipeline moves about; when and where to is its business.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mqtt5 import PublishPacket

from weir.adaptor.batches import Batcher
from weir.adaptor.broker import Ticket
from weir.adaptor.counters import RouteCounters
from weir.adaptor.deadletter import DeadLetters
from weir.adaptor.gate import Gate
from weir.adaptor.mapping import Mapper
from weir.adaptor.order import Order
from weir.adaptor.replies import Replies
from weir.adaptor.retry import Verdict, judge, judge_silence, retry_after
from weir.adaptor.routes import Route
from weir.adaptor.spool import Entry
from weir.proxy.wire.client import Response, TransportError

if TYPE_CHECKING:
    from weir.adaptor.feed import Feed

log = logging.getLogger("weir.adaptor")


@dataclass(slots=True, eq=False)
class Flow:
    """A route at work. `number`: its filter's subscription identifier; `gate`: its concurrency and
    rate, with those who wait for it in `line`; `letters`: its dead letter sink; `batcher` and
    `replies`: of a route that has batches or wants replies; `feed`: of one with a spool; `order`:
    of one that has its events one by one."""

    route: Route
    mapper: Mapper
    number: int
    counters: RouteCounters = field(default_factory=RouteCounters)
    letters: DeadLetters | None = None
    batcher: Batcher | None = None
    replies: Replies | None = None
    gate: Gate | None = None
    line: deque[Outgoing] = field(default_factory=deque)
    opens: asyncio.TimerHandle | None = None
    feed: Feed | None = None
    order: Order[Outgoing] | None = None

    def __post_init__(self) -> None:
        if self.route.concurrency is not None or self.route.rate is not None:
            self.gate = Gate(self.route.concurrency, self.route.rate)
        if self.route.keeping.ordered is not None:
            self.order = Order()


@dataclass(slots=True, eq=False)
class Outgoing:
    """One event on its way. `attempts`: retries used up; `mark`: what the sink had taken when the
    event was first tried, to see whether it took others since; `entry`: where it is in the spool,
    which is instead of a ticket; `key`: those with the same one go one by one."""

    flow: Flow
    message: PublishPacket
    ticket: Ticket | None
    event_id: str
    received: float
    arrived: float  # time.monotonic(): uvloop's own clock only knows milliseconds
    head: bytes
    body: bytes
    entry: Entry | None = None
    expires: float | None = None  # by time.monotonic()
    mark: int = -1
    attempts: int = 0
    key: str | None = None

    @property
    def firm(self) -> bool:
        """Whether it must not be let go for want of room."""
        return self.ticket is not None or self.entry is not None


@dataclass(frozen=True, slots=True)
class Failure:
    verdict: Verdict
    reason: str
    status: int | None = None
    answer: bytes = b""
    retry_after: float = 0.0


def subscribed(flows: tuple[Flow, ...], numbers: list[int]) -> tuple[Flow, ...]:
    """A broker may send one copy per overlapping subscription or one for all; the subscription
    identifiers tell which it was. Without them every matching route gets the message."""
    if not numbers:
        return flows
    return tuple(flow for flow in flows if flow.number in numbers) or flows


def silence(error: BaseException) -> Failure:
    if isinstance(error, TransportError):
        return Failure(judge_silence(sent=error.sent), str(error) or type(error).__name__)
    log.error("calling the sink failed in an unforeseen way", exc_info=error)
    return Failure(Verdict.UNANSWERED, f"{type(error).__name__}: {error}")


def refusal(response: Response, now: float) -> Failure:
    status = response.status
    asked = next((value for name, value in response.headers if name == b"retry-after"), None)
    return Failure(
        judge(status),
        f"the sink answered {status}",
        status,
        response.body[:1024],
        retry_after(status, asked, now),
    )
