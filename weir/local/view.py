"""How a local run is shown: a live table on a terminal, plain lines elsewhere, JSON for machines.

Owns the drawing of samples, notes and the summary. Computes nothing.
"""

import json
import sys
import time
from dataclasses import asdict
from types import TracebackType
from typing import Any, Protocol, TextIO

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
        self._live.update(Group(_table(sample), Text("Ctrl-C drains and stops", style="dim")))

    def summary(self, lines: list[tuple[str, str]], facts: dict[str, Any]) -> None:
        self._live.stop()
        table = Table(show_header=False, box=None, padding=(0, 2))
        for name, value in lines:
            table.add_row(Text(name, style="bold"), Text(value))
        self._console.print(table)


def line(s: Sample) -> str:
    """A sample in one line."""
    path = s.path if s.path == "direct" else f"{s.path or '-'} ({s.reason})"
    return (
        f"{s.events_per_second:7.0f} events/s  {s.delivered} delivered  "
        f"{s.unacknowledged} unacknowledged  path {path}  "
        f"direct {s.direct_requests}  relayed {s.relayed_requests}  "
        f"p50 {_ms(s.event_p50)}  p99 {_ms(s.event_p99)}  "
        f"cpu/event adaptor {s.adaptor_cpu_us:.0f} us, agent {s.agent_cpu_us:.0f} us"
    )


def _table(s: Sample) -> Table:
    table = Table(title=f"weir run, {s.seconds:.0f} s", title_justify="left", expand=False)
    for name in ("", "connections", "requests", "in flight", "concurrency", "p50", "p99"):
        table.add_column(name, justify="left" if not name else "right")
    direct = "direct (kernel)" if not s.reason else f"direct: {s.reason}"
    table.add_row(
        *(direct, f"{s.direct_open_connections} of {s.direct_connections}"),
        *(str(s.direct_requests), str(s.direct_in_flight), f"{s.direct_concurrency:.2f}"),
        *(_ms(s.direct_p50), _ms(s.direct_p99)),
    )
    table.add_row("relayed", "", str(s.relayed_requests), str(s.relayed_in_flight), "", "", "")
    table.add_section()
    table.add_row(
        *(f"events: {s.events_per_second:.0f}/s, {s.session}", ""),
        *(str(s.delivered), str(s.unacknowledged), "", _ms(s.event_p50), _ms(s.event_p99)),
    )
    table.add_row(f"retried {s.retried}, quarantined {s.quarantined}", *[""] * 6)
    table.add_row(
        f"CPU per event: adaptor {s.adaptor_cpu_us:.0f} us, agent {s.agent_cpu_us:.0f} us",
        *[""] * 6,
    )
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
