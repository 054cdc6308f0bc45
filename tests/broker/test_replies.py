"""`Prefer: reply`: what a sink answers is published where it was asked for, or put aside."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.broker.harness import (
    QUICK,
    AdaptorProcess,
    Answer,
    Mosquitto,
    Request,
    Sink,
    adaptor,
    one_route,
    until,
)
from weir.adaptor.quarantine import Quarantine
from weir.adaptor.quarantine_commands import replay
from weir.adaptor.replies import BEST_EFFORT
from weir.adaptor.service import client_id

both = pytest.mark.parametrize("version", ["5", "3.1.1"])
REPLY = (
    *("ce-specversion: 1.0", "ce-id: r1", "ce-source: /oven", "ce-type: io.done"),
    *("ce-mood: gr%C3%BCn", "Content-Type: application/json"),
)


def done(request: Request) -> Answer:
    return Answer(200, REPLY, b'{"of": "%s"}' % request.body)


def asking(topic: str, correlation: bytes = b"") -> Properties:
    made = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    made.ResponseTopic = topic
    if correlation:
        made.CorrelationData = correlation
    return made


@contextlib.asynccontextmanager
async def listener(broker: Mosquitto, topic: str) -> AsyncIterator[list[aiomqtt.Message]]:
    """What arrives there, however often the broker goes."""
    got: list[aiomqtt.Message] = []
    ready = asyncio.Event()

    async def collect() -> None:
        while True:
            with contextlib.suppress(aiomqtt.MqttError):
                async with aiomqtt.Client(
                    "127.0.0.1", broker.port, protocol=aiomqtt.ProtocolVersion.V5
                ) as client:
                    await client.subscribe(topic, qos=1)
                    ready.set()
                    async for message in client.messages:
                        got.append(message)
            await asyncio.sleep(0.05)

    task = asyncio.create_task(collect())
    try:
        await until(ready.is_set, "subscribed")
        yield got
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def users(message: aiomqtt.Message) -> dict[str, str]:
    given: Any = message.properties
    return dict(getattr(given, "UserProperty", []))


async def test_a_reply_goes_to_the_response_topic_with_the_correlation_data(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = done
    async with (
        adaptor(broker.url, one_route(sink, "reply: true"), tmp_path) as running,
        listener(broker, "replies/#") as got,
    ):
        await broker.publish([("plant/1", b"a")], properties=asking("replies/7", b"\x00\xff"))
        await until(lambda: got, "the reply comes")
        await until(lambda: not running.sink(sink.url)["window"]["used"], "acknowledged")
        assert running.route("all")["replied"] == 1
    assert sink.taken[0].headers["prefer"] == "reply"
    message = got[0]
    given: Any = message.properties
    assert (str(message.topic), message.qos, message.payload) == ("replies/7", 1, b'{"of": "a"}')
    assert (given.CorrelationData, given.ContentType) == (b"\x00\xff", "application/json")
    assert users(message) == {
        "specversion": "1.0",
        "id": "r1",
        "source": "/oven",
        "type": "io.done",
        "mood": "grün",
    }


async def test_the_dialect_of_sdk_go_has_its_prefix(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = done
    text = one_route(sink, "reply: true, dialect: sdk-go")
    async with adaptor(broker.url, text, tmp_path), listener(broker, "replies/#") as got:
        await broker.publish([("plant/1", b"a")], properties=asking("replies/7"))
        await until(lambda: got, "the reply comes")
    given: Any = got[0].properties
    assert users(got[0])["ce-id"] == "r1"
    assert users(got[0])["Content-Type"] == given.ContentType == "application/json"
    assert not any(name in users(got[0]) for name in ("id", "specversion"))


@both
async def test_the_routes_own_reply_topic_serves_messages_without_one(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    sink.script = done
    text = one_route(sink, "reply: {topic: 'done/{level[0]}'}")
    async with (
        adaptor(broker.url, text, tmp_path, protocol=version) as running,
        listener(broker, "done/#") as got,
    ):
        await broker.publish([("plant/7", b"a")])
        await until(lambda: got, "the reply comes")
        await until(lambda: not running.sink(sink.url)["window"]["used"], "acknowledged")
    assert str(got[0].topic) == "done/plant"
    if version == "5":
        assert users(got[0])["id"] == "r1"
    else:
        event = json.loads(bytes(got[0].payload))
        assert (event["id"], event["mood"], event["data"]) == ("r1", "grün", {"of": "a"})


async def test_a_reply_may_be_in_structured_mode(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    body = {"specversion": "1.0", "id": "r2", "source": "/s", "type": "t", "data": "yes"}
    kind = ("Content-Type: application/cloudevents+json; charset=UTF-8",)
    sink.script = lambda _: Answer(200, kind, json.dumps(body).encode())
    text = one_route(sink, "reply: true, mode: structured")
    async with adaptor(broker.url, text, tmp_path), listener(broker, "replies/#") as got:
        await broker.publish([("plant/7", b"a")], properties=asking("replies/7"))
        await until(lambda: got, "the reply comes")
    assert (users(got[0])["id"], got[0].payload) == ("r2", b'"yes"')
    assert sink.taken[0].headers["prefer"] == "reply"


async def test_where_nobody_asked_no_reply_is_asked_for_and_none_is_published(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = done
    async with (
        adaptor(broker.url, one_route(sink, "reply: true"), tmp_path) as running,
        listener(broker, "#") as got,
    ):
        await broker.publish([("plant/1", b"a")])
        await until(lambda: running.route("all")["delivered"] == 1, "delivered")
        await broker.publish([("end", b"")])
        await until(lambda: "end" in [str(each.topic) for each in got], "the last of all")
        assert [str(each.topic) for each in got] == ["plant/1", "end"]
        assert running.route("all")["replied"] == running.route("all")["unreplied"] == 0
    assert "prefer" not in sink.taken[0].headers


@pytest.mark.parametrize(
    "answer",
    [
        Answer(202, REPLY, b"{}"),  # accepted is never a reply
        Answer(204),
        Answer(200, ("Content-Type: text/plain",), b"OK"),
        Answer(200),
    ],
)
async def test_what_is_no_reply_is_only_a_delivery(
    broker: Mosquitto, sink: Sink, tmp_path: Path, answer: Answer
) -> None:
    sink.script = lambda _: answer
    async with adaptor(broker.url, one_route(sink, "reply: true"), tmp_path) as running:
        await broker.publish([("plant/1", b"a")], properties=asking("replies/7"))
        await until(lambda: running.route("all")["delivered"] == 1, "delivered")
        await until(lambda: not running.sink(sink.url)["window"]["used"], "acknowledged")
        assert running.route("all")["replied"] == running.route("all")["unreplied"] == 0


async def test_the_message_is_not_acknowledged_before_the_broker_has_the_reply(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    def freezing(request: Request) -> Answer:
        broker.freeze()
        return done(request)

    sink.script = freezing
    name = client_id("weir", sink.url)
    async with (
        adaptor(broker.url, one_route(sink, "reply: true"), tmp_path) as running,
        listener(broker, "replies/#") as got,
    ):
        publishing = asyncio.create_task(
            broker.publish([("plant/1", b"a")], properties=asking("replies/7"))
        )
        try:
            await until(lambda: running.route("all")["delivered"] == 1, "the sink has answered")
            assert running.sink(sink.url)["window"]["used"] == 1
            assert running.route("all")["replied"] == 0
        finally:
            broker.thaw()
            await publishing
        await until(lambda: got, "the reply comes")
        await until(lambda: len(broker.pubacks(name)) == 1, "then it is acknowledged")


async def test_an_adaptor_killed_before_its_reply_was_published_delivers_and_replies_again(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    def freezing(request: Request) -> Answer:
        if len(sink.requests) == 1:
            broker.freeze()
        return done(request)

    sink.script = freezing
    text = one_route(sink, "reply: true")
    async with (
        listener(broker, "replies/#") as got,
        AdaptorProcess(broker.url, text, tmp_path) as process,
    ):
        name = client_id("weir", sink.url)
        await until(lambda: broker.subscribed(name), "subscribed")
        publishing = asyncio.create_task(
            broker.publish([("plant/1", b"a")], properties=asking("replies/7", b"c"))
        )
        try:
            await until(lambda: sink.taken, "the sink has answered")
            await process.kill()
        finally:
            broker.thaw()
            await publishing
        await process.start()
        await until(lambda: got, "the reply comes")
        await until(lambda: broker.pubacks(name), "and the message is acknowledged")
        assert await process.stop() == 0
    assert len(sink.taken) == 2
    assert {each.payload for each in got} == {b'{"of": "a"}'}


async def test_a_spooled_event_keeps_what_its_reply_needs_and_waits_for_it(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await sink.stop()
    sink.script = done
    text = one_route(sink, f"reply: true, spool: always, {QUICK}")
    asked = asking("replies/7", b"c")
    async with listener(broker, "replies/#") as got:
        async with AdaptorProcess(broker.url, text, tmp_path) as process:
            name = client_id("weir", sink.url)
            await until(lambda: broker.subscribed(name), "subscribed")
            await broker.publish([("plant/1", b"a")], properties=asked)
            await until(lambda: broker.pubacks(name), "it is in the spool, and acknowledged")
            await process.kill()
        await sink.start()
        async with adaptor(broker.url, text, tmp_path) as running:
            await until(lambda: got, "the reply comes after all")
            await until(lambda: running.route("all")["replied"] == 1, "and is counted")
    given: Any = got[0].properties
    assert (str(got[0].topic), given.CorrelationData) == ("replies/7", b"c")


async def test_a_reply_waits_for_a_broker_that_goes_away(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    gone = asyncio.Event()

    async def going(request: Request) -> Answer:
        if not gone.is_set():
            await broker.save()
            await broker.kill()
            gone.set()
        return done(request)

    sink.script = going
    async with (
        adaptor(broker.url, one_route(sink, f"reply: true, {QUICK}"), tmp_path) as running,
        listener(broker, "replies/#") as got,
    ):
        with contextlib.suppress(aiomqtt.MqttError):  # killed as it may be in the middle of it
            await broker.publish([("plant/1", b"a")], properties=asking("replies/7"))
        await until(lambda: running.sink(sink.url)["reason"], "it says what it waits for")
        assert running.route("all")["replied"] == 0
        await broker.start()
        await until(lambda: running.route("all")["replied"] >= 1, "published in the end")
        await until(lambda: running.sink(sink.url)["reason"] is None, "nothing waits any more")
        await until(lambda: not running.sink(sink.url)["window"]["used"], "acknowledged")
    assert running.route("all")["unreplied"] == 0
    assert got == [] or str(got[0].topic) == "replies/7"  # a listener of QoS 1 without a session


async def test_more_replies_than_the_broker_takes_at_a_time_wait_for_their_turn(
    sink: Sink, tmp_path: Path
) -> None:
    broker = Mosquitto(tmp_path, "allow_anonymous true\nmax_inflight_messages 2\n")
    await broker.start()
    sink.script = done
    try:
        async with (
            adaptor(broker.url, one_route(sink, "reply: true"), tmp_path) as running,
            listener(broker, "replies/#") as got,
        ):
            messages = [(f"plant/{n}", b"%d" % n) for n in range(100)]
            await broker.publish(messages, properties=asking("replies/7"))
            await until(lambda: len(got) == 100, "all replies come")
            assert running.route("all")["unreplied"] == 0
    finally:
        await broker.stop()


async def test_replies_to_qos_0_are_bounded_while_the_broker_takes_none(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async def frozen(request: Request) -> Answer:
        if len(sink.requests) == 1:
            await until(lambda: running.route("all")["received"] == 200, "all are here")
            broker.freeze()
        return done(request)

    sink.script = frozen
    text = one_route(sink, "reply: {topic: done/x}, qos: 0, concurrency: 1")
    async with adaptor(broker.url, text, tmp_path) as running:
        try:
            await broker.publish([(f"plant/{n}", b"") for n in range(200)], qos=0)
            await until(lambda: running.route("all")["delivered"] == 200, "all are delivered")
            assert running.route("all")["unreplied"] == 200 - BEST_EFFORT
        finally:
            broker.thaw()
        await until(lambda: running.route("all")["replied"] == BEST_EFFORT, "the others come")


# --- replies that can't be published --------------------------------------------------------------


@contextlib.asynccontextmanager
async def forbidding(folder: Path) -> AsyncIterator[Mosquitto]:
    """A broker where nobody may publish below secret/."""
    acl = folder / "acl"
    acl.write_text("topic readwrite plant/#\ntopic readwrite replies/#\n")
    acl.chmod(0o644)
    broker = Mosquitto(folder, f"allow_anonymous true\nacl_file {acl}\n")
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


@pytest.mark.parametrize(
    ("topic", "more", "why"),
    [
        ("other/7", "reply: {allow: replies/#}", "not in what `allow` allows"),
        ("plant/7", "reply: true", "in a circle"),
        ("$SYS/x", "reply: {allow: '$SYS/#'}", "no topic to publish to"),
    ],
)
async def test_a_reply_with_nowhere_to_go_lies_in_the_quarantine(
    broker: Mosquitto, sink: Sink, tmp_path: Path, topic: str, more: str, why: str
) -> None:
    sink.script = done
    async with adaptor(broker.url, one_route(sink, more), tmp_path) as running:
        await broker.publish([("plant/1", b"a")], properties=asking(topic))
        await until(lambda: running.route("all")["unreplied"] == 1, "put aside")
        await until(lambda: not running.sink(sink.url)["window"]["used"], "acknowledged")
        route = running.route("all")
        assert (route["delivered"], route["quarantined"], route["unacknowledged"]) == (1, 0, 0)
    quarantine = Quarantine(tmp_path / "quarantine.db")
    (held,) = quarantine.events()
    assert why in held.reason
    assert (held.event.attributes["id"], held.event.data) == ("r1", b'{"of": "a"}')
    assert await replay(quarantine) == (0, 1)  # it is not the sink's: no sink gets it by mistake
    assert len(sink.requests) == 1


async def test_a_reply_that_the_broker_forbids_lies_in_the_quarantine(
    sink: Sink, tmp_path: Path
) -> None:
    sink.script = done
    async with (
        forbidding(tmp_path) as broker,
        adaptor(broker.url, one_route(sink, "reply: true"), tmp_path) as running,
    ):
        await broker.publish([("plant/1", b"a")], properties=asking("secret/7"))
        await until(lambda: running.route("all")["unreplied"] == 1, "put aside")
        await until(lambda: not running.sink(sink.url)["window"]["used"], "acknowledged")
    (held,) = Quarantine(tmp_path / "quarantine.db").events()
    assert "not authorized" in held.reason
    assert (held.topic, held.event.attributes["id"]) == ("secret/7", "r1")


@both
async def test_a_reply_too_large_for_the_broker_lies_in_the_quarantine(
    sink: Sink, tmp_path: Path, version: str
) -> None:
    """MQTT 5 says how much is too much; of 3.1.1 all we see is that it hangs up, each time."""
    broker = Mosquitto(tmp_path, "allow_anonymous true\nmax_packet_size 2000\n")
    await broker.start()
    sink.script = lambda request: Answer(200, REPLY, b"x" * 5000 if request.body == b"5" else b"x")
    text = one_route(sink, f"reply: {{topic: done/x}}, {QUICK}")
    try:
        async with (
            adaptor(broker.url, text, tmp_path, protocol=version) as running,
            listener(broker, "done/x") as got,
        ):
            await broker.publish([(f"plant/{n}", b"%d" % n) for n in range(10)])
            await until(lambda: running.route("all")["unreplied"] == 1, "put aside")
            await until(lambda: running.route("all")["replied"] == 9, "the others come")
            await until(lambda: len(got) >= 9, "and are there")
            await until(lambda: not running.sink(sink.url)["window"]["used"], "acknowledged")
    finally:
        await broker.stop()
    (held,) = Quarantine(tmp_path / "quarantine.db").events()
    assert len(held.event.data) == 5000


async def test_with_a_dead_letter_sink_such_a_reply_goes_there(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    letters = Sink()
    await letters.start()
    sink.script = done
    more = f"reply: {{allow: replies/#}}, deadLetterSink: '{letters.url}'"
    try:
        async with adaptor(broker.url, one_route(sink, more), tmp_path) as running:
            await broker.publish([("plant/1", b"a")], properties=asking("other/7"))
            await until(lambda: letters.taken, "the letter comes")
            await until(lambda: not running.sink(sink.url)["window"]["used"], "acknowledged")
            assert running.route("all")["dead_lettered"] == 0  # that counts events of messages
    finally:
        await letters.stop()
    headers = letters.taken[0].headers
    assert (headers["ce-id"], headers["ce-knativeerrordest"]) == ("r1", "mqtt:other/7")


async def test_with_on_failure_drop_it_is_counted_and_let_go(
    broker: Mosquitto, sink: Sink, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink.script = done
    text = one_route(sink, "reply: {allow: replies/#}, onFailure: drop")
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish([("plant/1", b"a")], properties=asking("other/7"))
        await until(lambda: running.route("all")["unreplied"] == 1, "let go")
        await until(lambda: not running.sink(sink.url)["window"]["used"], "acknowledged")
    assert "other/7" in caplog.text
    assert len(Quarantine(tmp_path / "quarantine.db")) == 0


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, ("ce-specversion: 1.0", "ce-id: 1"), b"x"),
        Answer(200, ("Content-Type: application/cloudevents+json",), b"{"),
        Answer(200, ("Content-Type: application/cloudevents-batch+json",), b"[]"),
        Answer(200, (*REPLY, "ce-x: %C0%A0"), b"x"),
    ],
)
async def test_a_reply_that_only_looks_like_an_event_fails_the_delivery(
    broker: Mosquitto, sink: Sink, tmp_path: Path, answer: Answer
) -> None:
    sink.script = lambda _: answer
    async with adaptor(broker.url, one_route(sink, "reply: true"), tmp_path) as running:
        await broker.publish([("plant/1", b"a")], properties=asking("replies/7"))
        await until(lambda: running.route("all")["quarantined"] == 1, "put aside")
        await until(lambda: not running.sink(sink.url)["window"]["used"], "acknowledged")
    (held,) = Quarantine(tmp_path / "quarantine.db").events()
    assert "reply is no CloudEvent" in held.reason
    assert (held.event.data, held.status, held.answer) == (b"a", 200, answer.body)
