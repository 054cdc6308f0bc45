"""What a worker tells of a pod for the metrics: no more than changed, and never without need."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from tests.unit.test_agent_metrics import counters, settings
from weir.proxy.contract import RevisionSettings
from weir.proxy.control import MAX_SAID, Channel
from weir.proxy.counters import Shown
from weir.proxy.kernel import AttachedPod
from weir.proxy.observe.instruments import HistogramFamily
from weir.proxy.pod import PodSpec
from weir.proxy.policy.budget import Budget
from weir.proxy.served import ServedPod
from weir.proxy.tenant import Tenant


class Told:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def of(self, operation: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["op"] == operation]


def tenant(told: Told) -> Tenant:
    channel = cast(Channel, told)
    return Tenant("hello/1", settings("current"), False, channel, [], Budget(8).share())


class Client:
    """A connection of a pod that has too much in memory."""

    was_cut = False

    def cut(self) -> None:
        self.was_cut = True


async def test_connections_that_are_cut_are_in_the_next_report() -> None:
    told = Told()
    made = tenant(told)
    clients = [Client() for _ in range(3)]
    made.shed({client: 100 * number for number, client in enumerate(clients, 1)}, 250)
    assert [client.was_cut for client in clients] == [False, True, True]
    made.report()
    (report,) = told.of("report")
    assert (report["counters"]["cut"], report["counters"]["full"]) == (2, 0)


async def test_a_pod_that_nothing_happened_to_is_not_told_of() -> None:
    told = Told()
    made = tenant(told)
    made.report()
    made.report()
    assert len(told.messages) == 1
    made.direct([0.0, 0.0, 0], counters(3).told())
    assert made.page is not None
    assert b"weir_direct_requests_total 3" in made.page.render().replace(b"{}", b"")
    assert made.page.render() == made.page.render()
    assert len(told.of("shown")) == 1


async def test_what_is_shown_is_told_in_messages_that_the_supervisor_takes() -> None:
    told = Told()
    made = tenant(told)
    assert made.page is not None
    for family in made.page._families:
        if isinstance(family, HistogramFamily):
            for number in range(6):
                family.of((("host", f'{number}"\\\n\u20ac' * 20),)).record(1.0)
    made.page.render()
    shown, pieces = Shown(), told.of("shown")
    assert len(pieces) > 1
    for piece in pieces:
        assert len(json.dumps(piece)) <= MAX_SAID
        shown.take(piece["piece"], piece["last"])
    again = tenant(Told())
    assert again.page is not None
    again.page.resume(shown.handed_on())
    assert again.page.render().count(b"host=") == made.page.render().count(b"host=") > 0


@pytest.mark.parametrize("metrics", [True, False])
def test_the_counters_of_a_pod_without_metrics_are_not_even_read(metrics: bool) -> None:
    class Attached:
        reads = 0

        def counters(self) -> Any:
            self.reads += 1
            return counters(2)

    pod = ServedPod(PodSpec("hello", RevisionSettings(user_port=1)), None, "")
    attached = Attached()
    pod.attached = cast(AttachedPod, attached)
    if metrics:
        pod.listeners["metrics"] = []
    told = pod.told()
    assert (told is not None, attached.reads) == (metrics, int(metrics))
