"""What a route promises about its events on their way, as a routes file says it: spool and order.

    spool: always                          # acknowledge the broker once the event is on our disk
    spool: {size: 268435456, age: P7D}     # of this route; older events go the way of onFailure
    ordered: true                          # one event of a topic at a time
    ordered: "{json[/device]}"             # or of whatever the template says

Values and their checks; knows nothing of files and queues.
"""

from __future__ import annotations

from dataclasses import dataclass

from weir.adaptor.document import Place
from weir.adaptor.retry import parse_duration
from weir.adaptor.templates import Template

FIELDS = ("spool", "ordered")
"""Of a route, which are read here."""

_SPOOL_KEYS = ("size", "age")
SMALLEST, LARGEST = 1 << 16, 1 << 44
SHORTEST_AGE = 1.0


@dataclass(frozen=True, slots=True)
class Spooling:
    """`size`: bytes of events; past it, further messages stay unacknowledged with the broker.
    `age`: seconds that an event may lie there."""

    size: int = 256 << 20
    age: float = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Keeping:
    """`ordered`: events for which the template comes to the same are delivered one by one."""

    spool: Spooling | None = None
    ordered: Template | None = None


def parse_keeping(route: Place, levels: int) -> Keeping:
    """`levels`: the fewest of a topic of this route. What is wrong is noted."""
    return Keeping(_spool(route), _ordered(route, levels))


def _spool(route: Place) -> Spooling | None:
    value = route.values.get("spool")
    if "spool" not in route.values or value == "always":
        return None if value is None else Spooling()
    if not isinstance(value, dict):
        route.wrong("spool", f"is `always` or {{size: BYTES, age: DURATION}}, not {value!r}")
        return None
    inner = route.inner("spool", ", ".join(_SPOOL_KEYS))
    assert inner is not None
    inner.check_keys(_SPOOL_KEYS)
    age = inner.parsed("age", parse_duration, "P7D")
    if age is not None and age < SHORTEST_AGE:
        inner.wrong("age", "is shorter than a second, so nothing could be delivered in time")
    default = Spooling()
    return Spooling(inner.integer("size", default.size, SMALLEST, LARGEST), age or default.age)


def _ordered(route: Place, levels: int) -> Template | None:
    value = route.values.get("ordered", False)
    if isinstance(value, bool):
        return Template.parse("{topic}", fewest_levels=levels) if value else None
    return route.parsed("ordered", lambda text: Template.parse(text, fewest_levels=levels))
