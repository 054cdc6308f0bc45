"""Which of a function's pods gets the next request: pure, without sockets or a clock.

A revision gets its share of the requests by weight, and within it the pod with the fewest requests
in flight is chosen. A pod that fails is ejected: at once, because the next request has other places
to go, and for twice as long with every failure in a row. When that time is over, one request tries
it, and decides. What a failure is, is said by whoever calls. When a revision has no pod to offer,
the answer is none: then another way must be taken that knows more, such as the function's URL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

SHORTEST_EJECTION = 0.25
LONGEST_EJECTION = 60.0
"""Seconds that a pod gets nothing after its first failure, and after any number of them."""

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Revision:
    """`weight`: its share, relative to the others'; `pods`: `host:port` of their data ports."""

    name: str
    pods: tuple[str, ...]
    weight: float = 1.0


class Member(Generic[C]):
    """A pod in the set. `failures`: in a row, none of them counted twice; `until`: ejected;
    `removed`: it has left the set, what it has in flight may end."""

    __slots__ = (
        *("client", "failures", "in_flight", "name", "probing", "removed", "until"),
        "revision",
    )

    def __init__(self, name: str, revision: str, client: C) -> None:
        self.name = name
        self.revision = revision
        self.client = client
        self.in_flight = 0
        self.failures = 0
        self.until = 0.0
        self.probing = False
        self.removed = False

    def begin(self) -> int:
        """A request goes to it. What is returned belongs to that request, for its end."""
        self.in_flight += 1
        if self.failures:
            self.probing = True
        return self.failures

    def succeeded(self) -> None:
        """An answer, whenever it was asked for, proves that the pod lives."""
        self.in_flight -= 1
        self.failures = 0
        self.probing = False

    def failed(self, begun: int, now: float) -> None:
        """Of all that were under way together, only the first failure counts."""
        self.in_flight -= 1
        if begun >= self.failures:  # none was counted since
            wait = SHORTEST_EJECTION * 2.0 ** min(self.failures, 30)
            self.until = now + min(wait, LONGEST_EJECTION)
            self.failures += 1
            self.probing = False

    def left(self, begun: int) -> None:
        """The request ended without saying anything about the pod."""
        self.in_flight -= 1
        if begun >= self.failures:
            self.probing = False

    def state(self, now: float) -> str:
        """`up`, `ejected`, or `probing` when it is tried again."""
        if not self.failures:
            return "up"
        return "ejected" if now < self.until and not self.probing else "probing"


class _Group(Generic[C]):
    """The pods of one revision."""

    __slots__ = ("credit", "members", "next", "weight")

    def __init__(self, weight: float, members: tuple[Member[C], ...]) -> None:
        self.weight = weight
        self.members = members
        self.credit = 0.0
        self.next = 0

    def least(self, now: float) -> Member[C] | None:
        """The one with the fewest in flight that is not ejected; in turn where several are equal,
        so that connections and what the pods remember stay spread."""
        best: Member[C] | None = None
        members, count, start = self.members, len(self.members), self.next
        for index in range(start, start + count):
            member = members[index % count]
            if member.failures and (member.probing or now < member.until):
                continue
            if best is None or member.in_flight < best.in_flight:
                best = member
                self.next = (index + 1) % count
                if not member.in_flight:
                    break
        return best


class Balance(Generic[C]):
    """The set. `client`: made for every pod that joins; it is kept while the pod stays, whatever
    else changes around it."""

    def __init__(self, client: Callable[[str], C]) -> None:
        self._client = client
        self._groups: tuple[_Group[C], ...] = ()
        self._members: dict[tuple[str, str], Member[C]] = {}

    def __iter__(self) -> Iterator[Member[C]]:
        return iter(self._members.values())

    def update(self, revisions: Sequence[Revision]) -> list[Member[C]]:
        """The set is this now. Returns who left. A revision of weight 0 gets nothing."""
        before, self._members, groups = self._members, {}, []
        for revision in revisions:
            if revision.weight <= 0:
                continue
            for pod in dict.fromkeys(revision.pods):
                key = (revision.name, pod)
                member = before.pop(key, None)
                self._members[key] = member or Member(pod, revision.name, self._client(pod))
            inside = (each for key, each in self._members.items() if key[0] == revision.name)
            groups.append(_Group(revision.weight, tuple(inside)))
        self._groups = tuple(groups)
        for member in before.values():
            member.removed = True
        return list(before.values())

    def choose(self, now: float) -> Member[C] | None:
        """The pod for the next request, which must `begin` there; None: go another way."""
        groups = self._groups
        if len(groups) == 1:
            return groups[0].least(now)
        if not groups:
            return None
        return self._next_group(groups).least(now)

    def _next_group(self, groups: tuple[_Group[C], ...]) -> _Group[C]:
        """Shares by weight, as evenly mixed as they can be. A revision without a pod keeps its
        share: the other way has to wake it up."""
        total = 0.0
        best = groups[0]
        for group in groups:
            group.credit += group.weight
            total += group.weight
            if group.credit > best.credit:
                best = group
        best.credit -= total
        return best
