"""A pod's other ports and its drain (contract sections 1.5, 5.1 and 6), over real sockets.

Quiet periods are short here; that they are 30 seconds is tests/unit/test_drain.py's claim.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.relay.podrig import HOOK, MakePod
from tests.relay.rig import Closed, Hold, get, hang, post
from tests.relay.test_upgrades import SWITCHING, UPGRADE, echo
from weir.proxy import contract
from weir.proxy.podserver import Role
from weir.proxy.policy.stat import encode

# ---- 9090 ------------------------------------------------------------------------------------


async def test_the_first_scrape_names_the_pod_and_nothing_else(pod: MakePod) -> None:
    client = await (await pod()).client(Role.AUTOSCALER)
    answer = await client.get("/metrics", "Accept: text/plain")
    assert (answer.status, answer.body) == (200, encode("pod-1"))
    assert answer.field("content-type") == "application/protobuf"


async def test_a_period_later_the_requests_of_that_period_are_told(pod: MakePod) -> None:
    made = await pod()
    scraper, client = await made.client(Role.AUTOSCALER), await made.client()
    for proxied in ("K-Proxy-Request: activator", "X-A: b", "X-A: b"):
        assert (await client.get("/", proxied)).status == 200

    async def counted() -> bool:
        body = (await scraper.get("/metrics")).body
        # field 4 (3 requests) and 5 (one of them proxied), doubles
        return bytes.fromhex("210000000000000840 29000000000000f03f 31") in body

    await made.until(counted)


async def test_other_paths_and_ports_answer_404(pod: MakePod) -> None:
    made = await pod()
    for role, path in ((Role.AUTOSCALER, "/"), (Role.METRICS, "/x"), (Role.ADMIN, "/metrics")):
        answer = await (await made.client(role)).get(path)
        assert (answer.status, answer.body) == (404, b"404 page not found\n")


async def test_heads_of_the_other_ports_are_small(pod: MakePod) -> None:
    made = await pod()
    for role in (Role.ADMIN, Role.AUTOSCALER, Role.METRICS):
        assert (await (await made.client(role)).get("/x", "A: " + 60_000 * "a")).status == 404
        assert (await (await made.client(role)).get("/x", "A: " + 70_000 * "a")).status == 431


async def test_the_autoscaler_port_takes_any_method_the_metrics_port_only_reads(
    pod: MakePod,
) -> None:
    made = await pod()
    assert (await (await made.client(Role.AUTOSCALER)).ask(post("/metrics", b"x"))).status == 200
    client = await made.client(Role.METRICS)
    assert (await client.ask(post("/metrics", b"x"))).status == 405
    page = await client.get("/metrics")
    assert (page.status, page.body) == (200, b"# metrics\n")


# ---- SIGTERM ---------------------------------------------------------------------------------


async def test_a_terminating_pod_fails_probes_at_once_and_serves_until_it_is_quiet(
    pod: MakePod,
) -> None:
    made = await pod(quiet=0.5)
    assert await made.ready() == 200
    drained = made.terminate()
    assert await made.ready() == 503
    client = await made.client()
    begun = time.monotonic()
    while time.monotonic() - begun < 1.0:  # twice the quiet period
        assert (await client.get()).status == 200
    assert not drained.done()
    await drained
    assert await made.refused()
    assert await client.closed()


async def test_new_connections_are_taken_while_it_drains(pod: MakePod) -> None:
    made = await pod()
    made.terminate()
    answer = await (await made.client()).get()
    assert answer.status == 200
    assert answer.field("connection") is None


async def test_the_autoscaler_is_answered_until_the_end(pod: MakePod) -> None:
    made = await pod()
    drained = made.terminate()
    await drained
    assert (await (await made.client(Role.AUTOSCALER)).get("/metrics")).status == 200


async def test_a_request_in_flight_holds_the_hook_and_the_end(pod: MakePod) -> None:
    made = await pod(quiet=0.05)
    hold = Hold()
    made.user.on("/long", hold)
    client, hook = await made.client(), await made.client(Role.ADMIN)
    await client.send(get("/long"))
    await made.user.received(1)
    await hook.send(HOOK)
    drained = made.terminate()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(hook.reader.read(1), 0.4)  # eight quiet periods
    assert not drained.done()
    hold.release()
    assert (await client.response()).body == b"held"
    assert (await hook.response()).status == 200
    await drained


async def test_a_request_that_outlasts_the_grace_period_no_longer_holds_the_hook(
    pod: MakePod,
) -> None:
    made = await pod(quiet=0.05, grace=5.2)  # of which the user container is left 5 s
    made.user.on("/long", hang)
    client, hook = await made.client(), await made.client(Role.ADMIN)
    await client.send(get("/long"))
    await made.user.received(1)
    drained = made.terminate()
    assert (await hook.ask(HOOK)).status == 200
    assert not drained.done(), "the request is still served"


async def test_an_upgraded_connection_does_not_hold_the_hook_and_may_go_on_for_a_while(
    pod: MakePod,
) -> None:
    made = await pod(quiet=0.05, upgraded_seconds=0.5)
    made.user.on("/ws", echo)
    client, hook = await made.client(), await made.client(Role.ADMIN)
    await client.send(UPGRADE)
    assert await client.head() == SWITCHING
    drained = made.terminate()
    assert (await hook.ask(HOOK)).status == 200
    await client.send(b"still here")
    assert await client.exactly(10) == b"still here"
    await drained
    made.server.close()
    assert await client.closed()


async def test_an_upgraded_connection_that_ends_ends_the_drain(pod: MakePod) -> None:
    made = await pod(quiet=0.05)
    made.user.on("/ws", echo)
    client = await made.client()
    await client.send(UPGRADE)
    await client.head()
    drained = made.terminate()
    await made.until(made.refused)
    assert not drained.done()
    client.close()
    await drained


# ---- the hook --------------------------------------------------------------------------------


async def test_all_callers_of_the_hook_return_when_the_pod_has_drained(pod: MakePod) -> None:
    made = await pod()
    hooks = [await made.client(Role.ADMIN) for _ in range(3)]
    for hook in hooks:
        await hook.send(HOOK)
    drained = made.terminate()
    for hook in hooks:
        answer = await hook.response()
        assert (answer.status, answer.body) == (200, b"")
    await drained
    assert (await (await made.client(Role.ADMIN)).ask(HOOK)).status == 200, "and later ones at once"


async def test_a_hook_without_sigterm_returns_after_a_second_and_probes_recover(
    pod: MakePod,
) -> None:
    made = await pod(quiet=30)
    hook = await made.client(Role.ADMIN)
    begun = time.monotonic()
    await hook.send(HOOK)

    async def failing() -> bool:
        return await made.ready() == 503

    await made.until(failing)
    assert (await hook.response()).status == 200
    assert time.monotonic() - begun >= 1.0
    assert await made.ready() == 200


async def test_a_caller_that_gives_up_takes_nobody_with_it(pod: MakePod) -> None:
    made = await pod()
    impatient, patient = await made.client(Role.ADMIN), await made.client(Role.ADMIN)
    await impatient.send(HOOK)
    await patient.send(HOOK)
    impatient.reset()
    made.terminate()
    assert (await patient.response()).status == 200


async def test_closing_ends_everything_at_once(pod: MakePod) -> None:
    made = await pod()
    made.user.on("/long", hang)
    client, hook = await made.client(), await made.client(Role.ADMIN)
    await client.send(get("/long"))
    await hook.send(HOOK)
    await made.user.received(1)
    made.server.close()
    made.server.close()
    with pytest.raises(Closed):
        await client.response()
    assert await hook.closed()
    assert await made.refused()


@pytest.mark.parametrize(
    ("role", "name"),
    [(Role.METRICS, "READ_METRICS_HEAD_SECONDS"), (Role.ADMIN, "READ_HEAD_SECONDS")],
)
async def test_who_takes_too_long_to_ask_is_cut_off(
    pod: MakePod, monkeypatch: pytest.MonkeyPatch, role: Role, name: str
) -> None:
    monkeypatch.setattr(contract, name, 0.1)
    client = await (await pod()).client(role)
    await client.send(b"GET /metrics HT")
    assert await client.closed()


def test_the_metrics_port_waits_for_five_seconds_and_the_others_for_a_minute() -> None:
    assert (contract.READ_METRICS_HEAD_SECONDS, contract.READ_HEAD_SECONDS) == (5, 60)
    assert contract.READ_PROFILING_HEAD_SECONDS == 15
