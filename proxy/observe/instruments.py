"""Counters, gauges and histograms by label set, and their text for Prometheus.

Owns buckets, label sets (bounded in number, escaped) and the text exposition format 0.0.4.
Refuses to know what is measured. Whoever records keeps the cells at hand, so that a request costs
a bisection and an addition; all text is made when it is asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import accumulate
from typing import Generic, Literal, TypeVar

from weir.proxy.observe.govalues import shortest

Labels = tuple[tuple[str, str], ...]
"""Names and values, in the order of names."""

MOST_SERIES = 250
OVERFLOW: Labels = (("otel_metric_overflow", "true"),)
"""Counts everything that comes after so many label sets."""


class Cell:
    """A histogram of one label set; `counts[i]` is of values up to bounds[i], the last of more."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def record(self, value: float) -> None:
        self.add(bisect_left(self.bounds, value), value)

    def add(self, slot: int, value: float) -> None:
        """For whoever knows the slot among `counts` already."""
        self.counts[slot] += 1
        self.sum += value


class Value:
    """A counter or a gauge of one label set."""

    __slots__ = ("value",)

    def __init__(self, value: float = 0.0) -> None:
        self.value = value


_CellT = TypeVar("_CellT")


class Family(Generic[_CellT]):
    """All label sets of one metric."""

    kind: Literal["counter", "gauge", "histogram"]

    def __init__(self, name: str, help_: str) -> None:
        self.name = name
        self.help = help_
        self.series: dict[Labels, _CellT] = {}

    def _new(self) -> _CellT:
        raise NotImplementedError

    def of(self, labels: Labels) -> _CellT:
        """The cell of a label set, or of all the others when there are too many."""
        cell = self.series.get(labels)
        if cell is None:
            if len(self.series) >= MOST_SERIES:
                labels = OVERFLOW
            cell = self.series.setdefault(labels, self._new())
        return cell

    def text(self, common: Labels = ()) -> Iterator[str]:
        """Lines without their newlines; `common` labels are added to every series."""
        if self.series:
            yield from self.heading()
            for key in sorted(self.series):
                yield from self.lines(written(sorted((*key, *common))), self.series[key])

    def heading(self) -> tuple[str, str]:
        return f"# HELP {self.name} {self.help}", f"# TYPE {self.name} {self.kind}"

    def lines(self, labels: str, cell: _CellT) -> Iterable[str]:
        """Of one series, whose labels are `written` already."""
        raise NotImplementedError


@cache
def _edges(bounds: tuple[float, ...]) -> tuple[str, ...]:
    """The same for all pods of a worker."""
    return (*map(shortest, bounds), "+Inf")


class HistogramFamily(Family[Cell]):
    kind = "histogram"

    def __init__(self, name: str, help_: str, bounds: tuple[float, ...]) -> None:
        super().__init__(name, help_)
        self.bounds = bounds
        self._edges = _edges(bounds)

    def _new(self) -> Cell:
        return Cell(self.bounds)

    def lines(self, labels: str, cell: Cell) -> Iterable[str]:
        start = f"{self.name}_bucket{{{labels}{',' if labels else ''}le="
        totals = list(accumulate(cell.counts))
        for edge, total in zip(self._edges, totals, strict=True):
            yield f'{start}"{edge}"}} {total}'
        yield f"{self.name}_sum{{{labels}}} {shortest(cell.sum)}"
        yield f"{self.name}_count{{{labels}}} {totals[-1]}"


class ValueFamily(Family[Value]):
    def __init__(self, name: str, help_: str, kind: Literal["counter", "gauge"]) -> None:
        super().__init__(name, help_)
        self.kind = kind

    def _new(self) -> Value:
        return Value()

    def lines(self, labels: str, cell: Value) -> Iterable[str]:
        yield f"{self.name}{{{labels}}} {shortest(cell.value)}"


_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


def written(labels: Iterable[tuple[str, str]]) -> str:
    """name="value",… with what would end a value escaped."""
    return ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels)


def label(data: bytes) -> str:
    """A label's value of bytes that came from outside: it has to be UTF-8."""
    return data.decode("utf-8", "replace")


class Names:
    """Values of a label that clients choose: the first few are kept, all others are one.

    So that nobody who makes up hosts or tags fills a server's memory, or its scraper's.
    """

    __slots__ = ("_known", "_most")

    def __init__(self, most: int = 32) -> None:
        self._most = most
        self._known: dict[str, None] = {}

    def bounded(self, value: str) -> str:
        if value not in self._known:
            if len(self._known) >= self._most or len(value) > 253:
                return "_OTHER"
            self._known[value] = None
        return value


def render(families: Iterable[Family[Cell] | Family[Value]], common: Labels = ()) -> list[str]:
    """The lines of several families, by name."""
    lines: list[str] = []
    for family in sorted(families, key=lambda family: family.name):
        lines.extend(family.text(common))
    return lines
