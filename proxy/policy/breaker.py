"""Admission to one user container that limits its concurrency.

Owns the count of running requests and the queue behind it. Knows no clock, no socket and no HTTP:
what a refused request is told, and when a waiting one gives up, is the relay's business.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from weir.proxy.contract import QUEUE_DEPTH_FACTOR


class Place(Enum):
    """Where an admitted request stands."""

    RUNNING = "running"
    WAITING = "waiting"
    REFUSED = "refused"
    GONE = "gone"


# a member of an Enum is slow to look up, and these are on the path of every request
RUNNING, WAITING, REFUSED, GONE = Place


class Admission:
    """One request's place. `leave()` it exactly when the exchange has really ended."""

    __slots__ = ("_breaker", "_turn", "place")

    def __init__(
        self, breaker: Breaker, place: Place, turn: Callable[[], None] | None = None
    ) -> None:
        self._breaker = breaker
        self._turn = turn  # of one that waits: whose turn it is mostly holds on to this as well
        self.place = place

    def leave(self) -> None:
        """Give the place back; a running request's slot goes to the longest waiter at once.

        Leaving twice, or after a refusal, changes nothing.
        """
        place, self.place = self.place, GONE
        if place is RUNNING:
            self._breaker._release()
        elif place is WAITING:
            self._breaker._forget(self)


class Breaker:
    """`limit` requests run, `depth` wait, the rest are refused.

    Mirrors containerConcurrency (contract section 3.6, CC > 0). First in, first out, also against
    newcomers, so a waiter never starves; a waiter that leaves gives its turn to the next one.
    """

    def __init__(self, limit: int, depth: int | None = None) -> None:
        if limit < 1:
            raise ValueError(f"breaker limit is {limit}, must be 1 or more (0 needs no breaker)")
        self.limit = limit
        self.depth = limit * QUEUE_DEPTH_FACTOR if depth is None else depth
        self.running = 0
        self.in_line = 0
        """Running and waiting."""
        self._waiting: dict[Admission, None] = {}

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def admit(self, turn: Callable[[], None]) -> Admission:
        """Running at once, waiting, or refused; never blocks.

        `turn` is called later, once, and only for an admission that was waiting and now runs.
        """
        if self.running < self.limit and not self._waiting:
            self.running += 1
            self.in_line += 1
            return Admission(self, RUNNING)
        if len(self._waiting) >= self.depth:
            return Admission(self, REFUSED)
        self.in_line += 1
        admission = Admission(self, WAITING, turn)
        self._waiting[admission] = None
        return admission

    def _release(self) -> None:
        self.running -= 1
        self.in_line -= 1
        if self._waiting:
            admission = next(iter(self._waiting))
            del self._waiting[admission]
            self.running += 1
            admission.place = RUNNING
            turn, admission._turn = admission._turn, None
            assert turn is not None
            turn()

    def _forget(self, admission: Admission) -> None:
        self.in_line -= 1
        admission._turn = None
        del self._waiting[admission]
