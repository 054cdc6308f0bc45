"""Traces (contract sections 3.3 and 7.3), by the one exporter that both sides have: Zipkin's."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from tests.contract.scenario import scenario
from tests.contract.scenarios.http2 import ask, note, speaking
from tests.contract.world import World
from tests.relay.rig import Closed, Peer, get

PORT = 9411
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ZIPKIN: Any = {
    "TRACING_CONFIG_BACKEND": "zipkin",
    "TRACING_CONFIG_ZIPKIN_ENDPOINT": f"http://127.0.0.1:{PORT}/api/v2/spans",
    "TRACING_CONFIG_SAMPLE_RATE": "1",
}
HEADERS = ("traceparent", "tracestate", "b3", "x-b3-traceid", "x-b3-spanid", "x-b3-sampled")


class Collector:
    """A Zipkin server in the pod's network that keeps what it is sent."""

    def __init__(self, world: World) -> None:
        self.spans: list[dict[str, Any]] = []
        self._world = world

    async def start(self) -> None:
        server = await asyncio.start_server(self._serve, sock=self._world.place.listen(PORT))
        self._world.keep(asyncio.create_task(server.serve_forever()))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        try:
            while True:
                head = (await peer.head()).lower()
                length = re.search(rb"content-length: (\d+)", head)
                body = (
                    b"".join((await peer.chunked())[0])
                    if not length
                    else await peer.exactly(int(length[1]))
                )
                self.spans += json.loads(body)
                await peer.send(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")
        except Closed:
            writer.close()

    async def received(self, count: int) -> None:
        await self._world.until(lambda: len(self.spans) >= count, f"{count} spans")

    def tell(self) -> None:
        """Note the spans, and whose children they are; tags are of each side's library."""
        roles = {span["id"]: role(span) for span in self.spans} | {PARENT: "the client"}
        for span in self.spans:
            if "kind" in span:
                self._world.note(f"name of the span {role(span)}", span["name"])
            whose = "the client's" if span["traceId"] == TRACE else "its own"
            of = roles.get(span.get("parentId", ""), "nobody")
            self._world.note(f"span {role(span)}", f"child of {of}, trace {whose}")
        self._world.note("traces", len({span["traceId"] for span in self.spans}))


def role(span: dict[str, Any]) -> str:
    names = {"SERVER": "of the request", "CLIENT": "to the user container"}
    return names.get(span.get("kind", "")) or str(span["name"])


def told(world: World, collector: Collector) -> None:
    """Note whose ids the user container was told, and take them out of what is compared."""
    known = {TRACE: "TRACE", PARENT: "PARENT"}
    for span in collector.spans:
        known.setdefault(span["traceId"], "OWN-TRACE")
        known.setdefault(span["id"], f"<{role(span)}>")
    for request in world.user.requests:
        fields = []
        for name, value in request.fields:
            for number, meaning in known.items():
                value = value.replace(number, meaning)
            fields.append((name, re.sub(r"\b[0-9a-f]{16}\b", "<not sent>", value)))
        request.fields = fields


async def traced(world: World, count: int, *fields: str) -> None:
    collector = Collector(world)
    await collector.start()
    await world.ask("answer", get("/a?b=c", *fields))
    await collector.received(count)
    collector.tell()
    told(world, collector)


@scenario("7.3", **ZIPKIN)
async def a_trace_of_a_client(world: World) -> None:
    await traced(world, 3, f"traceparent: 00-{TRACE}-{PARENT}-01", "tracestate: x=1")


@scenario("7.3", **ZIPKIN)
async def a_trace_of_its_own(world: World) -> None:
    await traced(world, 3)


@scenario("7.3", CONTAINER_CONCURRENCY="1", **ZIPKIN)
async def a_trace_with_a_limit_has_the_wait(world: World) -> None:
    await traced(world, 4)


@scenario("7.3", **ZIPKIN)
async def a_trace_by_B3(world: World) -> None:
    await traced(world, 3, f"X-B3-TraceId: {TRACE}", f"X-B3-SpanId: {PARENT}", "X-B3-Sampled: 1")


@scenario("7.3", **ZIPKIN)
async def a_trace_that_the_client_does_not_sample(world: World) -> None:
    collector = Collector(world)
    await collector.start()
    await world.ask("not sampled", get("/", f"traceparent: 00-{TRACE}-{PARENT}-00"))
    told(world, collector)


@scenario("7.3", **(ZIPKIN | {"TRACING_CONFIG_SAMPLE_RATE": "0"}))
async def a_trace_of_a_client_at_a_rate_of_nothing(world: World) -> None:
    await traced(world, 3, f"traceparent: 00-{TRACE}-{PARENT}-01")


@scenario("7.3", **(ZIPKIN | {"TRACING_CONFIG_SAMPLE_RATE": "0"}))
async def no_trace_of_its_own_at_a_rate_of_nothing(world: World) -> None:
    await world.ask("answer", get("/"))
    for request in world.user.requests:
        request.fields = [
            (name, re.sub(r"\b([0-9a-f]{16}|[0-9a-f]{32})\b", "<not sent>", value))
            for name, value in request.fields
        ]


@scenario("7.3", **ZIPKIN)
async def probes_are_not_traced(world: World) -> None:
    collector = Collector(world)
    await collector.start()
    probe = get("/", "K-Network-Probe: queue").replace(b"curl/8", b"kube-probe/1.33")
    await world.ask("health check", probe)
    await world.ask("answer", get("/"))
    await collector.received(3)
    collector.tell()
    told(world, collector)


@scenario("7.3", **ZIPKIN)
async def h2c_a_trace(world: World) -> None:
    collector = Collector(world)
    await collector.start()
    async with speaking(world) as (side, user):
        more = ("traceparent", f"00-{TRACE}-{PARENT}-01")
        note(world, "answer", await (await side.stream(ask("/", more))).all())
        await collector.received(3)
        collector.tell()
        for stream in user.streams:
            fields = dict(stream.got.fields)
            world.note("told", {n: bool(fields.get(n)) for n in HEADERS})
        user.streams.clear()
