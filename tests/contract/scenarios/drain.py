"""What happens from SIGTERM to the exit, and on 8022 (contract section 6)."""

from __future__ import annotations

import asyncio
import signal
import time

from tests.contract.scenario import scenario
from tests.contract.scenarios.probes import HASH, probe
from tests.contract.scenarios.upgrades import upgraded
from tests.contract.world import ADMIN, Caller, World
from tests.relay.rig import Closed, get

QUIET = 30.0


async def hook(world: World) -> Caller:
    """The kubelet's preStop hook, which waits."""
    client = await world.client(ADMIN)
    await client.send(get("/wait-for-drain"))
    return client


async def draining(world: World) -> None:
    """Wait until the signal has had its effect, which probes see first."""
    end = time.monotonic() + 5
    while True:
        client = await world.client()
        await client.send(probe())
        if (await client.response()).status == 503:
            return
        client.close()
        assert time.monotonic() < end, "probes do not fail"


@scenario("6", long=True)
async def an_idle_pod_drains_for_thirty_seconds(world: World) -> None:
    """Probes fail at once, on new connections and on old; everything else goes on."""
    old = await world.client()
    await world.ask("before", get("/"), client=old)
    hooks = [await hook(world) for _ in range(2)]
    world.terminate()
    begun = time.monotonic()
    await draining(world)
    await world.ask("health check", probe())
    await world.ask("network probe", probe("probe", "curl/8", HASH))
    await world.ask("unknown probe", probe("nonsense"))
    await world.ask("health check on an old connection", probe(), client=old)
    hooks.append(await hook(world))
    await asyncio.sleep(5)
    await world.ask("traffic on the old connection", get("/"), client=old)
    last = time.monotonic()
    await world.ask("traffic on a new one", get("/"))
    stat = await world.stat()
    world.note("9090 still says who it is", stat.pod_name)
    for number, client in enumerate(hooks):
        client.patience = 60.0
        response = await client.response()  # upstream, the shutdown may say `close` in it or not
        world.note(f"hook {number}", (response.status, response.body))
        world.when(f"hook {number}", time.monotonic() - last, QUIET)
    world.note("exit status", await world.exited())
    world.when("exit", time.monotonic() - begun, QUIET + 5)


@scenario("6", long=True)
async def a_request_in_flight_is_finished_after_the_quiet_time(world: World) -> None:
    """It does not hold the drain, only the exit: 35 s of work, a deletion in the middle."""
    world.user.on("/slow", world.user.slow(33.0))
    client = await world.client()
    begun = time.monotonic()
    await client.send(get("/slow"))
    await world.user.received(1)
    world.terminate()
    await draining(world)
    await asyncio.sleep(31.5)
    world.note("listens on 8012", world.place.accepts(8012))
    world.told("answer", await client.response())
    world.when("answer", time.monotonic() - begun, 33.0)
    world.note("exit status", await world.exited())
    world.when("exit", time.monotonic() - begun, 33.0)


@scenario("6", long=True)
async def an_upgraded_connection_at_the_end_of_the_drain(world: World) -> None:
    """1.15 cuts it; the contract gives it up to 60 s more, and here it ends after 33."""
    client = await upgraded(world)
    world.terminate()
    begun = time.monotonic()
    await draining(world)
    await asyncio.sleep(32)
    await client.send(b"ping")
    try:
        world.note("echo after 32 s", await client.exactly(4))
    except Closed:
        world.note("echo after 32 s", "closed")
    client.close()
    world.note("exit status", await world.exited())
    world.when("exit", time.monotonic() - begun, QUIET + 2)


@scenario("6")
async def a_second_signal_ends_it_at_once(world: World) -> None:
    world.terminate()
    await draining(world)
    world.terminate()
    begun = time.monotonic()
    world.note("exit status", await world.exited())
    world.when("exit", time.monotonic() - begun, 0.0)


@scenario("6")
async def SIGINT_is_like_SIGTERM(world: World) -> None:
    world.terminate(signal.SIGINT)
    await draining(world)
    await world.ask("traffic", get("/"))
    world.terminate()
    world.note("exit status", await world.exited())


@scenario("6")
async def a_hook_without_a_signal_is_over_after_a_second(world: World) -> None:
    """The user container restarts alone; probes fail for that second, and recover."""
    begun = time.monotonic()
    first, second = await hook(world), await hook(world)
    await draining(world)
    await world.ask("traffic meanwhile", get("/"))
    world.told("first", await first.response())
    world.when("first", time.monotonic() - begun, 1.0)
    world.told("second", await second.response())
    world.when("second", time.monotonic() - begun, 1.0)
    await world.ask("health check after", probe())
    await asyncio.sleep(0.3)  # upstream, the end of the second hook could end the third as well
    begun = time.monotonic()
    third = await hook(world)
    world.told("third", await third.response())
    world.when("third", time.monotonic() - begun, 1.0)


@scenario("6")
async def a_signal_within_the_second_of_a_hook_is_a_drain(world: World) -> None:
    client = await hook(world)
    await draining(world)
    world.terminate()
    world.note("the hook waits", await client.silent(2.0))
    await world.ask("health check", probe())
    world.terminate()
    world.note("exit status", await world.exited())


@scenario("6")
async def the_other_paths_of_8022(world: World) -> None:
    await world.ask("root", get("/"), port=ADMIN)
    await world.ask("below", get("/wait-for-drain/x"), port=ADMIN)
    await world.ask("health", get("/health"), port=ADMIN)
