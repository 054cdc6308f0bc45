"""Events that wait for their turn at one sink, and whose turn it is.

Three kinds of lines: events with a ticket or in the spool, bounded by the session's window and what
a feed gives; QoS 0 events, bounded here (the oldest goes, and its caller counts it); and one line
per route that has a gate. Knows nothing of requests, answers and retries.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable

from weir.adaptor.outgoing import Flow, Outgoing
from weir.adaptor.templates import Content

BEST_EFFORT = 1000
"""QoS 0 events held per sink."""

BEST_EFFORT_BYTES = 32 << 20
"""Of their bodies, with those that are on their way."""


class Lines:
    """`waiting`, `best_effort` and `gated` are looked at by the pipeline for every answer; only the
    methods here change them."""

    def __init__(
        self,
        flows: Iterable[Flow],
        wake: Callable[[], None],
        overflowed: Callable[[Outgoing], None],
    ) -> None:
        """`wake`: called when a gate has opened; `overflowed`: told of events that have to go for
        want of room."""
        self._loop = asyncio.get_running_loop()
        self._wake, self._overflowed = wake, overflowed
        self.waiting: deque[Outgoing] = deque()
        self.best_effort: deque[Outgoing] = deque()
        self.gated = tuple(flow for flow in flows if flow.gate is not None)
        self._elsewhere = 0
        """QoS 0 events that wait for their retry, their route's gate or their turn in its order."""

    def __len__(self) -> int:
        gated = sum(len(flow.line) for flow in self.gated)
        return len(self.waiting) + len(self.best_effort) + gated

    def put(self, outgoing: Outgoing, *, first: bool = False) -> None:
        """The event waits; for it another one, or itself, may have to go."""
        oldest = self._put(outgoing, first=first)
        if oldest is not None:
            self._overflowed(oldest)

    def _put(self, outgoing: Outgoing, *, first: bool) -> Outgoing | None:
        if outgoing.flow.gate is not None:
            return self._put_at_gate(outgoing, first=first)
        if outgoing.firm:
            self.waiting.appendleft(outgoing) if first else self.waiting.append(outgoing)
            return None
        oldest = None
        if self._is_full():
            oldest = outgoing if first or not self.best_effort else self.best_effort.popleft()
        if oldest is not outgoing:
            self.best_effort.appendleft(outgoing) if first else self.best_effort.append(outgoing)
        return oldest

    def _put_at_gate(self, outgoing: Outgoing, *, first: bool) -> Outgoing | None:
        line, oldest = outgoing.flow.line, None
        if not outgoing.firm:
            if self._is_full():
                oldest = outgoing if first or not line else line.popleft()
            else:
                self._elsewhere += 1
        if oldest is not outgoing:
            line.appendleft(outgoing) if first else line.append(outgoing)
        return oldest

    def _is_full(self) -> bool:
        return len(self.best_effort) + self._elsewhere >= BEST_EFFORT

    def step_aside(self, outgoing: Outgoing) -> bool:
        """It waits for something else than its turn. False: for that there is no room, so the event
        has to go."""
        if not outgoing.firm:
            if self._is_full():
                return False
            self._elsewhere += 1
        return True

    def step_back(self, outgoing: Outgoing) -> None:
        if not outgoing.firm:
            self._elsewhere -= 1

    def take(self) -> Outgoing | None:
        """Whose turn it is, if anyone's; gates that are about to open wake us."""
        for flow in self.gated:
            if flow.line:
                gate = flow.gate
                assert gate is not None
                wait = gate.wait(time.monotonic())
                if wait <= 0.0:
                    return self._from_line(flow)
                if wait != math.inf and flow.opens is None:
                    flow.opens = self._loop.call_later(wait, self._opened, flow)
        if self.waiting:
            return self.waiting.popleft()
        return self.best_effort.popleft() if self.best_effort else None

    def take_any(self) -> Outgoing | None:
        """For a probe, which no gate holds back."""
        if self.waiting:
            return self.waiting.popleft()
        if self.best_effort:
            return self.best_effort.popleft()
        flow = next((flow for flow in self.gated if flow.line), None)
        return None if flow is None else self._from_line(flow)

    def has_turn(self, outgoing: Outgoing) -> bool:
        """Whether no older event of the same key is under way; else it waits for that, or goes."""
        order, template = outgoing.flow.order, outgoing.flow.route.keeping.ordered
        assert order is not None and template is not None
        content = Content(outgoing.message.user_properties, outgoing.message.payload)
        key = template.render(outgoing.message.topic, "", content) or ""
        if not order.is_free(key) and not self.step_aside(outgoing):
            self._overflowed(outgoing)
            return False
        outgoing.key = key
        return order.enter(key, outgoing)

    def leave_order(self, outgoing: Outgoing) -> bool:
        """It has come to its end. Whether there is another one of its key, which is in line now."""
        order, key = outgoing.flow.order, outgoing.key
        assert order is not None and key is not None
        following = order.leave(key)
        if following is None:
            return False
        self.step_back(following)
        self.put(following, first=True)
        return True

    def pull(self, which: Callable[[Outgoing], bool]) -> list[Outgoing]:
        """Take these out, of events in the spool."""
        found: list[Outgoing] = []
        for line in (self.waiting, *(flow.line for flow in self.gated)):
            here = [each for each in line if each.entry is not None and which(each)]
            for each in here:
                line.remove(each)
            found += here
        return found

    def _opened(self, flow: Flow) -> None:
        flow.opens = None
        self._wake()

    def _from_line(self, flow: Flow) -> Outgoing:
        outgoing = flow.line.popleft()
        if not outgoing.firm:
            self._elsewhere -= 1
        return outgoing

    def stop(self) -> None:
        """No gate wakes anyone any more."""
        for flow in self.gated:
            if flow.opens is not None:
                flow.opens.cancel()
