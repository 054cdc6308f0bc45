"""The breaker and the autoscaler's numbers (contract sections 3.6 and 5)."""

from __future__ import annotations

import asyncio
import time

from tests.contract.reports import parse_exposition, shapes
from tests.contract.scenario import scenario
from tests.contract.user import HELLO, ok
from tests.contract.world import METRIC_LABELS, World
from tests.relay.rig import Hold, get, request


@scenario("3.6", CONTAINER_CONCURRENCY="1")
async def the_twelfth_request_of_a_limit_of_one_is_refused(world: World) -> None:
    hold = Hold(HELLO)
    world.user.on("/held", hold)
    clients = [await world.client() for _ in range(11)]
    await clients[0].send(get("/held"))
    await world.user.received(1)
    for client in clients[1:]:
        await client.send(get("/held"))
    while (await world.windows(1))[0]["average_concurrent_requests"] < 11:
        pass  # not all of them have been taken yet
    await world.ask("refused", get("/more"))
    await world.ask("refused as well", request("POST", "/more", "Content-Length: 3") + b"abc")
    world.note("at the user container", len(world.user.requests))
    hold.release(11)
    for number, client in enumerate(clients):  # they need not have been served in this order
        world.note(f"answer {number}", (await client.response()).status)


@scenario("3.6", CONTAINER_CONCURRENCY="3")
async def no_more_than_the_limit_run_at_once(world: World) -> None:
    hold = Hold(HELLO)
    world.user.on("/held", hold)
    clients = [await world.client() for _ in range(8)]
    for client in clients:
        await client.send(get("/held"))
    for done in range(9):
        running = min(3, 8 - done)

        def at_the_limit(running: int = running, seen: int = min(done + 3, 8)) -> bool:
            return hold.waiting == running and len(world.user.requests) == seen

        await world.until(at_the_limit, f"{running} running after {done}")
        hold.release()
    world.note("all of them, and never more than 3 at once", len(world.user.requests))
    for number, client in enumerate(clients):
        world.note(f"answer {number}", (await client.response()).status)


@scenario("3.6", CONTAINER_CONCURRENCY="1")
async def a_client_that_leaves_the_queue_is_forgotten(world: World) -> None:
    hold = Hold(HELLO)
    world.user.on("/held", hold)
    first, gone, last = [await world.client() for _ in range(3)]
    await first.send(get("/held"))
    await world.user.received(1)
    await gone.send(get("/gone"))
    await asyncio.sleep(0.2)
    gone.reset()
    await asyncio.sleep(0.2)
    await last.send(get("/last"))
    hold.release()
    await world.answer("first", first)
    await world.answer("last", last)


@scenario("3.6", CONTAINER_CONCURRENCY="1")
async def a_client_that_leaves_frees_its_place(world: World) -> None:
    world.user.on("/hang", world.user.hang)
    gone, waits = await world.client(), await world.client()
    await gone.send(get("/hang"))
    await world.user.received(1)
    await waits.send(get("/"))
    gone.reset()
    await world.answer("the one who waited", waits)


@scenario("3.6", CONTAINER_CONCURRENCY="1", REVISION_TIMEOUT_SECONDS="1")
async def waiting_counts_against_the_timeout(world: World) -> None:
    world.user.on("/hang", world.user.hang)
    first, second = await world.client(), await world.client()
    begun = time.monotonic()
    await first.send(get("/hang"))
    await world.user.received(1)
    await asyncio.sleep(0.6)
    await second.send(get("/hang"))
    await world.answer("first", first, due=1.0, since=begun)
    await world.answer("second", second, due=1.6, since=begun)


@scenario("3.6", CONTAINER_CONCURRENCY="1")
async def a_body_of_one_who_waits_is_sent_when_its_turn_comes(world: World) -> None:
    hold = Hold(HELLO)
    world.user.on("/held", hold)
    first, second = await world.client(), await world.client()
    await first.send(get("/held"))
    await world.user.received(1)
    await second.send(request("POST", "/body", "Content-Length: 6") + b"abc")
    await asyncio.sleep(0.1)
    await second.send(b"def")
    hold.release()
    await world.answer("first", first)
    await world.answer("second", second)


@scenario("5.3")
async def what_counts_and_what_does_not(world: World) -> None:
    await world.ask("traffic", get("/"))
    await world.ask("proxied", get("/", "K-Proxy-Request: activator"))
    await world.ask("proxied by somebody else", get("/", "K-Proxy-Request: someone"))
    await world.ask("kubelet", get("/", "K-Kubelet-Probe: x"))
    await world.ask(
        "health check",
        b"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: kube-probe/1\r\nK-Network-Probe: queue\r\n\r\n",
    )
    await world.ask("network probe", get("/", "K-Network-Probe: probe", "K-Network-Hash: x"))
    await world.ask("activator's probe by anyone", get("/", "K-Network-Probe: queue"))


@scenario("5.2")
async def concurrency_is_a_mean_over_the_window(world: World) -> None:
    """Three requests that last: one of them came by the activator."""
    world.user.on("/hang", world.user.hang)
    clients = [await world.client() for _ in range(3)]
    fields = ["K-Proxy-Request: activator"]
    for number, client in enumerate(clients):
        await client.send(get("/hang", *fields[: number % 2]))
        await world.user.received(number + 1)
    (stat,) = await world.windows(1)
    world.note("pod", stat.pod_name)
    for name in sorted(stat.numbers):
        if name != "process_uptime":
            world.note(name, f"{stat[name]:g}")
    for client in clients:
        client.reset()
    await world.user.wait_for(lambda: len(world.user.cut) == 3)


@scenario("5.1")
async def the_autoscalers_port(world: World) -> None:
    for name, data in {
        "as the autoscaler asks": get("/metrics", "Accept: application/protobuf"),
        "without Accept": get("/metrics"),
        "by POST": request("POST", "/metrics", "Content-Length: 0"),
        "another path": get("/"),
        "a path below": get("/metrics/x"),
        "with a query": get("/metrics?x"),
    }.items():
        client = await world.client(9090)
        await client.send(data)
        response = await client.response()
        world.note(f"{name}: status", response.head.split(b"\r\n")[0])
        for field in ("content-type", "x-content-type-options"):
            world.note(f"{name}: {field}", response.field(field))
        if response.status == 404:
            world.note(f"{name}: body", response.body)
        again = await client.get("/metrics")
        world.note(f"{name}: once more", again.status)


@scenario("7.2")
async def the_metrics_port(world: World) -> None:
    for name, data in {
        "GET": get("/metrics"),
        "POST": request("POST", "/metrics", "Content-Length: 0"),
        "another path": get("/"),
    }.items():
        client = await world.client(9091)
        await client.send(data)
        response = await client.response()
        world.note(f"{name}: status", response.head.split(b"\r\n")[0])
        world.note(f"{name}: content-type", response.field("content-type"))


@scenario("7.2", CONTAINER_CONCURRENCY="2")
async def metrics_and_their_labels(world: World) -> None:
    world.user.on("/none", ok(b"none", status="404 Not Found"))
    for path in ("/", "/", "/none"):
        await world.ask(f"answer {len(world.facts)}", get(path, "Knative-Serving-Tag: blue"))
    await world.settled_metrics()
    exposition = parse_exposition(await world.metrics())
    for fact, value in shapes(exposition, "revision_", METRIC_LABELS).items():
        world.note(fact, value)


@scenario("7.2", SERVING_REQUEST_METRICS_BACKEND="")
async def without_a_backend_there_is_no_metrics_port(world: World) -> None:
    await world.ask("answer", get("/"))
    world.note("listens on 9091", world.place.accepts(9091))
