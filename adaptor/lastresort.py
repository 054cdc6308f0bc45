"""What becomes of an event that no retry can deliver: the route's onFailure, short of `block`.

The event is let go only when it is safe elsewhere (the dead letter sink has it, or the quarantine)
or when the route says `drop`. Until then its message stays unacknowledged: a quarantine that can't
be written is tried again for ever, and says so in `unsafe`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Protocol

from weir.adaptor.deadletter import letter
from weir.adaptor.events import Event, MalformedEvent
from weir.adaptor.outgoing import Failure, Flow, Outgoing
from weir.adaptor.quarantine import Held, QuarantineError
from weir.adaptor.retry import LONGEST_PROBE

log = logging.getLogger("weir.adaptor")


class Keeper(Protocol):
    """Puts events where they survive; the future is done when they do."""

    def put(self, event: Held) -> asyncio.Future[None]: ...


class LastResort:
    """Of one sink. `unsafe`: why events that were given up can't be quarantined."""

    def __init__(
        self,
        sink: str,
        url: str,
        keeper: Keeper,
        flows: Iterable[Flow],
        gone: Callable[[Outgoing], None],
    ) -> None:
        """`gone`: is told of each event that needs us no more."""
        self._loop = asyncio.get_running_loop()
        self._sink, self._url, self._keeper, self._gone = sink, url, keeper, gone
        self._letters = {flow.letters for flow in flows if flow.letters is not None}
        self._stopped = False
        self.unsafe: str | None = None

    def take(self, outgoing: Outgoing, failure: Failure) -> None:
        flow = outgoing.flow
        if flow.route.on_failure == "drop":
            name = flow.route.name
            log.warning("route %s dropped %s: %s", name, outgoing.event_id, failure.reason)
            flow.counters.dropped += 1
            self._gone(outgoing)
            return
        held = self._held_event(outgoing, failure)
        if flow.route.on_failure == "deadLetter" and flow.letters is not None:
            dead = letter(held, self._url)
            sent = flow.letters.send(dead, outgoing.message.topic, flow.route.delivery)
            sent.add_done_callback(partial(self._lettered, outgoing, held))
        else:
            self._keep(outgoing, held, 0)

    def _lettered(self, outgoing: Outgoing, held: Held, sent: asyncio.Future[None]) -> None:
        if sent.cancelled():
            return  # we stop; unacknowledged, it comes again
        error = sent.exception()
        if error is None:
            outgoing.flow.counters.dead_lettered += 1
            self._gone(outgoing)
            return
        log.error("event %s goes to the quarantine: %s", outgoing.event_id, error)
        self._keep(outgoing, replace(held, reason=f"{held.reason}; {error}"), 0)

    def _held_event(self, outgoing: Outgoing, failure: Failure) -> Held:
        mapper, message = outgoing.flow.mapper, outgoing.message
        stamp = (outgoing.event_id, outgoing.received)
        try:
            event: Event = mapper.event(message, *stamp)
        except MalformedEvent:
            event = mapper.plain(message, *stamp)
        return Held(
            at=time.time(),
            route=outgoing.flow.route.name,
            sink=self._sink,
            topic=message.topic,
            reason=failure.reason,
            status=failure.status,
            answer=failure.answer,
            event=event,
        )

    def _keep(self, outgoing: Outgoing, event: Held, attempt: int) -> None:
        if not self._stopped:
            safe = self._keeper.put(event)
            safe.add_done_callback(partial(self._kept, outgoing, event, attempt))

    def _kept(
        self, outgoing: Outgoing, event: Held, attempt: int, safe: asyncio.Future[None]
    ) -> None:
        error = safe.exception()
        if error is None:
            self.unsafe = None
            outgoing.flow.counters.quarantined += 1
            self._gone(outgoing)
            return
        if self.unsafe is None:
            log.error("event %s stays unacknowledged: %s", outgoing.event_id, error)
        self.unsafe = str(error) if isinstance(error, QuarantineError) else repr(error)
        wait = min(0.5 * 2.0 ** min(attempt, 10), LONGEST_PROBE)
        self._loop.call_later(wait, self._keep, outgoing, event, attempt + 1)

    def stop(self) -> None:
        """What is not safe by now stays unacknowledged."""
        self._stopped = True
        for letters in self._letters:
            letters.stop()
