"""Where Weir differs from the queue-proxy of Knative 1.15, and why (docs/deviations.md)."""

from __future__ import annotations

from tests.contract.scenario import Deviation

DEVIATIONS: list[Deviation] = []
