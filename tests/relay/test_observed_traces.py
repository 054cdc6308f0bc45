"""Spans of requests, and what the user container is told of them (contract sections 3.3, 7.3)."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from tests.collector import Collector, attributes
from tests.relay.rig import Hold, Rig, die, get
from weir.proxy.contract import RevisionSettings
from weir.proxy.environment import Observability, RequestLog, SidecarSettings, Tracing
from weir.proxy.observe.observability import Observability as Observed
from weir.proxy.observe.observability import observers_for

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
CLIENT, SERVER = 3, 2


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


class Traced:
    def __init__(self, rig: Rig, observed: Observed, collector: Collector) -> None:
        self.rig = rig
        self._observed = observed
        self._collector = collector

    async def spans(self) -> dict[str, Any]:
        """All spans of the only trace, by name; nothing is recorded after this."""
        await self._observed.stop()
        return {span.name: span for span in self._collector.spans}

    async def stop(self) -> None:
        await self._observed.stop(0.5)

    def told(self) -> dict[str, str | None]:
        """What the user container was told."""
        names = ("traceparent", "tracestate", "baggage", "x-b3-traceid", "x-b3-sampled")
        return {name: self.rig.user.requests[-1].field(name) for name in names}


Start = Callable[..., Awaitable[Traced]]


@pytest.fixture
async def trace(rig: Callable[..., Awaitable[Rig]], collector: Collector) -> AsyncIterator[Start]:
    started: list[Traced] = []

    async def start(
        rate: float = 1.0, protocol: str = "http/protobuf", log: str = "", **settings: Any
    ) -> Traced:
        made = await rig(**settings)
        where = {"grpc": collector.grpc, "zipkin": f"{collector.url}/api/v2/spans"}
        wanted = Observability(
            names="current",
            service_name="hello",
            tracing=Tracing(protocol, where.get(protocol, collector.url), rate),
            request_log=RequestLog(bool(log), log, False),
        )
        concurrency = made.relay.settings.container_concurrency
        revision = RevisionSettings(
            user_port=made.user.port, pod="pod-1", container_concurrency=concurrency
        )
        observed = observers_for(
            SidecarSettings(revision, 8012, 8112, "10.0.0.1", observability=wanted)
        )
        made.relay.observers.extend(observed.observers)
        await observed.start()
        started.append(Traced(made, observed, collector))
        return started[-1]

    yield start
    for traced in started:
        await traced.stop()


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_request_is_three_spans_under_the_client_s(trace: Start, protocol: str) -> None:
    traced = await trace(protocol=protocol)
    client = await traced.rig.client()
    parent = f"Traceparent: 00-{TRACE}-{PARENT}-01"
    assert (await client.get("/a?b=c", parent, "Tracestate: x=1", "Baggage: k=v")).status == 200
    spans = await traced.spans()
    assert set(spans) == {"GET", "kn.queueproxy.proxy", "HTTP GET"}
    server, proxy, user = spans["GET"], spans["kn.queueproxy.proxy"], spans["HTTP GET"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert server.parent_span_id.hex() == PARENT
    assert proxy.parent_span_id == server.span_id
    assert user.parent_span_id == proxy.span_id
    assert (server.kind, user.kind) == (SERVER, CLIENT)
    assert traced.told() == {
        "traceparent": f"00-{TRACE}-{user.span_id.hex()}-01",
        "tracestate": "x=1",
        "baggage": "k=v",
        "x-b3-traceid": None,
        "x-b3-sampled": None,
    }
    told = attributes(server.attributes)
    assert told["http.request.method"] == "GET"
    assert told["http.response.status_code"] == 200
    assert told["url.path"] == "/a"
    assert told["server.address"] == "example.com"
    assert told["user_agent.original"] == "curl/8"
    assert told["network.peer.address"] == "127.0.0.1"
    told = attributes(user.attributes)
    assert told["url.full"] == f"http://127.0.0.1:{traced.rig.user.port}/a?b=c"
    assert told["http.response.status_code"] == 200
    assert server.start_time_unix_nano <= user.start_time_unix_nano <= user.end_time_unix_nano
    assert user.end_time_unix_nano <= server.end_time_unix_nano


async def test_with_a_breaker_the_wait_is_a_span(trace: Start) -> None:
    traced = await trace(container_concurrency=1)
    hold = Hold()
    traced.rig.user.on("/hold", hold)
    first, second = await traced.rig.client(), await traced.rig.client()
    await first.send(get("/hold", f"Traceparent: 00-{TRACE}-{PARENT}-00"))
    await traced.rig.settled(lambda: hold.waiting == 1)
    await second.send(get("/hold"))
    await traced.rig.counted(2)
    hold.release(2)
    await first.response()
    await second.response()
    await traced.rig.settled(lambda: traced.rig.relay.in_line == 0)
    await traced.stop()
    spans = [span for span in traced._collector.spans if span.trace_id.hex() != TRACE]
    assert sorted(span.name for span in spans) == [
        "GET",
        "HTTP GET",
        "kn.queueproxy.proxy",
        "kn.queueproxy.wait",
    ]
    by_name = {span.name: span for span in spans}
    wait, proxy = by_name["kn.queueproxy.wait"], by_name["kn.queueproxy.proxy"]
    user = by_name["HTTP GET"]
    assert proxy.parent_span_id == by_name["GET"].span_id
    assert wait.parent_span_id == user.parent_span_id == proxy.span_id
    assert proxy.start_time_unix_nano == wait.start_time_unix_nano < wait.end_time_unix_nano
    assert wait.end_time_unix_nano == user.start_time_unix_nano


async def test_without_a_parent_a_trace_begins_here(trace: Start) -> None:
    traced = await trace()
    await (await traced.rig.client()).get("/", "Tracestate: of=nothing")
    spans = await traced.spans()
    assert spans["GET"].parent_span_id == b""
    expected = f"00-{spans['GET'].trace_id.hex()}-{spans['HTTP GET'].span_id.hex()}-01"
    assert traced.told()["traceparent"] == expected
    assert traced.told()["tracestate"] is None


@pytest.mark.parametrize(
    ("rate", "flags", "sampled"), [(0.5, "01", True), (0.5, "00", False), (0.0, "01", False)]
)
async def test_the_sampler_follows_the_parent_unless_it_is_off(
    trace: Start, rate: float, flags: str, sampled: bool
) -> None:
    traced = await trace(rate)
    await (await traced.rig.client()).get("/", f"Traceparent: 00-{TRACE}-{PARENT}-{flags}")
    spans = await traced.spans()
    assert bool(spans) == sampled
    told = traced.told()["traceparent"]
    assert told is not None  # the trace goes on also when nobody records it
    assert told.startswith(f"00-{TRACE}-") and told.endswith("-01" if sampled else "-00")
    assert PARENT not in told


@pytest.mark.parametrize(
    "bad", ["garbage", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01"]
)
async def test_a_parent_that_makes_no_sense_is_none(trace: Start, bad: str) -> None:
    traced = await trace()
    await (await traced.rig.client()).get("/", f"Traceparent: {bad}")
    spans = await traced.spans()
    assert spans["GET"].parent_span_id == b""


async def test_errors_are_told_in_spans(trace: Start) -> None:
    traced = await trace()
    traced.rig.user.on("/die", die)
    client = await traced.rig.client()
    assert (await client.ask(b"POST /die HTTP/1.1\r\nHost: h\r\n\r\n")).status == 502
    spans = await traced.spans()
    assert attributes(spans["POST"].attributes)["http.response.status_code"] == 502
    assert attributes(spans["HTTP POST"].attributes)["error.type"] == "errors.errorString"
    assert spans["POST"].status.code == spans["HTTP POST"].status.code == 2


async def test_probes_are_not_traced(trace: Start) -> None:
    traced = await trace()
    client = await traced.rig.client()
    probe = get("/", "K-Network-Probe: queue")
    assert (await client.ask(probe)).status == 200  # proxied, because its agent is nobody's
    assert traced.told()["traceparent"] is None
    await client.ask(probe.replace(b"curl/8", b"kube-probe/1.30"))
    assert await traced.spans() == {}


async def test_without_tracing_the_headers_stay_as_they_came(trace: Start) -> None:
    traced = await trace(protocol="none")
    parent = f"00-{TRACE}-{PARENT}-01"
    client = await traced.rig.client()
    await client.get("/", f"Traceparent: {parent}", "X-B3-TraceId: 1")
    assert traced.told()["traceparent"] == parent
    await client.get("/")
    assert traced.told()["traceparent"] is None


async def test_the_request_log_shows_the_trace_that_the_client_sent(
    trace: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    traced = await trace(log='{{.TraceID}} {{.Request.Header.Get "Traceparent"}}')
    parent = f"00-{TRACE}-{PARENT}-01"
    await (await traced.rig.client()).get("/", f"Traceparent: {parent}")
    await traced.spans()
    assert capfd.readouterr().out == f"{TRACE} {parent}\n"


async def test_spans_on_stdout(trace: Start, capfd: pytest.CaptureFixture[str]) -> None:
    traced = await trace(protocol="stdout")
    await (await traced.rig.client()).get("/")
    await traced.spans()
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert sorted(line["name"] for line in lines) == ["GET", "HTTP GET", "kn.queueproxy.proxy"]


async def test_zipkin_is_sent_spans_and_its_headers_are_understood(
    trace: Start, collector: Collector
) -> None:
    traced = await trace(protocol="zipkin")
    await (await traced.rig.client()).get(
        "/", f"X-B3-TraceId: {TRACE}", f"X-B3-SpanId: {PARENT}", "X-B3-Sampled: 1"
    )
    await traced.spans()
    assert sorted(span["name"] for span in collector.zipkin) == ["/", "/", "queue_proxy"]
    spans = {span.get("kind", "between"): span for span in collector.zipkin}
    assert {span["traceId"] for span in spans.values()} == {TRACE}
    assert spans["SERVER"]["parentId"] == PARENT
    assert spans["between"]["parentId"] == spans["SERVER"]["id"]
    assert spans["CLIENT"]["parentId"] == spans["between"]["id"]
    assert spans["SERVER"]["localEndpoint"] == {"serviceName": "hello"}
    assert spans["SERVER"]["tags"]["http.response.status_code"] == "200"
    told = traced.told()
    assert (told["x-b3-traceid"], told["x-b3-sampled"]) == (TRACE, "1")
    assert told["traceparent"] == f"00-{TRACE}-{spans['CLIENT']['id']}-01"


@pytest.mark.parametrize(("sampled", "rate", "spans"), [(1, 0.0, 3), (0, 0.0, 0), (0, 1.0, 3)])
async def test_before_v1_19_a_parent_that_is_sampled_is_followed_at_any_rate(
    trace: Start, collector: Collector, sampled: int, rate: float, spans: int
) -> None:
    traced = await trace(rate, protocol="zipkin")
    client = await traced.rig.client()
    await client.get("/", f"traceparent: 00-{TRACE}-{PARENT}-0{sampled}")
    await traced.stop()
    assert len(collector.zipkin) == spans
    assert str(traced.told()["traceparent"]).endswith(f"-0{min(spans, 1)}")
