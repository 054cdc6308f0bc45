"""How one process serves many without one of them taking it all.

Owns three rules: what a pod may hold of something that all share (`Budget`), what is left to each
when there is too little (`fair_level`), and how much may be said in a second (`Pace`). Pure: knows
neither descriptors nor bytes, and takes the time as an argument.
"""

from __future__ import annotations

from collections.abc import Iterable


class Budget:
    """`total` pieces for all shares. Half of them is guaranteed, to each share the same; of the
    other half a share gets more as long as it has taken no more of it than it leaves.

    So a single hungry one gets half of what is to be had, two a third each, and whoever takes
    less than its guarantee is never turned away. A share that comes makes the guarantees of the
    others smaller; what they hold already stays theirs, so `total` may be exceeded for a while, by
    no more than a quarter.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._shares: set[Share] = set()
        self.guaranteed = total
        self.free = 0
        """Of what is guaranteed to nobody; less than nothing after a share has come."""

    def share(self) -> Share:
        """One more, until it is closed."""
        made = Share(self)
        self._shares.add(made)
        self._divide()
        return made

    def resize(self, total: int) -> None:
        self._total = total
        self._divide()

    @property
    def used(self) -> int:
        return sum(share.used for share in self._shares)

    def close(self, share: Share) -> None:
        """Idempotent."""
        self._shares.discard(share)
        self._divide()

    def _divide(self) -> None:
        count = max(len(self._shares), 1)
        self.guaranteed = max(self._total // (2 * count), 1)
        lent = sum(max(share.used - self.guaranteed, 0) for share in self._shares)
        self.free = self._total - self.guaranteed * count - lent


class Share:
    """`take` and `give` count what is used; whether there is room is for the taker to ask."""

    __slots__ = ("_budget", "used")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.used = 0

    @property
    def room(self) -> bool:
        """Is there room for one more?"""
        budget = self._budget
        more = self.used - budget.guaranteed
        return more < 0 or more < budget.free

    def take(self) -> None:
        self.used += 1
        if self.used > self._budget.guaranteed:
            self._budget.free -= 1

    def give(self) -> None:
        if self.used > self._budget.guaranteed:
            self._budget.free += 1
        self.used -= 1

    def close(self) -> None:
        """Its guarantee goes to the others; what it still has is its own affair. Idempotent."""
        self._budget.close(self)
        self._budget = Budget(1 << 62)


PROCESS_DESCRIPTORS = 128
POD_DESCRIPTORS = 128
"""Of a pod besides its clients: listeners, the connections to the other ports, spare sockets."""
CONNECTION_BYTES = 8192
"""A connection and the one that it leads to take so much while nothing is under way."""


def connections(descriptors: int, memory: int, pods: int) -> int:
    """How many clients' connections a process may have with so many descriptors and bytes.

    Each may have one to the user container. Room is left for the moment after a pod has come, see
    Budget, and half of the memory for what is under way.
    """
    by_descriptors = (descriptors - PROCESS_DESCRIPTORS - pods * POD_DESCRIPTORS) * 2 // 5
    return min(by_descriptors, memory // 2 // CONNECTION_BYTES)


def fair_level(amounts: Iterable[int], capacity: int) -> int:
    """The largest amount that everybody may keep, so that all together fit into `capacity`.

    Who has less keeps what it has; what that leaves is divided among the others (max-min).
    """
    ordered = sorted(amounts)
    left = capacity
    for index, amount in enumerate(ordered):
        level = left // (len(ordered) - index)
        if amount > level:
            return max(level, 0)
        left -= amount
    return max(ordered[-1] if ordered else 0, capacity)


class Pace:
    """So much a second, and `burst` at once after a silence."""

    __slots__ = ("_burst", "_left", "_now", "_rate")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._now = 0.0

    def spend(self, cost: float, now: float) -> bool:
        """Whether that was still within; `now` in seconds, of one clock that never goes back."""
        left = min(self._left + (now - self._now) * self._rate, self._burst)
        self._now = now
        within = left >= cost
        self._left = left - cost if within else left  # what was too much costs nothing
        return within
