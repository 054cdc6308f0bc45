"""The queue-proxy of Knative 1.15 and `weir sidecar` give the same account of every scenario.

Each scenario is a sentence of the contract (scenarios/). All that a test collected are played at
once, several at a time, so the first result takes longer than the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract import scenarios  # noqa: F401 - registers them
from tests.contract.campaign import Campaign
from tests.contract.deviations import DEVIATIONS
from tests.contract.original import why_no_queue_proxy
from tests.contract.scenario import SCENARIOS, Scenario, judge
from tests.pods import why_no_pods

REASON = why_no_queue_proxy() or why_no_pods()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def campaign(request: pytest.FixtureRequest) -> Iterator[Campaign]:
    wanted = []
    for item in request.session.items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and isinstance(callspec.params.get("scenario"), Scenario):
            wanted.append(callspec.params["scenario"])
    campaign = Campaign(wanted)
    yield campaign
    campaign.stop()


@pytest.mark.parametrize(
    "scenario",
    SCENARIOS.values(),
    ids=lambda scenario: f"{scenario.section} {scenario.sentence}",
)
def test_both_give_the_same_account(scenario: Scenario, campaign: Campaign) -> None:
    original, weir = campaign.accounts(scenario.name)
    wrong = judge(scenario.name, original, weir, DEVIATIONS)
    assert not wrong, "\n" + "\n".join(wrong)


def test_deviations_are_of_scenarios_that_exist() -> None:
    assert {deviation.scenario for deviation in DEVIATIONS} <= set(SCENARIOS)
