"""Health checks and network probes on the data port (contract sections 3.2 and 4)."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

from tests.contract.scenario import Scenario, add, scenario
from tests.contract.user import ok
from tests.contract.world import USER, World
from tests.relay.rig import get, request

TCP: dict[str, object] = {"tcpSocket": {"port": USER, "host": "127.0.0.1"}}


def http(path: str = "/healthz", **more: object) -> dict[str, object]:
    get: dict[str, object] = {"path": path, "port": USER, "host": "127.0.0.1", "scheme": "HTTP"}
    return {"httpGet": {**get, **more}}


def once(handler: dict[str, object], seconds: int = 1) -> str:
    """One try per health check (4.3)."""
    scalars = {"periodSeconds": 10, "timeoutSeconds": seconds, "successThreshold": 1}
    return json.dumps({**handler, **scalars})


def aggressive(handler: dict[str, object], successes: int = 1) -> str:
    return json.dumps({**handler, "successThreshold": successes})


def probe(value: str = "queue", agent: str = "kube-probe/1.33", *fields: str) -> bytes:
    lines = ["GET / HTTP/1.1", "Host: bench.example.com"]
    lines += [f"User-Agent: {agent}"] if agent else []
    lines += [f"K-Network-Probe: {value}"] if value else []
    return "\r\n".join([*lines, *fields, "", ""]).encode()


@dataclass(frozen=True)
class Dispatch:
    """A request, and who answers it."""

    name: str
    data: bytes

    async def play(self, world: World) -> None:
        client = await world.client()
        await world.ask("answer", self.data, client=client)
        await world.ask("the next request on this connection", get("/next"), client=client)


HASH = "K-Network-Hash: deadbeef"
for case in [
    Dispatch("the_kubelet_is_answered_queue", probe()),
    Dispatch("the_activator_is_answered_queue", probe(agent="Knative-Activator-Probe")),
    Dispatch("the_autoscaler_could_be_answered_queue", probe(agent="Knative-Autoscaling-Probe")),
    Dispatch(
        "the_autoscaler_is_not_answered_activator", probe("activator", "Knative-Autoscaling-Probe")
    ),
    Dispatch("an_agent_that_begins_like_the_activator", probe(agent="Knative-Activator-Probes/2")),
    Dispatch("an_agent_in_lower_case_is_another", probe(agent="knative-activator-probe")),
    Dispatch("kube_probe_without_a_slash_is_another", probe(agent="kube-probe")),
    Dispatch("a_kubelet_without_a_probe_header", probe("")),
    Dispatch("a_kubelet_with_an_unknown_probe", probe("nonsense")),
    Dispatch("a_kubelet_with_a_network_probe", probe("probe", "kube-probe/1.33", HASH)),
    Dispatch("the_probe_of_a_Weir_client", probe("weir", "Knative-Activator-Probe (weir)")),
    Dispatch("a_network_probe", probe("probe", "curl/8", HASH)),
    Dispatch("a_network_probe_of_the_ingress", probe("probe", "Knative-Ingress-Probe", HASH)),
    Dispatch("a_network_probe_without_an_agent", probe("probe", "", HASH)),
    Dispatch("a_network_probe_without_a_hash", probe("probe", "curl/8")),
    Dispatch("a_network_probe_with_an_empty_hash", probe("probe", "curl/8", "K-Network-Hash:")),
    Dispatch("probe_queue_from_anyone_else_goes_to_the_user", probe("queue", "curl/8")),
    Dispatch("probe_activator_from_anyone_else_goes_to_the_user", probe("activator", "curl/8")),
    Dispatch("a_probe_header_in_upper_case_goes_to_the_user", probe("PROBE", "curl/8", HASH)),
    Dispatch("K_Kubelet_Probe_goes_to_the_user", probe("", "curl/8", "K-Kubelet-Probe: x")),
    Dispatch("an_empty_K_Kubelet_Probe_is_none", probe("", "curl/8", "K-Kubelet-Probe:")),
    Dispatch(
        "a_health_check_may_have_a_body",
        b"POST /any HTTP/1.1\r\nHost: x\r\nUser-Agent: kube-probe/1\r\n"
        b"K-Network-Probe: queue\r\nContent-Length: 2\r\n\r\nxx",
    ),
    Dispatch("HEAD_of_a_health_check", probe().replace(b"GET", b"HEAD")),
    Dispatch("a_health_check_that_closes", probe("queue", "kube-probe/1", "Connection: close")),
    Dispatch(
        "the_first_of_two_probe_headers_counts",
        probe("queue", "kube-probe/1", "K-Network-Probe: x"),
    ),
]:
    add(Scenario(case.name, "3.2", case.play))


@dataclass(frozen=True)
class Check:
    """A health check, with a readiness probe and a user container that answers it so."""

    name: str
    probe: str
    answer: bytes = b""
    path: str = "/healthz"
    due: float = 0.0
    listens: bool = True
    more: dict[str, str] = field(default_factory=dict)

    async def play(self, world: World) -> None:
        if self.answer:
            world.user.on(self.path, self.answer)
        else:
            world.user.on(self.path, world.user.hang)
        if not self.listens:
            await world.user.stop()
        await world.ask("answer", probe(), due=self.due)


for check in [
    Check("TCP_once", once(TCP)),
    Check("TCP_once_refused", once(TCP), listens=False),
    Check("HTTP_once", once(http()), ok(b"fine")),
    Check("HTTP_with_a_query", once(http("/healthz?full=1")), ok(b"fine")),
    Check("HTTP_without_a_slash", once(http("healthz")), ok(b"fine")),
    Check("HTTP_404", once(http()), ok(b"none", status="404 Not Found")),
    Check("HTTP_500", once(http()), ok(b"oh", status="500 Internal Server Error")),
    Check("HTTP_399", once(http()), ok(b"odd", status="399 Odd")),
    Check("HTTP_304", once(http()), ok(b"", status="304 Not Modified")),
    Check(
        "HTTP_redirected",
        once(http("/old")),
        ok(b"", "Location: /new", status="302 Found"),
        path="/old",
    ),
    Check(
        "HTTP_redirected_in_a_circle",
        once(http("/old")),
        ok(b"", "Location: /old", status="302 Found"),
        path="/old",
    ),
    Check(
        "HTTP_with_headers",
        once(http(httpHeaders=[{"name": "X-Probe", "value": "a"}, {"name": "Host", "value": "h"}])),
        ok(b"fine"),
    ),
    Check(
        "HTTP_with_an_agent_of_its_own",
        once(http(httpHeaders=[{"name": "User-Agent", "value": "me"}])),
        ok(b"fine"),
    ),
    Check("HTTP_too_slow", once(http()), due=1.0),
    Check("HTTP_slow_but_in_time", once(http(), 3), due=3.0),
    Check("TCP_aggressive", aggressive(TCP)),
    Check("HTTP_aggressive", aggressive(http()), ok(b"fine")),
    Check("three_successes_at_50_ms", aggressive(http(), 3), ok(b"fine")),
    Check("no_probe_at_all", ""),
    Check(
        "two_containers",
        f"[{once(TCP)}, {once(http())}]",
        ok(b"fine"),
        more={"ENABLE_MULTI_CONTAINER_PROBES": "true"},
    ),
    Check(
        "two_containers_and_one_is_not_ready",
        f"[{once(TCP)}, {once(http())}]",
        ok(b"no", status="500 No"),
        more={"ENABLE_MULTI_CONTAINER_PROBES": "true"},
    ),
    Check(
        "HTTP_auto_detection_of_HTTP_1",
        once(http()),
        ok(b"fine"),
        more={"ENABLE_HTTP2_AUTO_DETECTION": "true"},
    ),
]:
    add(
        Scenario(
            f"health_check_{check.name}",
            "4.3",
            check.play,
            {"SERVING_READINESS_PROBE": check.probe, **check.more},
        )
    )


@scenario("4.3", long=True)
async def an_aggressive_probe_gives_up_after_ten_seconds(world: World) -> None:
    await world.user.stop()
    await world.ask("answer", probe(), due=10.0)


@scenario("4.3")
async def an_aggressive_probe_sees_the_user_container_come(world: World) -> None:
    """And two who ask share one run."""
    await world.user.stop()
    clients = [await world.client() for _ in range(2)]
    for client in clients:
        await client.send(probe())
    await asyncio.sleep(0.4)  # long enough that both wait
    begun = time.monotonic()
    await world.user.start(world.place.listen(USER))
    for number, client in enumerate(clients):
        world.told(f"answer {number}", await client.response())
    world.when("both", time.monotonic() - begun, 0.0)


@scenario("4.3", SERVING_READINESS_PROBE=once(http()))
async def health_checks_at_the_same_time_share_one_run(world: World) -> None:
    world.user.on("/healthz", world.user.slow(0.3))
    clients = [await world.client() for _ in range(5)]
    for client in clients:
        await client.send(probe())
    for number, client in enumerate(clients):
        world.told(f"answer {number}", await client.response())


@scenario("4.3", SERVING_READINESS_PROBE=once(http()))
async def a_run_goes_on_when_the_one_who_asked_is_gone(world: World) -> None:
    world.user.on("/healthz", world.user.slow(0.3))
    gone, stays = await world.client(), await world.client()
    await gone.send(probe())
    await world.user.received(1)
    gone.reset()
    await world.ask("answer", probe(), client=stays)


@scenario("4.3", SERVING_READINESS_PROBE=once(http()))
async def connections_of_a_probe_are_not_kept(world: World) -> None:
    world.user.on("/healthz", ok(b"fine"))
    for number in range(2):
        await world.ask(f"answer {number}", probe())
    await world.user.wait_for(lambda: world.user.open == 0)
    world.note("connections of the user container", world.user.connections)


@scenario("4.1", CONTAINER_CONCURRENCY="1")
async def probes_bypass_a_breaker_that_is_full(world: World) -> None:
    world.user.on("/hang", world.user.hang)
    client = await world.client()
    await client.send(get("/hang"))
    await world.user.received(1)
    await world.ask("health check", probe())
    await world.ask("network probe", probe("probe", "curl/8", HASH))
    await world.ask("kubelet", request("GET", "/kubelet", "K-Kubelet-Probe: x"))
    client.reset()
    await world.user.left("/hang")


@scenario("4.1", SERVING_READINESS_PROBE=once(TCP))
async def a_network_probe_says_nothing_about_the_user_container(world: World) -> None:
    await world.user.stop()
    await world.ask("network probe", probe("probe", "curl/8", HASH))
    await world.ask("health check", probe())
