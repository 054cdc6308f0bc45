"""What a local run comes to: the lines for people, the facts for machines, and what went wrong.

Pure: everything is given.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weir.local.sample import Sample


@dataclass(frozen=True)
class Result:
    """The end of a run. `cpu` is seconds per process over the run; `published` counts what the
    simulated devices had acknowledged, `claimed` what the function says it got; None: unknown."""

    sample: Sample
    seconds: float
    quarantine: Path
    cpu: dict[str, float] = field(default_factory=dict)
    published: int | None = None
    claimed: int | None = None

    @property
    def counted(self) -> int:
        """Requests as Weir counted them, in the kernel and in the relay."""
        return self.sample.direct_requests + self.sample.relayed_requests

    @property
    def cpu_us_per_event(self) -> dict[str, float]:
        events = self.sample.delivered
        return {name: s * 1e6 / events for name, s in self.cpu.items()} if events else {}

    def problems(self) -> list[str]:
        """Why the run was no success, if it was none."""
        s, found = self.sample, []
        if s.unacknowledged:
            found.append(f"{s.unacknowledged} events not acknowledged by the function")
        if s.quarantined:
            found.append(
                f"{s.quarantined} events in quarantine: "
                f"weir quarantine list --quarantine {self.quarantine}"
            )
        if self.published is not None and s.delivered + s.quarantined < self.published:
            found.append(f"{self.published - s.delivered - s.quarantined} events undelivered")
        if self.claimed not in (None, self.counted):
            found.append("the counts differ")
        return found

    def lines(self) -> list[tuple[str, str]]:
        """Name and value of each line."""
        s = self.sample
        cpu = ", ".join(f"{name} {us:.0f} us" for name, us in self.cpu_us_per_event.items())
        lines = [
            ("time", f"{self.seconds:.1f} s"),
            ("events in", f"{s.received if self.published is None else self.published}"),
            ("delivered", f"{s.delivered} ({s.delivered / self.seconds:.0f} per second)"),
            ("requests", f"{s.direct_requests} direct, {s.relayed_requests} relayed"),
            ("latency, receipt to 2xx", _latency(s.event_p50, s.event_p99)),
        ]
        if s.direct_requests:
            lines.append(("latency in the function", _latency(s.direct_p50, s.direct_p99)))
        lines.append(("CPU per event", cpu or "-"))
        if self.claimed is not None:
            agree = "they agree" if self.claimed == self.counted else "THEY DIFFER"
            lines.append(
                ("counts", f"{self.counted} by Weir, {self.claimed} by the function: {agree}")
            )
        fine = "every event was delivered" if s.delivered else "no event came"
        return [*lines, ("result", "; ".join(self.problems()) or fine)]

    def facts(self) -> dict[str, Any]:
        """The same for `--json`."""
        return asdict(self.sample) | {
            "published": self.published,
            "counted": self.counted,
            "function_count": self.claimed,
            "cpu_us_per_event": self.cpu_us_per_event,
            "problems": self.problems(),
        }


def _latency(p50: float, p99: float) -> str:
    return f"p50 {p50 * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms"
