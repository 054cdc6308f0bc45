"""Plays scenarios in two worlds each, several at once, while the tests wait for their verdicts.

Most scenarios wait for timers most of the time, so one after the other would take many minutes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Sequence

from tests.command import weir
from tests.contract.deviations import DEVIATIONS
from tests.contract.original import queue_proxy
from tests.contract.scenario import Scenario, judge
from tests.contract.world import World

AT_ONCE = 6
ATTEMPTS = 3
Accounts = tuple[dict[str, str], dict[str, str]]

WEIR = weir("sidecar")


async def account(command: Sequence[str], scenario: Scenario) -> World:
    """The world, when all is over, with the facts that the sidecar brought to light."""
    async with World(command, scenario.environment, ready=scenario.ready) as world:
        try:
            await scenario.play(world)
            if scenario.ready:
                await world.report()
        except AssertionError as error:
            error.add_note(f"{command[0]} said: {world.stderr[-1500:]}")
            raise
        return world


async def accounts(scenario: Scenario, original: str) -> Accounts:
    """Both worlds at the same time, so that a busy machine is busy for both.

    Where something was late it is played once more: what is late again is no accident. So it is
    where they differ, because the witness has races of its own; Weir has to say the same again.
    """
    said: dict[str, str] | None = None
    for _ in range(ATTEMPTS):
        async with asyncio.TaskGroup() as group:
            theirs = group.create_task(account([original], scenario))
            ours = group.create_task(account(WEIR, scenario))
        found = theirs.result().facts, ours.result().facts
        if theirs.result().stalled or ours.result().stalled:
            continue
        said = said or found[1]
        if said != found[1]:
            return found[0], said
        if not judge(scenario.name, *found, DEVIATIONS):
            break
    return found


class Campaign:
    """A thread with a loop of its own; `accounts(name)` waits for what it finds out."""

    def __init__(self, scenarios: Sequence[Scenario]) -> None:
        self._original = str(queue_proxy())
        self._scenarios = sorted(scenarios, key=lambda scenario: not scenario.long)
        self._results: dict[str, concurrent.futures.Future[Accounts]] = {
            scenario.name: concurrent.futures.Future() for scenario in scenarios
        }
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="campaign", daemon=True)
        self._thread.start()

    def accounts(self, name: str) -> Accounts:
        return self._results[name].result()

    def stop(self) -> None:
        """Also when scenarios are still on their way."""
        if self._main is not None:
            with contextlib.suppress(RuntimeError):  # it is over by itself
                self._main.get_loop().call_soon_threadsafe(self._main.cancel)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(self._all())

    async def _all(self) -> None:
        self._main = asyncio.current_task()
        free = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for scenario in self._scenarios:
                group.create_task(self._one(scenario, None if scenario.long else free))

    async def _one(self, scenario: Scenario, free: asyncio.Semaphore | None) -> None:
        result = self._results[scenario.name]
        try:
            if free is None:
                result.set_result(await accounts(scenario, self._original))
            else:
                async with free:
                    result.set_result(await accounts(scenario, self._original))
        except Exception as error:  # noqa: BLE001 - the test that asks for it gets it
            result.set_exception(error)
