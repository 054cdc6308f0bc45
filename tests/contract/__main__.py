"""Play one scenario, or all whose name contains a word, and show both accounts.

usage: python -m tests.contract WORD [original | weir | yaml]
`yaml` prints the differences that have no name yet as deviations.yaml has them.
"""

from __future__ import annotations

import asyncio
import sys
import traceback

import yaml

from tests.contract import scenarios  # noqa: F401 - registers them
from tests.contract.campaign import WEIR, Campaign, account
from tests.contract.deviations import DEVIATIONS
from tests.contract.original import queue_proxy
from tests.contract.scenario import ABSENT, SCENARIOS, Difference, differences, judge


def entry(name: str, unnamed: list[Difference]) -> str:
    """As it has to be put below a reason."""
    facts = {d.fact: [None if s == ABSENT else s for s in (d.original, d.weir)] for d in unnamed}
    return yaml.safe_dump({name: facts}, width=1000, sort_keys=False, default_flow_style=None)


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    which = sys.argv[2] if len(sys.argv) > 2 else "both"
    chosen = [scenario for scenario in SCENARIOS.values() if word in scenario.name]
    campaign = Campaign(chosen) if which in ("both", "yaml") else None
    for scenario in chosen:
        try:
            if campaign is not None and which == "yaml":
                unnamed = differences(*campaign.accounts(scenario.name))
                if unnamed and scenario.name not in {d.scenario for d in DEVIATIONS}:
                    print(entry(scenario.name, unnamed), flush=True)
                continue
            if campaign is not None:
                wrong = judge(scenario.name, *campaign.accounts(scenario.name), DEVIATIONS)
            else:
                command = [str(queue_proxy())] if which == "original" else WEIR
                facts = asyncio.run(account(command, scenario)).facts
                wrong = [f"{fact} = {value!r}" for fact, value in facts.items()]
        except Exception:  # noqa: BLE001 - on to the next one
            wrong = traceback.format_exc().splitlines()[-40:]
        print("\n".join([f"=== {scenario.sentence} ({scenario.section})", *wrong]), flush=True)


main()
