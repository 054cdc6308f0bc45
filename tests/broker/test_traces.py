"""Traces through the adaptor: the publisher's context reaches the function, with or without spans
of our own between them, and a collector gets those."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.broker.harness import (
    Answer,
    Mosquitto,
    Request,
    Sink,
    adaptor,
    one_route,
    properties,
    until,
)
from tests.collector import Collector, attributes

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
CONSUMER, CLIENT = 5, 3
ERROR = 2


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as made:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
        yield made


def by_kind(collector: Collector, kind: int) -> list[Any]:
    spans = [span for span in collector.spans if span.kind == kind]
    return sorted(spans, key=lambda span: span.start_time_unix_nano)


async def publish(broker: Mosquitto, body: bytes = b"1", **user: str) -> None:
    await broker.publish([("plant/x", body)], properties=properties(**user))


async def test_without_spans_the_publisher_s_context_goes_on_as_it_is(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with adaptor(broker.url, one_route(sink), tmp_path):
        await publish(broker, traceparent=PARENT, tracestate="a=1")
        await publish(broker, b"2", traceparent="nonsense")
        await broker.publish([("plant/x", b"3")])
        await until(lambda: len(sink.taken) == 3, "all arrive")
    first, second, third = sorted(sink.taken, key=lambda request: request.body)
    for prefix in ("", "ce-"):
        assert first.headers[f"{prefix}traceparent"] == PARENT
        assert first.headers[f"{prefix}tracestate"] == "a=1"
    assert "traceparent" not in second.headers
    assert not any("trace" in name for name in third.headers)


async def test_a_message_s_span_hangs_under_its_publisher_and_the_function_s_under_its_attempt(
    broker: Mosquitto, sink: Sink, tmp_path: Path, collector: Collector
) -> None:
    def script(request: Request) -> Answer:
        return Answer(503 if len(sink.requests) == 1 else 204)

    sink.script = script
    async with adaptor(broker.url, one_route(sink), tmp_path):
        await publish(broker, traceparent=PARENT, tracestate="a=1", id="reading-1")
        await until(lambda: sink.taken, "it arrives")
    (process,) = by_kind(collector, CONSUMER)
    refused, taken = by_kind(collector, CLIENT)
    assert process.name == "process all"
    assert (process.trace_id.hex(), process.parent_span_id.hex()) == (TRACE, SPAN)
    said = attributes(process.attributes)
    assert said["messaging.destination.name"] == "plant/x"
    assert said["cloudevents.event_id"] == "reading-1"
    assert said["weir.retries"] == 1
    assert process.status.code != ERROR
    for attempt, request in zip((refused, taken), sink.requests, strict=True):
        assert attempt.parent_span_id == process.span_id
        assert request.headers["traceparent"] == f"00-{TRACE}-{attempt.span_id.hex()}-01"
        assert request.headers["tracestate"] == "a=1"
        assert request.headers["ce-traceparent"] == PARENT
    assert refused.status.code == ERROR
    assert attributes(refused.attributes)["http.response.status_code"] == 503
    assert attributes(taken.attributes)["http.request.resend_count"] == 1


async def test_a_message_without_a_context_begins_a_trace(
    broker: Mosquitto, sink: Sink, tmp_path: Path, collector: Collector
) -> None:
    async with adaptor(broker.url, one_route(sink), tmp_path):
        await broker.publish([("plant/x", b"%d" % n) for n in range(20)])
        await until(lambda: len(sink.taken) == 20, "they arrive")
    spans = by_kind(collector, CONSUMER)
    assert len({span.trace_id for span in spans}) == 20
    told = {request.headers["traceparent"].split("-")[1] for request in sink.taken}
    assert told == {span.trace_id.hex() for span in spans}


async def test_a_context_that_is_not_sampled_is_passed_on_and_costs_no_span(
    broker: Mosquitto, sink: Sink, tmp_path: Path, collector: Collector
) -> None:
    async with adaptor(broker.url, one_route(sink), tmp_path):
        await publish(broker, traceparent=f"00-{TRACE}-{SPAN}-00")
        await until(lambda: sink.taken, "it arrives")
    told = sink.taken[0].headers["traceparent"]
    assert told.startswith(f"00-{TRACE}-") and told.endswith("-00")
    assert not collector.spans


async def test_a_refused_event_s_span_is_an_error_and_ends(
    broker: Mosquitto, sink: Sink, tmp_path: Path, collector: Collector
) -> None:
    sink.script = lambda _: Answer(400)
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        await publish(broker)
        await until(lambda: running.route("all")["quarantined"] == 1, "in quarantine")
    (process,) = by_kind(collector, CONSUMER)
    assert process.status.code == ERROR


async def test_a_collector_that_is_gone_costs_no_event(
    broker: Mosquitto, sink: Sink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    async with adaptor(broker.url, one_route(sink), tmp_path):
        await broker.publish([("plant/x", b"%d" % n) for n in range(50)])
        await until(lambda: len(sink.taken) == 50, "they arrive")


def test_whoever_wants_no_spans_does_not_load_the_sdk() -> None:
    check = (
        "import sys, weir.adaptor.commands, weir.adaptor.service\n"
        "from weir.adaptor import tracecontext\n"
        "assert tracecontext.start({}) is None\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
