"""Sinks behind TLS and tokens, dead letters, sinks that are down, and Knative's environment."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.broker.harness import (
    QUICK,
    AdaptorProcess,
    Answer,
    Certificates,
    Mosquitto,
    Request,
    Sink,
    adaptor,
    certificates,
    one_route,
    routes,
    until,
)
from weir.adaptor.endpoints import Access
from weir.adaptor.knative import Environment
from weir.adaptor.quarantine import Quarantine
from weir.adaptor.quarantine_commands import replay
from weir.adaptor.retry import BREAK_AFTER
from weir.adaptor.service import client_id

MANY = [("plant/x", b"%d" % n) for n in range(40)]


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
async def secure(signed: Certificates) -> AsyncIterator[Sink]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(signed.broker, signed.broker_key)
    started = Sink(tls=context)
    await started.start()
    yield started
    await started.stop()


@pytest.fixture
async def letters() -> AsyncIterator[Sink]:
    started = Sink()
    await started.start()
    yield started
    await started.stop()


# --- TLS and tokens -------------------------------------------------------------------------------


async def test_an_https_sink_gets_the_events_and_the_token_of_the_moment(
    broker: Mosquitto, secure: Sink, signed: Certificates, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    valid = "first"
    secure.script = lambda request: Answer(
        204 if request.headers.get("authorization") == f"Bearer {valid}" else 503
    )
    uri = f"{{uri: '{secure.url}', caFile: {signed.ca}, tokenFile: {token}}}"
    text = routes(f"name: all, filter: plant/#, sink: {uri}, {QUICK}")
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish(MANY)
        await until(lambda: len(secure.taken) == 40, "all are taken")
        valid = "second"
        token.write_text("second")
        await broker.publish([("plant/x", b"later")])
        await until(lambda: b"later" in secure.bodies, "the renewed token is used")
        assert running.sink(secure.url)["path"] == "relayed"
        token.unlink()
        await until(lambda: not token.exists(), "gone")
    assert len(secure.taken) == 41


async def test_a_token_that_can_t_be_read_blocks_the_sink_and_names_the_file(
    broker: Mosquitto, secure: Sink, signed: Certificates, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    uri = f"{{uri: '{secure.url}', caFile: {signed.ca}, tokenFile: {token}}}"
    text = routes(f"name: all, filter: plant/#, sink: {uri}, {QUICK}")
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish(MANY[:1])
        await until(lambda: running.sink(secure.url)["state"] == "blocked", "blocked")
        assert str(token) in running.sink(secure.url)["reason"]
        token.write_text("x")
        await until(lambda: secure.taken, "then it arrives")


async def test_an_untrusted_sink_gets_nothing(
    broker: Mosquitto, secure: Sink, tmp_path: Path
) -> None:
    async with adaptor(broker.url, one_route(secure), tmp_path) as running:
        await broker.publish(MANY[:3])
        await until(lambda: running.sink(secure.url)["state"] == "blocked", "blocked")
        assert "certificate verify failed" in running.sink(secure.url)["reason"]
        assert running.route("all")["unacknowledged"] == 3
    assert not secure.requests


async def test_the_quarantine_of_an_https_sink_is_replayed_over_tls(
    broker: Mosquitto, secure: Sink, signed: Certificates, tmp_path: Path
) -> None:
    secure.script = lambda _: Answer(400)
    uri = f"{{uri: '{secure.url}', caFile: {signed.ca}}}"
    text = routes(f"name: all, filter: plant/#, sink: {uri}, {QUICK}")
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish(MANY[:1])
        await until(lambda: running.route("all")["quarantined"] == 1, "in quarantine")
    secure.script = lambda _: Answer()
    quarantine = Quarantine(tmp_path / "quarantine.db")
    assert await replay(quarantine) == (0, 1)
    assert await replay(quarantine, access=Access(signed.ca)) == (1, 0)


# --- Knative's environment ------------------------------------------------------------------------


async def test_a_source_bound_by_knative_needs_no_sink_in_its_routes(
    broker: Mosquitto, secure: Sink, signed: Certificates, tmp_path: Path
) -> None:
    process = AdaptorProcess(broker.url, "routes: [{filter: plant/#}]", tmp_path)
    try:
        await process.start(
            K_SINK=secure.url,
            K_CE_OVERRIDES=json.dumps({"extensions": {"cluster": "edge-7"}}),
            K_CA_CERTS=signed.ca.read_text(),
        )
        await until(lambda: broker.subscribed(client_id("weir", secure.url)), "subscribed")
        await broker.publish(MANY[:5])
        await until(lambda: len(secure.taken) == 5, "they arrive at K_SINK")
        assert await process.stop() == 0
    finally:
        await process.kill()
    assert {each.headers["ce-cluster"] for each in secure.taken} == {"edge-7"}


@pytest.mark.parametrize("text", ["{", "[]", '{"extensions": 5}', '{"extensions": {"A": "b"}}'])
def test_overrides_that_make_no_sense_name_the_variable(text: str) -> None:
    with pytest.raises(ValueError, match="K_CE_OVERRIDES"):
        Environment.read({"K_CE_OVERRIDES": text})


def test_an_empty_environment_is_no_setting() -> None:
    assert Environment.read({"K_SINK": "", "K_CE_OVERRIDES": "{}"}) == Environment()


# --- dead letters ---------------------------------------------------------------------------------


def dead_letter_route(sink: Sink, letters: Sink) -> str:
    return one_route(sink, f"{QUICK}, deadLetterSink: '{letters.url}'")


async def test_a_rejected_event_goes_to_the_dead_letter_sink_with_the_reason(
    broker: Mosquitto, sink: Sink, letters: Sink, tmp_path: Path
) -> None:
    answer = b"no such unit " * 100
    sink.script = lambda request: Answer(422, body=answer) if request.body == b"3" else Answer()
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, dead_letter_route(sink, letters), tmp_path) as running:
        await broker.publish(MANY[:6])
        await until(lambda: len(broker.pubacks(client)) == 6, "every message is acknowledged")
        assert running.route("all")["dead_lettered"] == 1
        assert running.route("all")["delivered"] == 5
    (letter,) = letters.taken
    refused = next(each for each in sink.requests if each.body == b"3")
    assert letter.body == b"3"
    assert letter.headers["ce-knativeerrordest"] == sink.url
    assert letter.headers["ce-knativeerrorcode"] == "422"
    data = letter.headers["ce-knativeerrordata"]
    assert len(data) == 1024
    assert answer.startswith(base64.b64decode(data))
    rest = {k: v for k, v in letter.headers.items() if not k.startswith("ce-knativeerror")}
    assert {**rest, "host": ""} == {**refused.headers, "host": ""}


async def test_an_event_whose_retries_are_used_up_is_a_dead_letter_too(
    broker: Mosquitto, sink: Sink, letters: Sink, tmp_path: Path
) -> None:
    sink.script = lambda _: Answer(500)
    async with adaptor(broker.url, dead_letter_route(sink, letters), tmp_path) as running:
        await broker.publish(MANY[:2])
        await until(lambda: running.route("all")["dead_lettered"] == 2, "both are dead letters")
    assert {each.headers["ce-knativeerrorcode"] for each in letters.taken} == {"500"}
    assert len(sink.requests) == 2 * 4


async def test_a_dead_letter_sink_is_retried_and_nothing_is_acknowledged_before_it_took_it(
    broker: Mosquitto, sink: Sink, letters: Sink, tmp_path: Path
) -> None:
    sink.script = lambda _: Answer(400)
    client = client_id("weir", sink.url)

    def script(_: Request) -> Answer:
        assert broker.pubacks(client) == []
        return Answer(503 if len(letters.requests) < 3 else 204)

    letters.script = script
    async with adaptor(broker.url, dead_letter_route(sink, letters), tmp_path):
        await broker.publish(MANY[:1])
        await until(lambda: len(broker.pubacks(client)) == 1, "acknowledged in the end")
    assert len(letters.requests) == 3


async def test_what_the_dead_letter_sink_does_not_take_lies_in_the_quarantine(
    broker: Mosquitto, sink: Sink, letters: Sink, tmp_path: Path
) -> None:
    sink.script = lambda _: Answer(400)
    letters.script = lambda _: Answer(410)
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, dead_letter_route(sink, letters), tmp_path) as running:
        await broker.publish(MANY[:1])
        await until(lambda: len(broker.pubacks(client)) == 1, "acknowledged")
        assert running.route("all")["quarantined"] == 1
    (held,) = Quarantine(tmp_path / "quarantine.db").events()
    assert "answered 400" in held.reason
    assert f"{letters.url} does not take it: it answered 410" in held.reason
    assert "knativeerrordest" not in held.event.attributes


async def test_a_stop_with_a_dead_letter_under_way_leaves_the_message_with_the_broker(
    broker: Mosquitto, sink: Sink, letters: Sink, tmp_path: Path
) -> None:
    sink.script = lambda _: Answer(400)
    letters.script = lambda _: Answer(hang=True)
    text = dead_letter_route(sink, letters)
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, text, tmp_path, stop_within=0.2):
        await broker.publish(MANY[:1])
        await until(lambda: letters.requests, "it is with the dead letter sink")
    assert broker.pubacks(client) == []
    letters.script = lambda _: Answer()
    async with adaptor(broker.url, text, tmp_path):
        await until(lambda: len(broker.pubacks(client)) == 1, "it came again")
    assert len(letters.taken) == 1


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_a_dead_letter_can_go_to_a_topic_and_through_another_route(
    broker: Mosquitto, sink: Sink, letters: Sink, tmp_path: Path, version: str
) -> None:
    sink.script = lambda request: Answer(422 if request.body == b"3" else 204)
    text = routes(
        f"name: all, filter: plant/#, sink: '{sink.url}', {QUICK}, "
        "deadLetterSink: {topic: 'dead/{level[0]}'}",
        f"name: dead, filter: dead/+, sink: '{letters.url}', {QUICK}",
    )
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, text, tmp_path, protocol=version) as running:
        await broker.publish(MANY[:6])
        await until(lambda: len(broker.pubacks(client)) == 6, "every message is acknowledged")
        assert running.route("all")["dead_lettered"] == 1
        await until(lambda: letters.taken, "the letter arrives")
    (letter,) = letters.taken
    refused = next(each for each in sink.requests if each.body == b"3")
    assert letter.body == b"3"
    for name in ("ce-id", "ce-source", "ce-type", "ce-time", "ce-subject", "ce-mqtttopic"):
        assert letter.headers[name] == refused.headers[name]
    assert letter.headers["ce-knativeerrorcode"] == "422"
    assert letter.headers["ce-knativeerrordest"] == sink.url


async def test_a_dead_letter_that_its_own_route_would_take_lies_in_the_quarantine(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda _: Answer(422)
    text = one_route(sink, f"{QUICK}, deadLetterSink: {{topic: '{{level[0]}}/dead'}}")
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish(MANY[:1])
        await until(lambda: running.route("all")["quarantined"] == 1, "in quarantine")
    (held,) = Quarantine(tmp_path / "quarantine.db").events()
    assert "go in a circle" in held.reason


# --- sinks that are down --------------------------------------------------------------------------


async def test_a_sink_that_answers_no_one_is_given_up_long_before_the_retries_of_each(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda _: Answer(503)
    more = "delivery: {retry: 1000, backoffDelay: PT0.02S, timeout: PT10S}"
    async with adaptor(broker.url, one_route(sink, more), tmp_path) as running:
        await broker.publish(MANY)
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "blocked")
        assert len(sink.requests) >= BREAK_AFTER
        sink.script = lambda _: Answer()
        await until(lambda: len(sink.taken) == 40, "all are taken")
    assert sorted(sink.bodies) == sorted(payload for _, payload in MANY)


async def test_retry_after_can_be_bounded_or_not_looked_at(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda _: (
        Answer(503, ("Retry-After: 300",)) if len(sink.requests) < 3 else Answer()
    )
    more = "delivery: {retry: 5, backoffDelay: PT0.02S, timeout: PT10S, retryAfterMax: PT0S}"
    async with adaptor(broker.url, one_route(sink, more), tmp_path):
        await broker.publish(MANY[:1])
        await until(lambda: sink.taken, "taken without waiting five minutes")
