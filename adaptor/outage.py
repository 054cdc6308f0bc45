"""A sink that is down: why, since when, and when it is tried next.

One probe at a time, ever more rarely. What is sent as a probe is the pipeline's business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from weir.adaptor.outgoing import Failure
from weir.adaptor.retry import Delivery

log = logging.getLogger("weir.adaptor")

LOOK_AGAIN = 1.0
"""Seconds, when there was nothing to probe with."""


class Outage:
    """Of one sink, which is up at first. `reason`: None as long as it is up; `since`: seconds since
    the epoch when that last changed."""

    def __init__(self, sink: str, probe: Callable[[], None]) -> None:
        """`probe`: called when it is time to."""
        self._loop = asyncio.get_running_loop()
        self._sink, self._probe = sink, probe
        self.reason: str | None = None
        self.since = time.time()
        self._probes = 0
        self._timer: asyncio.TimerHandle | None = None

    def goes_on(self, failure: Failure, delivery: Delivery) -> None:
        """Or begins. `delivery`: of the route whose event has found it so."""
        if self.reason is None:
            self.since, self._probes = time.time(), 0
            log.error("sink %s is blocked: %s", self._sink, failure.reason)
        self.reason = failure.reason
        if self._timer is None:
            wait = delivery.probe(self._probes, failure.retry_after)
            self._probes += 1
            self._timer = self._loop.call_later(wait, self._due)

    def look_again(self) -> None:
        """Soon: the events are in their retry timers."""
        self._timer = self._loop.call_later(LOOK_AGAIN, self._due)

    def _due(self) -> None:
        self._timer = None
        self._probe()

    def ends(self) -> None:
        log.warning("sink %s answers again", self._sink)
        self.reason, self.since, self._probes = None, time.time(), 0
        self.stop()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
