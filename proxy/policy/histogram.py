"""Latencies in a log-linear histogram: small, exact to 1/16 of the value, mergeable.

Owns the bucket arithmetic. Values are recorded in seconds and kept in microseconds, up to about
19 hours; what was measured is the caller's business.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul

SUB_BITS = 4
_SUB = 1 << SUB_BITS
_TOP = 36 - SUB_BITS
BUCKETS = (_TOP + 1) * _SUB
EDGES = tuple(1 << power for power in range(6, 27))
"""Microseconds, 64 us to 67 s: where scrapers are shown a bucket's end. Edges of ours as well, and
of the kernel's, so nothing is split."""


def bucket(microseconds: int) -> int:
    """Index of the bucket: linear below 16 us, then 16 buckets for every doubling."""
    if microseconds < _SUB:
        return max(microseconds, 0)
    shift = microseconds.bit_length() - SUB_BITS - 1
    index = (shift << SUB_BITS) + (microseconds >> shift)
    return index if index < BUCKETS else BUCKETS - 1


def lower_bound(index: int) -> int:
    """The smallest number of microseconds that falls into the bucket."""
    if index < _SUB:
        return index
    shift = (index >> SUB_BITS) - 1
    return (index - (shift << SUB_BITS)) << shift


def quantile(counts: Sequence[int], lower: Callable[[int], int], q: float) -> float:
    """Seconds below which a share `q` of what was counted lies, 0.0 if nothing was; interpolated
    inside a bucket. `lower` gives a bucket's lower bound in microseconds. Raises ValueError."""
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"quantile {q} is outside 0..1")
    rank = q * sum(counts)
    seen = 0
    for index, count in enumerate(counts):
        if count and seen + count >= rank:
            low = lower(index)
            width = lower(index + 1) - low
            return (low + width * max(rank - seen, 0.0) / count) / 1e6
        seen += count
    return 0.0


class Fold:
    """A histogram of many buckets as one of few, for scrapers: its buckets end at EDGES."""

    def __init__(self, buckets: int, lower: Callable[[int], int]) -> None:
        """`lower` gives the lower bound of each of so many buckets, in microseconds."""
        starts = [lower(index) for index in range(buckets + 1)]
        ends = [bisect_left(starts, edge) for edge in EDGES]
        self._slices = list(zip([0, *ends], [*ends, buckets], strict=True))
        self._middles = [(a + b) / 2e6 for a, b in pairwise(starts)]

    def of(self, counts: Sequence[int]) -> list[int]:
        """How many there are between each edge and the one before; last, above all edges."""
        return [sum(counts[begin:end]) for begin, end in self._slices]

    def seconds(self, counts: Sequence[int]) -> float:
        """About the sum: every value counts as the middle of its bucket. Never goes down."""
        return float(sum(map(mul, counts, self._middles)))


@dataclass(frozen=True, slots=True)
class Latencies:
    """A snapshot. `quantile` interpolates inside a bucket; seconds, 0.0 when empty."""

    counts: tuple[int, ...] = ()

    def quantile(self, q: float) -> float:
        return quantile(self.counts, lower_bound, q)

    def total(self) -> int:
        return sum(self.counts)

    @classmethod
    def merged(cls, parts: Iterable[Latencies]) -> Latencies:
        """One snapshot of several, as if all had been recorded in one place."""
        sums = [0] * BUCKETS
        for part in parts:
            for index, count in enumerate(part.counts):
                sums[index] += count
        return cls(tuple(sums))

    def since(self, earlier: Latencies) -> Latencies:
        """What was recorded after the earlier snapshot of the same histogram."""
        old = earlier.counts or (0,) * len(self.counts)
        return Latencies(tuple(a - b for a, b in zip(self.counts, old, strict=True)))


FOLD = Fold(BUCKETS, lower_bound)
"""For the counts of `Latencies`."""


_NONE = (0,) * BUCKETS


class Histogram:
    """The recording side of `Latencies`."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: list[int] = []  # 4 KB, which a pod that nobody calls can do without

    def record(self, seconds: float) -> None:
        if not self._counts:
            self._counts = [0] * BUCKETS
        microseconds = int(seconds * 1e6)
        shift = microseconds.bit_length() - SUB_BITS - 1
        if shift <= 0 or shift >= _TOP:
            self._counts[bucket(microseconds)] += 1
        else:  # the same as bucket(), without the call: this is on the path of every request
            self._counts[(shift << SUB_BITS) + (microseconds >> shift)] += 1

    def snapshot(self) -> Latencies:
        return Latencies(tuple(self._counts) or _NONE)
