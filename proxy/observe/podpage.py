"""9091 of a pod that a relay worker serves: the queue-proxy's page, then what came directly.

Owns that counters go on when the pod is another worker's: whatever a page shows was told to the
supervisor before, as a text that only the next worker reads. Where it does not fit or was lost,
the next one begins at zero, which scrapers know as a restart; it never begins in between.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from weir.proxy.counters import is_count
from weir.proxy.observe.direct import DirectSeries
from weir.proxy.observe.instruments import (
    MOST_SERIES,
    Cell,
    Family,
    HistogramFamily,
    Labels,
    Value,
)
from weir.proxy.observe.observability import Observability

log = logging.getLogger("weir.observe")

PAGE_SECONDS = 1.0
"""So long a page is good for everybody who asks, which bounds what the supervisor is told."""
MOST_TOLD = 48 << 10

Recorded = Iterable[Family[Cell] | Family[Value]]


class PodPage:
    """`tell` takes the text for the next worker, `direct.told` is set by whoever hears of it."""

    def __init__(self, seen: Observability, tell: Callable[[str], None]) -> None:
        assert seen.render is not None
        self._render = seen.render
        self._families = seen.families
        self._tell = tell
        self.direct = DirectSeries(seen.labels)
        self._page, self._until = b"", 0.0
        self._told = ""

    def render(self) -> bytes:
        now = time.monotonic()
        if now >= self._until:
            self._page = self._render() + self.direct.text()
            self._until = now + PAGE_SECONDS
            text = written_down(self._families)
            if len(text) > MOST_TOLD:
                text = ""
            if text != self._told:
                self._told = text
                self._tell(text)
        return self._page

    def resume(self, text: str) -> None:
        """Go on from what another worker told, if it told anything."""
        if not text:
            return
        try:
            read_back(self._families, json.loads(text))
        except (ValueError, RecursionError) as error:
            log.warning("the counters of the worker before can't be read: %s", error)
        self._until = 0.0


def written_down(families: Recorded) -> str:
    """What was counted, gauges left out: {name: [[labels, numbers], ...]}."""
    told = {
        family.name: [[labels, _numbers(cell)] for labels, cell in family.series.items()]
        for family in families
        if family.kind != "gauge"
    }
    return json.dumps(told, separators=(",", ":"))


def read_back(families: Recorded, told: Any) -> None:
    """Add it. It comes from a process that reads all traffic: raises ValueError, having added
    nothing, for whatever `written_down` does not make."""
    known = {family.name: family for family in families if family.kind != "gauge"}
    if not isinstance(told, dict) or not told.keys() <= known.keys():
        raise ValueError("unknown metrics")
    found: list[tuple[Family[Cell] | Family[Value], Labels, list[float]]] = []
    for name, series in told.items():
        family = known[name]
        size = len(family.bounds) + 2 if isinstance(family, HistogramFamily) else 1
        if not isinstance(series, list) or len(series) > MOST_SERIES + 1:
            raise ValueError(f"series of {name}")
        for entry in series:
            if not isinstance(entry, list) or len(entry) != 2 or not _are_labels(entry[0]):
                raise ValueError(f"labels of {name}")
            labels: Labels = tuple((key, value) for key, value in entry[0])
            numbers = entry[1]
            if not isinstance(numbers, list) or len(numbers) != size:
                raise ValueError(f"numbers of {name}")
            if not all(is_count(number) for number in numbers):
                raise ValueError(f"numbers of {name}")
            found.append((family, labels, numbers))
    for family, labels, numbers in found:
        _add(family.of(labels), numbers)


def _are_labels(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(part, str) for part in pair)
        and pair[0].isascii()
        and pair[0].isidentifier()
        for pair in value
    )


def _numbers(cell: Cell | Value) -> list[float]:
    return [*cell.counts, cell.sum] if isinstance(cell, Cell) else [cell.value]


def _add(cell: Cell | Value, numbers: list[float]) -> None:
    if isinstance(cell, Value):
        cell.value += numbers[0]
        return
    for slot, count in enumerate(numbers[:-1]):
        cell.counts[slot] += int(count)
    cell.sum += numbers[-1]
