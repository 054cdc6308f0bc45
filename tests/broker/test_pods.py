"""A sink of several real pods: they die, hang, come and leave under load, and nothing is lost.

Each pod has a network namespace and a cgroup; a `weir agent` serves their data ports and steers
their direct ports, as on a node. What a function noted before it answered counts as arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.agent.test_agent import agent_for, described
from tests.broker.harness import Mosquitto, Running, Sink, adaptor, routes, until
from tests.pods import USER_PORT, Pod, needs_kernel
from tests.pods import until as soon
from weir.adaptor.operations import metrics
from weir.proxy.policy.balance import Revision

pytestmark = needs_kernel

DELIVERY = "delivery: {retry: 8, backoffDelay: PT0.02S, timeout: PT1S}, onFailure: block"


class Function:
    """The function in one pod."""

    def __init__(self, pod: Pod, folder: Path) -> None:
        self._pod, self._notes = pod, folder / f"{pod.name}.notes"
        self.address = f"{pod.address}:8012"
        self.start()

    def start(self) -> None:
        app = Path(__file__).with_name("counting_app.py")
        command = [sys.executable, "-S", "-E", str(app), str(USER_PORT), str(self._notes)]
        self.process = self._pod.run(command)
        soon(self._pod.listening, "the function listens")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wedge(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    @property
    def bodies(self) -> list[bytes]:
        return self._notes.read_bytes().splitlines() if self._notes.exists() else []


class Cluster:
    """Functions in pods, an adaptor whose sink they are, and what was published."""

    def __init__(self, functions: list[Function], url: Sink, broker: Mosquitto) -> None:
        self.functions, self._url, self._broker = functions, url, broker
        self.published = 0
        self.running: Running

    def arrived(self) -> Counter[bytes]:
        found = Counter(self._url.bodies)
        for function in self.functions:
            found.update(function.bodies)
        return found

    def sink(self) -> dict[str, Any]:
        return self.running.sink(self._url.url)

    def pod(self, function: Function) -> dict[str, Any]:
        found: dict[str, Any] = next(
            pod for pod in self.sink()["pods"] if pod["pod"] == function.address
        )
        return found

    def list(self, *functions: Function) -> None:
        """These are the pods now, as a resolver would tell."""
        listed = self.running.adaptor.lanes[0].client.listed
        assert listed is not None
        listed.change([Revision("", tuple(each.address for each in functions))])

    async def publish(self, count: int) -> None:
        many = [("plant/x", b"%d" % (self.published + n)) for n in range(count)]
        self.published += count
        await self._broker.publish(many)

    async def until_direct(self, *functions: Function) -> None:
        async with asyncio.timeout(60):
            while any(self.pod(each)["path"] != "direct" for each in functions):
                await self.publish(3)
                await asyncio.sleep(0.05)

    async def everything(self) -> Counter[bytes]:
        wanted = {b"%d" % n for n in range(self.published)}
        await until(lambda: wanted <= self.arrived().keys(), "every event has arrived")
        await until(lambda: self.sink()["window"]["used"] == 0, "all acknowledged")
        return self.arrived()


@contextlib.asynccontextmanager
async def cluster(
    broker: Mosquitto, url: Sink, folder: Path, pods: int, listed: int, **more: Any
) -> AsyncIterator[Cluster]:
    """`more`: of the pods' description for the agent."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(Pod()) for _ in range(pods)]
        agent = stack.enter_context(agent_for(folder, *(described(pod, **more) for pod in made)))
        functions = [Function(pod, folder) for pod in made]
        for number in range(pods):
            if more:
                await until(lambda: agent.pod(number)["ready"], "ready")  # noqa: B023
            else:
                await asyncio.to_thread(agent.until_offered, number)
        found = Cluster(functions, url, broker)
        addresses = ", ".join(each.address for each in functions[:listed])
        sink = f"{{uri: '{url.url}', pods: [{addresses}]}}"
        text = routes(f"name: all, filter: plant/#, sink: {sink}, {DELIVERY}")
        async with adaptor(broker.url, text, folder) as found.running:
            if not more:
                await found.until_direct(*functions[:listed])
            yield found


async def test_a_pod_killed_under_load_loses_nothing_and_its_part_goes_to_the_others(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with cluster(broker, sink, tmp_path, 3, 3) as all_:
        victim = all_.functions[0]
        load = asyncio.create_task(all_.publish(3000))
        had = len(victim.bodies)
        await until(lambda: len(victim.bodies) > had + 50, "it is at work")
        victim.kill()
        await load
        await all_.everything()
        assert all_.running.route("all")["quarantined"] == 0
        assert all_.pod(victim)["state"] != "up"
        victim.start()
        had = len(victim.bodies)
        async with asyncio.timeout(60):
            while len(victim.bodies) == had:
                await all_.publish(5)
                await asyncio.sleep(0.05)
        await all_.everything()


async def test_a_pod_that_hangs_under_load_delays_what_it_has_and_nothing_else_is_lost(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with cluster(broker, sink, tmp_path, 3, 3) as all_:
        victim = all_.functions[1]
        load = asyncio.create_task(all_.publish(2000))
        had = len(victim.bodies)
        await until(lambda: len(victim.bodies) > had + 50, "it is at work")
        victim.wedge()
        await load
        arrived = await all_.everything()
        assert all_.pod(victim)["state"] != "up"
        os.kill(victim.process.pid, signal.SIGCONT)
        async with asyncio.timeout(60):
            while all_.pod(victim)["state"] != "up":
                await all_.publish(5)
                await asyncio.sleep(0.05)
        arrived = await all_.everything()
        twice = sum(count > 1 for count in arrived.values())
        assert twice <= 200, "what it had in flight, and what tried it again"


async def test_pods_that_come_and_leave_under_load_cost_no_event_and_no_duplicate(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with cluster(broker, sink, tmp_path, 4, 2) as all_:
        one, two, three, four = all_.functions
        load = asyncio.create_task(all_.publish(4000))
        await until(lambda: len(two.bodies) > 100, "the first two are at work")
        all_.list(one, two, three, four)
        await until(lambda: len(four.bodies) > 100, "the new ones are, too")
        all_.list(three, four)
        await until(lambda: all_.sink()["in_flight"] == 0 or len(four.bodies) > 300, "it goes on")
        all_.list()
        await until(lambda: sink.taken, "without a pod the URL has it")
        all_.list(one)
        await load
        arrived = await all_.everything()
        assert max(arrived.values()) == 1
        text = metrics(all_.running.adaptor).decode()
        (up,) = (line for line in text.splitlines() if 'state="up"' in line)
        assert up.startswith("weir_adaptor_sink_pods{") and up.endswith("} 1")
        assert all_.sink()["direct_requests"] > 0


async def test_pods_that_are_not_eligible_share_the_events_by_their_data_ports(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with cluster(broker, sink, tmp_path, 2, 2, containerConcurrency=4) as all_:
        await all_.publish(400)
        arrived = await all_.everything()
        assert max(arrived.values()) == 1
        assert min(len(each.bodies) for each in all_.functions) > 50
        assert {pod["path"] for pod in all_.sink()["pods"]} == {"relayed"}
        assert not sink.taken
        victim = all_.functions[0]
        victim.kill()  # its data port answers 502 now
        await all_.publish(100)
        await all_.everything()
        assert all_.pod(victim)["state"] != "up"
