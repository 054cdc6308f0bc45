"""What the sink receives in structured mode and in batches, and what is acknowledged when."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import aiomqtt
import pytest

from tests.broker.harness import (
    QUICK,
    AdaptorProcess,
    Answer,
    Mosquitto,
    Request,
    Running,
    Sink,
    adaptor,
    one_route,
    properties,
    until,
)
from weir.adaptor.quarantine import Quarantine
from weir.adaptor.service import client_id

both = pytest.mark.parametrize("version", ["5", "3.1.1"])
SPEC = {"specversion": "1.0", "id": "7", "source": "/hall", "type": "io.move", "shift": "late"}


def events(request: Request) -> list[dict[str, Any]]:
    found = json.loads(request.body)
    assert isinstance(found, list)
    return found


def batching(sink: Sink, limits: str, more: str = QUICK) -> str:
    return one_route(sink, f"mode: batch, batch: {{{limits}}}, {more}")


async def test_structured_mode_is_one_json_object_with_the_data_in_it(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    text = one_route(sink, "mode: structured")
    async with adaptor(broker.url, text, tmp_path):
        for payload, given in (
            (b'{"celsius": 1.10}', properties("application/json")),
            ("grün".encode(), properties("text/plain")),
            (b"\xff\x00", properties()),
        ):
            await broker.publish([("plant/1", payload)], properties=given)
        await until(lambda: len(sink.taken) == 3, "the events arrive")
    assert {each.headers["content-type"] for each in sink.taken} == {"application/cloudevents+json"}
    assert not any(name.startswith("ce-") for each in sink.taken for name in each.headers)
    as_json, as_text, as_bytes = (json.loads(each.body) for each in sink.taken)
    assert (
        b'"data":{"celsius": 1.10}' in sink.taken[0].body
    )  # not 1.1: what was sent, digit by digit
    assert as_json["subject"] == as_json["mqtttopic"] == "plant/1"
    assert (as_text["data"], as_text["datacontenttype"]) == ("grün", "text/plain")
    assert base64.b64decode(as_bytes["data_base64"]) == b"\xff\x00"


@both
async def test_an_event_that_came_in_structured_mode_goes_out_in_it(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    text = one_route(sink, "mode: structured")
    body = json.dumps(SPEC | {"data": [1.50, {}]}).replace("1.5", "1.50").encode()
    async with adaptor(broker.url, text, tmp_path, protocol=version):
        given = properties("application/cloudevents+json") if version == "5" else properties()
        await broker.publish([("plant/1", body)], properties=given)
        await until(lambda: sink.taken, "the event arrives")
    event = json.loads(sink.taken[0].body)
    assert event.items() >= SPEC.items()
    assert b"[1.50, {}]" in sink.taken[0].body


async def test_an_event_of_a_3_1_1_publisher_is_one_in_a_session_of_mqtt_5_where_the_route_looks(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    body = json.dumps(SPEC | {"data": 1}).encode()
    old = aiomqtt.ProtocolVersion.V311
    for more in ("sniff: true", "qos: 1"):
        folder = tmp_path / more[:3]
        folder.mkdir()
        async with adaptor(broker.url, one_route(sink, more), folder, protocol="5") as running:
            await broker.publish([("plant/1", body)], version=old)
            await until(partial(_delivered, running), "the event arrives")
    looked, not_looked = sink.taken
    assert (looked.id, looked.headers["ce-shift"], looked.body) == ("7", "late", b"1")
    assert (not_looked.body, "ce-shift" in not_looked.headers) == (body, False)


def _delivered(running: Running) -> bool:
    return bool(running.route("all")["delivered"])


async def test_a_batch_is_an_array_of_events_and_each_message_is_acknowledged(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with adaptor(broker.url, batching(sink, "events: 10, age: PT10S"), tmp_path) as running:
        await broker.publish([(f"plant/{n}", b"%d" % n) for n in range(20)])
        await until(lambda: len(sink.taken) == 2, "two batches arrive")
        await until(lambda: not running.sink(sink.url)["window"]["used"], "all are acknowledged")
        assert running.route("all")["delivered"] == 20
    assert {each.headers["content-type"] for each in sink.taken} == {
        "application/cloudevents-batch+json"
    }
    got = [event for each in sink.taken for event in events(each)]
    assert [event["subject"] for event in got] == [f"plant/{n}" for n in range(20)]
    assert len({event["id"] for event in got}) == 20
    assert len(set(broker.pubacks(client_id("weir", sink.url)))) == 20


async def test_a_batch_that_never_fills_goes_by_age(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with adaptor(broker.url, batching(sink, "events: 100, age: PT0.05S"), tmp_path):
        await broker.publish([("plant/1", b"1")])
        await until(lambda: sink.taken, "it goes without company")
    assert [event["subject"] for event in events(sink.taken[0])] == ["plant/1"]


async def test_nothing_of_a_batch_is_acknowledged_before_the_sink_has_taken_it(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    release = asyncio.Event()

    async def later(_: Request) -> Answer:
        await release.wait()
        return Answer(202)

    sink.script = later
    name = client_id("weir", sink.url)
    async with adaptor(broker.url, batching(sink, "events: 5, age: PT10S"), tmp_path) as running:
        await broker.publish([(f"plant/{n}", b"") for n in range(5)])
        await until(lambda: sink.requests, "the batch is with the sink")
        assert running.sink(sink.url)["window"]["used"] == 5
        assert broker.pubacks(name) == []
        release.set()
        await until(lambda: len(broker.pubacks(name)) == 5, "acknowledged after the 202")


async def test_a_batch_that_fails_is_tried_again_with_the_same_ids(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda _: Answer(500 if len(sink.requests) == 1 else 204)
    async with adaptor(broker.url, batching(sink, "events: 4, age: PT0.05S"), tmp_path) as running:
        await broker.publish([(f"plant/{n}", b"") for n in range(4)])
        await until(lambda: running.route("all")["delivered"] == 4, "delivered")
        assert running.route("all")["retried"] == 4
    ids = [sorted(event["id"] for event in events(each)) for each in sink.requests]
    assert ids[0] == sorted(each for some in ids[1:] for each in some)


async def test_one_bad_event_takes_no_other_of_its_batch_into_the_quarantine(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    def picky(request: Request) -> Answer:
        return Answer(400 if b"bad" in request.body else 202, body=b"I don't like it")

    sink.script = picky
    text = batching(sink, "events: 16, age: PT10S", f"datacontenttype: text/plain, {QUICK}")
    async with adaptor(broker.url, text, tmp_path) as running:
        payloads = [b"bad" if n == 9 else b"%d" % n for n in range(16)]
        await broker.publish([(f"plant/{n}", each) for n, each in enumerate(payloads)])
        await until(lambda: running.route("all")["delivered"] == 15, "15 are delivered")
        await until(lambda: running.route("all")["quarantined"] == 1, "one is put aside")
        await until(lambda: not running.sink(sink.url)["window"]["used"], "all are acknowledged")
    (held,) = Quarantine(tmp_path / "quarantine.db").events()
    assert (held.event.data, held.status, held.answer) == (b"bad", 400, b"I don't like it")
    assert len(sink.requests) == 9  # 16, and then twice 8, 4, 2 and 1
    taken = [event["subject"] for each in sink.taken for event in events(each)]
    assert sorted(taken) == sorted(f"plant/{n}" for n in range(16) if n != 9)


async def test_an_event_that_breaks_the_sink_is_alone_in_its_last_attempt(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: Answer(500 if b"bad" in request.body else 202)
    text = batching(sink, "events: 8, age: PT0.2S", f"datacontenttype: text/plain, {QUICK}")
    async with adaptor(broker.url, text, tmp_path) as running:
        payloads = [b"bad" if n == 3 else b"%d" % n for n in range(8)]
        await broker.publish([(f"plant/{n}", each) for n, each in enumerate(payloads)])
        await until(lambda: running.route("all")["delivered"] == 7, "the others are delivered")
        await until(lambda: running.route("all")["quarantined"] == 1, "one is put aside")


async def test_a_batch_too_large_for_the_sink_is_split(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: Answer(413 if len(request.body) > 40_000 else 202)
    async with adaptor(broker.url, batching(sink, "events: 8, age: PT10S"), tmp_path) as running:
        await broker.publish([(f"plant/{n}", b"\xff" * 12_000) for n in range(8)])
        await until(lambda: running.route("all")["delivered"] == 8, "all are delivered")


async def test_a_sink_that_is_down_gets_the_batches_when_it_is_back(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await sink.stop()
    async with adaptor(broker.url, batching(sink, "events: 10, age: PT0.05S"), tmp_path) as running:
        await broker.publish([(f"plant/{n}", b"") for n in range(30)])
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "blocked")
        await sink.start()
        await until(lambda: running.route("all")["delivered"] == 30, "all are delivered")
        assert running.route("all")["quarantined"] == 0
    got = [event["subject"] for each in sink.taken for event in events(each)]
    assert sorted(got) == sorted(f"plant/{n}" for n in range(30))


async def test_at_the_end_what_is_gathered_goes_without_waiting_for_its_age(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with adaptor(broker.url, batching(sink, "events: 100, age: PT60S"), tmp_path) as running:
        await broker.publish([("plant/1", b""), ("plant/2", b"")])
        await until(lambda: running.sink(sink.url)["in_flight"] == 2, "they are gathered")
        assert sink.requests == []
    assert [len(events(each)) for each in sink.taken] == [2]
    assert len(broker.pubacks(client_id("weir", sink.url))) == 2


async def test_qos_0_and_qos_1_share_batches(broker: Mosquitto, sink: Sink, tmp_path: Path) -> None:
    async with adaptor(broker.url, batching(sink, "events: 4, age: PT10S"), tmp_path):
        await broker.publish([("plant/0", b""), ("plant/1", b"")], qos=0)
        await broker.publish([("plant/2", b""), ("plant/3", b"")], qos=1)
        await until(lambda: sink.taken, "the batch arrives")
    assert sorted(event["mqttqos"] for event in events(sink.taken[0])) == ["0", "0", "1", "1"]


def _one_is_put_aside(running: Running) -> bool:
    return bool(running.route("all")["quarantined"] == 1)


async def test_what_only_looks_like_an_event_is_put_aside_in_every_mode(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    broken = properties("application/cloudevents+json")
    for mode in ("structured", "batch"):
        folder = tmp_path / mode
        folder.mkdir()
        async with adaptor(broker.url, one_route(sink, f"mode: {mode}"), folder) as running:
            await broker.publish([("plant/broken", b'{"id": 5}')], properties=broken)
            await until(partial(_one_is_put_aside, running), "put aside")
        (held,) = Quarantine(folder / "quarantine.db").events()
        assert "plant/broken" in held.reason
        assert "specversion" in held.reason
        assert held.event.data == b'{"id": 5}'
    assert sink.requests == []


async def test_a_spool_is_emptied_in_batches_when_the_sink_is_back(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await sink.stop()
    text = batching(sink, "events: 20, age: PT0.05S", f"spool: always, {QUICK}")
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish([(f"plant/{n}", b"%d" % n) for n in range(100)])
        await until(lambda: not running.sink(sink.url)["window"]["used"], "safe in the spool")
        await sink.start()
        await until(lambda: running.route("all")["delivered"] == 100, "all are delivered")
    got = [event["subject"] for each in sink.taken for event in events(each)]
    assert sorted(got) == sorted(f"plant/{n}" for n in range(100))
    assert len(sink.taken) < 20


async def test_a_batch_has_events_of_many_keys_and_each_key_keeps_its_order(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    text = batching(sink, "events: 5, age: PT0.02S", f"ordered: true, {QUICK}")
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish([(f"plant/{n % 5}", b"%d" % n) for n in range(50)])
        await until(lambda: running.route("all")["delivered"] == 50, "all are delivered")
    got = [event for each in sink.taken for event in events(each)]
    for key in range(5):
        data = [base64.b64decode(each["data_base64"]) for each in got
                if each["subject"] == f"plant/{key}"]  # fmt: skip
        assert data == [b"%d" % n for n in range(key, 50, 5)]
    assert len(sink.taken) < 50


async def test_batches_lose_no_event_whatever_sink_and_adaptor_do(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    chance = random.Random(7)
    moods = [Answer(500), Answer(503), Answer(413), Answer(400), Answer(202, cut=True)]
    moods += [Answer(202)] * 15
    sink.script = lambda _: chance.choice(moods)
    text = batching(sink, "events: 20, age: PT0.02S")
    wanted = {str(n) for n in range(600)}
    messages = [(f"plant/{n}", json.dumps(SPEC | {"id": n}).encode()) for n in sorted(wanted)]
    safe: set[str] = set()

    def accounted_for() -> set[str]:
        taken = {event["id"] for each in sink.taken for event in events(each)}
        return safe | taken

    def enough(count: int) -> bool:
        return len(accounted_for()) >= count

    async with AdaptorProcess(broker.url, text, tmp_path, "--receive-maximum", "100") as process:
        await until(lambda: broker.subscribed(client_id("weir", sink.url)), "subscribed")
        given = properties("application/cloudevents+json")
        publishing = asyncio.create_task(broker.publish(messages, properties=given))
        for kills in range(1, 5):
            await until(partial(enough, 100 * kills), "some events went through")
            await process.kill()
            with contextlib.closing(Quarantine(tmp_path / "quarantine.db")) as quarantine:
                safe |= {each.event.attributes["id"] for each in quarantine.events()}
            await process.start()
        await publishing
    with contextlib.closing(Quarantine(tmp_path / "quarantine.db")) as quarantine:
        safe |= {each.event.attributes["id"] for each in quarantine.events()}
    sink.script = lambda _: Answer(202)
    async with adaptor(broker.url, text, tmp_path):  # for what the killed ones have left
        await until(lambda: accounted_for() == wanted, "every event is taken or in the quarantine")
