"""How a local run is shown: a live table on a terminal, plain lines elsewhere, JSON for machines.

Owns the drawing of samples, notes and the summary. Computes nothing.
"""

import json
import sys
import time
from dataclasses import asdict
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from weir.local.sample import Sample

PLAIN_SECONDS = 2.0


class View(Protocol):
    """`note` prints a line that stays, `show` replaces the picture, `summary` ends the run."""

    def __enter__(self) -> "View": ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None: ...
    def note(self, source: str, line: str) -> None: ...
    def show(self, sample: Sample) -> None: ...
    def summary(self, lines: list[tuple[str, str]], facts: dict[str, Any]) -> None: ...


def make(as_json: bool) -> View:
    """JSON if asked for, a live view on a terminal, plain lines otherwise."""
    if as_json:
        return JsonView(sys.stdout)
    return LiveView() if sys.stdout.isatty() else PlainView(sys.stdout)


class PlainView:
    """A line every two seconds; notes as they come."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._next = 0.0

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()

    def note(self, source: str, line: str) -> None:
        print(f"{source:>8} | {line}", file=self._out, flush=True)

    def show(self, sample: Sample) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_SECONDS
            self.note("weir", line(sample))

    def summary(self, lines: list[tuple[str, str]], facts: dict[str, Any]) -> None:
        width = max(len(name) for name, _ in lines)
        print("", file=self._out)
        for name, value in lines:
            print(f"  {name:<{width}}  {value}", file=self._out)


class JsonView:
    """One object a line: {"sample": ...}, at the end {"summary": ...}; notes go to stderr."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()

    def note(self, source: str, line: str) -> None:
        print(f"{source:>8} | {line}", file=sys.stderr, flush=True)

    def show(self, sample: Sample) -> None:
        print(json.dumps({"sample": asdict(sample)}), file=self._out, flush=True)

    def summary(self, lines: list[tuple[str, str]], facts: dict[str, Any]) -> None:
        print(json.dumps({"summary": facts}), file=self._out, flush=True)


class LiveView:
    """A table that is redrawn in place; notes scroll by above it."""

    def __init__(self) -> None:
        self._console = Console()
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> View:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def note(self, source: str, line: str) -> None:
        self._live.console.print(Text(f"{source:>8} | ", style="dim") + Text(line))

    def show(self, sample: Sample) -> None:
        self._live.update(Group(*_tables(sample), Text("Ctrl-C drains and stops", style="dim")))

    def summary(self, lines: list[tuple[str, str]], facts: dict[str, Any]) -> None:
        self._live.stop()
        table = Table(show_header=False, box=None, padding=(0, 2))
        for name, value in lines:
            table.add_row(Text(name, style="bold"), Text(value))
        self._console.print(table)


def line(s: Sample) -> str:
    """A sample in one line."""
    path = f"{s.path} ({s.reason})" if s.reason else s.path
    return (
        f"{s.events_per_second:7.0f} events/s  {s.delivered} delivered  "
        f"{s.unacknowledged} unacknowledged  {s.session}  {path}  "
        f"direct {s.direct_requests}  relayed {s.relayed_requests}  "
        f"p50 {_ms(s.event_p50)}  p99 {_ms(s.event_p99)}  "
        f"cpu/event adaptor {s.adaptor_cpu_us:.0f} us, agent {s.agent_cpu_us:.0f} us"
    )


def _tables(s: Sample) -> list[Table | Text]:
    paths = _grid("", "connections", "requests", "in flight", "concurrency", "p50", "p99")
    paths.add_row(
        *("direct (kernel)", f"{s.direct_open_connections} open, {s.direct_connections} in all"),
        *(str(s.direct_requests), str(s.direct_in_flight), f"{s.direct_concurrency:.2f}"),
        *(_ms(s.direct_p50), _ms(s.direct_p99)),
    )
    paths.add_row(
        *("relayed", f"{s.relayed_connections} open"),
        *(str(s.relayed_requests), str(s.relayed_in_flight), ""),
        *(_ms(s.relayed_p50), _ms(s.relayed_p99)),
    )
    events = _grid(
        "", "per second", "delivered", "unacknowledged", "retried", "quarantined", "p50", "p99"
    )
    events.add_row(
        *("events", f"{s.events_per_second:.0f}", str(s.delivered), str(s.unacknowledged)),
        *(str(s.retried), str(s.quarantined), _ms(s.event_p50), _ms(s.event_p99)),
    )
    cpu = f"CPU per event: adaptor {s.adaptor_cpu_us:.0f} us, agent {s.agent_cpu_us:.0f} us"
    lines = [f"{s.seconds:.0f} s, {s.session}, {cpu}"]
    if s.reason:
        lines.insert(0, f"no direct path: {s.reason}")
    return [paths, events, *(Text(text) for text in lines)]


def _grid(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name else "left", min_width=0 if name else 15)
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
