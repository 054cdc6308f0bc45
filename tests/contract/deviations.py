"""Where Weir differs from the queue-proxy of Knative 1.15 on purpose (docs/deviations.md).

deviations.yaml is a list of reasons; under each, the facts of scenarios that differ for it, as
`fact: [what the queue-proxy says, what Weir says]`. null is "nothing of the kind".
"""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.contract.scenario import ABSENT, Deviation

_FILE = Path(__file__).with_suffix(".yaml")


def load() -> list[Deviation]:
    deviations = []
    for entry in yaml.safe_load(_FILE.read_text()):
        for scenario, facts in entry["differs"].items():
            pairs = {fact: (_said(pair[0]), _said(pair[1])) for fact, pair in facts.items()}
            deviations.append(Deviation(scenario, pairs, entry["reason"]))
    return deviations


def _said(value: str | None) -> str:
    return ABSENT if value is None else value


DEVIATIONS = load()
