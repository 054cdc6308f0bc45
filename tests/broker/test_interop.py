"""The official CloudEvents SDK for Python as the other end, in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings.http import (
    HTTPMessage,
    from_http_event,
    to_binary_event,
    to_structured_event,
)
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

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
from tests.broker.test_backward import device, listening, send
from tests.broker.test_replies import asking, listener
from weir.adaptor.jsonformat import batch_from_json, to_batch

both = pytest.mark.parametrize("version", ["5", "3.1.1"])
Encode = Callable[[BaseCloudEvent], HTTPMessage]
encodings = pytest.mark.parametrize("encode", [to_binary_event, to_structured_event])

ATTRIBUTES = {
    "id": '7 %C3 "x"',
    "source": "/hall/3",
    "type": "io.move",
    "subject": "lämp 3",
    "time": datetime(2026, 11, 24, 13, 45, 11, 250000, UTC),
    "datacontenttype": "application/json",
    "dataschema": "https://schemas.example/move",
    "shift": "spät, €",
}
DATA: dict[str, Any] = {"on": True, "grün": [1.5, None, "x"], "n": 12345678901234567890}


def made(data: Any = DATA, **more: Any) -> CloudEvent:
    return CloudEvent(attributes={**ATTRIBUTES, **more}, data=data)


def read(request: Request) -> BaseCloudEvent:
    """The request as the SDK reads it."""
    return from_http_event(HTTPMessage(headers=request.headers, body=request.body))


def is_that_event(event: BaseCloudEvent, data: Any = DATA) -> None:
    found = event.get_attributes()
    assert {name: found[name] for name in ATTRIBUTES} == ATTRIBUTES
    assert event.get_data() == data


# --- from us to the SDK ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["binary", "structured"])
@pytest.mark.parametrize(
    ("payload", "content_type", "data"),
    [
        (json.dumps(DATA).encode(), "application/json", DATA),
        ("grün".encode(), "text/plain", "grün"),
        (b"\xff\x00", "application/octet-stream", b"\xff\x00"),
    ],
)
async def test_the_sdk_reads_what_a_plain_message_became(
    broker: Mosquitto,
    sink: Sink,
    tmp_path: Path,
    mode: str,
    payload: bytes,
    content_type: str,
    data: Any,
) -> None:
    text = one_route(sink, f"mode: {mode}, extensions: {{place: 'süd {{level[-1]}}'}}")
    async with adaptor(broker.url, text, tmp_path):
        await broker.publish([("plant/öfen 1", payload)], properties=properties(content_type))
        await until(lambda: sink.taken, "the event arrives")
    event = read(sink.taken[0])
    attributes = event.get_attributes()
    assert (event.get_subject(), attributes["place"]) == ("plant/öfen 1", "süd öfen 1")
    assert (event.get_datacontenttype(), event.get_data()) == (content_type, data)
    assert isinstance(event.get_time(), datetime)


async def test_the_sdk_reads_every_event_of_a_batch(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    text = one_route(sink, "mode: batch, batch: {events: 3, age: PT10S}")
    async with adaptor(broker.url, text, tmp_path):
        await broker.publish([(f"plant/{n}", b"\xff%d" % n) for n in range(3)])
        await until(lambda: sink.taken, "the batch arrives")
    array = json.loads(sink.taken[0].body)  # the SDK knows no batches: they are read one by one
    found = [JSONFormat().read(None, json.dumps(each)) for each in array]
    assert [each.get_data() for each in found] == [b"\xff%d" % n for n in range(3)]
    assert [each.get_subject() for each in found] == [f"plant/{n}" for n in range(3)]


@both
async def test_the_sdk_reads_a_command_in_structured_mode(
    broker: Mosquitto, tmp_path: Path, version: str
) -> None:
    """And the SDK has no MQTT binding, so binary mode is read by its HTTP one, names prefixed."""
    message = to_binary_event(made(subject="lamp"))
    async with (
        listening(broker.url, tmp_path, protocol=version) as (_, port),
        device(broker) as got,
    ):
        assert (await send(port, dict(message.headers), message.body))[0] == 204
        await until(lambda: got, "the device gets it")
    payload = bytes(got[0].payload)
    if version == "3.1.1":
        event = JSONFormat().read(None, payload)
    else:
        given: Any = got[0].properties
        headers = {f"ce-{name}": value for name, value in given.UserProperty}
        headers["content-type"] = given.ContentType
        assert "ce-datacontenttype" not in headers
        event = from_http_event(HTTPMessage(headers=_encoded(headers), body=payload))
    assert event.get_attributes()["shift"] == ATTRIBUTES["shift"]
    assert (event.get_id(), event.get_data()) == (ATTRIBUTES["id"], DATA)


def _encoded(headers: dict[str, str]) -> dict[str, str]:
    """MQTT has no percent-encoding, HTTP has."""
    from urllib.parse import quote

    return {name: quote(value, safe="/:;=") for name, value in headers.items()}


# --- from the SDK to us ---------------------------------------------------------------------------


@encodings
@pytest.mark.parametrize("mode", ["binary", "structured"])
@both
async def test_an_event_of_the_sdk_passes_through_both_directions_unchanged(
    broker: Mosquitto, sink: Sink, tmp_path: Path, encode: Encode, mode: str, version: str
) -> None:
    """SDK, HTTP, --listen, MQTT, route, HTTP, SDK."""
    text = one_route(sink, f"mode: {mode}").replace("plant/#", "devices/#")
    message = encode(made())
    async with listening(broker.url, tmp_path, routes=text, protocol=version) as (running, port):
        await running.connected()
        assert (await send(port, dict(message.headers), message.body))[0] == 204
        await until(lambda: sink.taken, "it comes out at the other end")
    is_that_event(read(sink.taken[0]))


@encodings
@pytest.mark.parametrize(
    ("data", "content_type"),
    [(b"\x00\xff", "application/octet-stream"), ("grün", "text/plain"), (None, "application/json")],
)
async def test_data_of_any_kind_passes_through(
    broker: Mosquitto, sink: Sink, tmp_path: Path, encode: Encode, data: Any, content_type: str
) -> None:
    text = one_route(sink, "mode: structured").replace("plant/#", "devices/#")
    message = encode(made(data, datacontenttype=content_type, subject="lamp"))
    async with listening(broker.url, tmp_path, routes=text) as (running, port):
        await running.connected()
        assert (await send(port, dict(message.headers), message.body))[0] == 204
        await until(lambda: sink.taken, "it comes out at the other end")
    event = read(sink.taken[0])
    assert (event.get_data() or None, event.get_datacontenttype()) == (data, content_type)


@both
async def test_an_event_that_the_sdk_made_is_one_on_mqtt_too(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    body = JSONFormat().write(made())
    given = properties("application/cloudevents+json") if version == "5" else properties()
    async with adaptor(broker.url, one_route(sink), tmp_path, protocol=version):
        await broker.publish([("plant/1", body)], properties=given)
        await until(lambda: sink.taken, "the event arrives")
    is_that_event(read(sink.taken[0]))


@encodings
async def test_a_reply_of_the_sdk_is_published(
    broker: Mosquitto, sink: Sink, tmp_path: Path, encode: Encode
) -> None:
    message = encode(made())
    head = tuple(f"{name}: {value}" for name, value in message.headers.items())
    sink.script = lambda _: Answer(200, head, message.body)
    async with (
        adaptor(broker.url, one_route(sink, "reply: true"), tmp_path),
        listener(broker, "replies/#") as got,
    ):
        await broker.publish([("plant/1", b"a")], properties=asking("replies/1"))
        await until(lambda: got, "the reply comes")
    given: Any = got[0].properties
    assert dict(given.UserProperty)["shift"] == ATTRIBUTES["shift"]
    assert dict(given.UserProperty)["id"] == ATTRIBUTES["id"]
    assert json.loads(bytes(got[0].payload)) == DATA


def test_a_batch_of_the_sdks_events_is_read() -> None:
    array = to_batch([JSONFormat().write(made(id=str(n))) for n in range(3)])
    found = batch_from_json(array)
    assert [each.attributes["id"] for each in found] == ["0", "1", "2"]
    assert all(json.loads(each.data) == DATA for each in found)
