"""The agent's half of the lease on a pod's listening sockets (docs/decisions/022), pure.

Owns the phases, what is to be done in which order, and when to beat. Hold's half is the table in
hold/lease.h. Sockets, messages on the wire and the worker that accepts are the caller's business;
so is the promise that CLOSE_COPIES is over, in the worker too, before the next action begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from math import inf
from types import MappingProxyType

BEAT_SECONDS = 1.0
"""A third of what hold waits for (SILENCE_MS)."""


class Phase(Enum):
    WAITING = "waiting"
    """Rung; hold has not granted yet, perhaps because another agent has the lease."""
    HELD = "held"
    ENDING = "ending"
    """The pod was told to stop; still accepting, as the drain wants it."""
    OVER = "over"


class Event(Enum):
    GRANTED = "grant"
    TOLD_TO_END = "end"
    HUNG_UP = "hung up"
    """EOF, an error, "unsafe" or a word nobody knows."""
    DRAINED = "drained"
    GIVE_UP = "give up"
    """This agent stops, or no longer wants the pod."""


class Action(Enum):
    BEAT = "beat"
    ACCEPT = "accept"
    DRAIN = "drain"
    STOP_ACCEPTING = "stop accepting"
    CLOSE_COPIES = "close copies"
    SAY_RELEASED = "released"
    SAY_DONE = "done"
    HANG_UP = "hang up"


_LET_GO = (Action.STOP_ACCEPTING, Action.CLOSE_COPIES)

Table = Mapping[tuple[Phase, Event], tuple[Phase, tuple[Action, ...]]]

TABLE: Table = MappingProxyType(
    {
        (Phase.WAITING, Event.GRANTED): (Phase.HELD, (Action.BEAT, Action.ACCEPT)),
        (Phase.WAITING, Event.GIVE_UP): (Phase.OVER, (Action.HANG_UP,)),
        (Phase.WAITING, Event.HUNG_UP): (Phase.OVER, (Action.HANG_UP,)),
        (Phase.HELD, Event.TOLD_TO_END): (Phase.ENDING, (Action.DRAIN,)),
        (Phase.HELD, Event.GIVE_UP): (
            Phase.OVER,
            (*_LET_GO, Action.SAY_RELEASED, Action.HANG_UP),
        ),
        (Phase.HELD, Event.HUNG_UP): (Phase.OVER, (*_LET_GO, Action.HANG_UP)),
        (Phase.ENDING, Event.DRAINED): (Phase.OVER, (*_LET_GO, Action.SAY_DONE, Action.HANG_UP)),
        (Phase.ENDING, Event.GIVE_UP): (
            Phase.OVER,
            (*_LET_GO, Action.SAY_RELEASED, Action.HANG_UP),
        ),
        (Phase.ENDING, Event.HUNG_UP): (Phase.OVER, (*_LET_GO, Action.HANG_UP)),
    }
)


class Lease:
    """`happened` says what to do; `look` when `due`. Times are seconds of any monotonic clock."""

    def __init__(self, phase: Phase = Phase.WAITING, table: Table = TABLE) -> None:
        self.phase = phase
        self._table = table
        self._beat_at = inf

    def happened(self, event: Event, now: float) -> tuple[Action, ...]:
        """What follows, to be carried out in this order. An event out of place changes nothing."""
        row = self._table.get((self.phase, event))
        if row is None:
            return ()
        self.phase, actions = row
        if self.phase is Phase.OVER:
            self._beat_at = inf
        elif Action.BEAT in actions:
            self._beat_at = now + BEAT_SECONDS
        return actions

    @property
    def due(self) -> float:
        return self._beat_at

    def look(self, now: float) -> tuple[Action, ...]:
        """A beat when it is time; beats that were missed are not made up for."""
        if now < self._beat_at:
            return ()
        self._beat_at = now + BEAT_SECONDS
        return (Action.BEAT,)
