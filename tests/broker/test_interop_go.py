"""The official CloudEvents SDK for Go, which Knative uses and which knows batches, as other end."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.broker.harness import (
    Mosquitto,
    Request,
    Sink,
    adaptor,
    one_route,
    properties,
    until,
)
from tests.broker.test_backward import device, listening, read_answer
from tests.broker.test_replies import users
from tests.pods import go_command, why_no_go

SOURCE = Path(__file__).parent / "sdk_go"
PAYLOADS = [
    (b'{"celsius": 1.10, "n": 12345678901234567890}', "application/json"),
    ("grün".encode(), "text/plain"),
    (b"\xff\x00", "application/octet-stream"),
]
Witness = Callable[[str, bytes], bytes]


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Witness:
    """Asks the SDK."""
    if reason := why_no_go():
        pytest.skip(reason)
    binary = tmp_path_factory.mktemp("go") / "witness"
    command = [str(go_command()), "build", "-o", str(binary), "."]
    made = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"the Go SDK can't be built: {made.stderr.strip()[-200:]}")

    def ask(what: str, given: bytes) -> bytes:
        done = subprocess.run([binary, what], input=given, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return ask


def as_sent(request: Request) -> bytes:
    lines = [f"{name}: {value}" for name, value in request.headers.items()]
    return "\r\n".join(["POST / HTTP/1.1", *lines, "", ""]).encode() + request.body


@pytest.mark.parametrize("mode", ["binary", "structured", "batch"])
async def test_that_sdk_reads_what_messages_became_in_every_mode(
    broker: Mosquitto, sink: Sink, tmp_path: Path, witness: Witness, mode: str
) -> None:
    batch = "batch: {events: 3, age: PT10S}, " if mode == "batch" else ""
    text = one_route(sink, f"mode: {mode}, {batch}extensions: {{place: 'süd, {{topic}}'}}")
    async with adaptor(broker.url, text, tmp_path):
        for number, (payload, content_type) in enumerate(PAYLOADS):
            given = properties(content_type, id=f"{number} %C3")
            await broker.publish([(f"plant/öfen {number}", payload)], properties=given)
        await until(lambda: len(sink.taken) == (1 if batch else 3), "the events arrive")
    found: list[dict[str, Any]] = []
    for request in sink.taken:
        found += json.loads(witness("read", as_sent(request)))
    found.sort(key=lambda event: str(event["id"]))
    plain = unquote if mode == "binary" else str  # it does not undo what the binding encodes
    for number, (event, (payload, content_type)) in enumerate(zip(found, PAYLOADS, strict=True)):
        assert plain(event["id"]) == f"{number} %C3"
        assert plain(event["subject"]) == f"plant/öfen {number}"
        assert plain(event["extensions"]["place"]) == f"süd, plant/öfen {number}"
        assert event["type"] == content_type
        assert base64.b64decode(event["data"]) == payload


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_a_batch_of_that_sdk_is_published_event_by_event(
    broker: Mosquitto, tmp_path: Path, witness: Witness, version: str
) -> None:
    batch = [
        {
            **{"specversion": "1.0", "id": f"{number}", "source": "/s", "type": "t"},
            **{"subject": f"lamp{number}", "datacontenttype": "application/json"},
            **{"data": {"n": number}, "shift": "spät"},
        }
        for number in range(5)
    ]
    request = witness("write", json.dumps(batch).encode())
    assert b"application/cloudevents-batch+json" in request
    async with (
        listening(broker.url, tmp_path, protocol=version) as (_, port),
        device(broker) as got,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        assert (await read_answer(reader))[0] == 204
        writer.close()
        await until(lambda: len(got) == 5, "the devices get them")
    for number, message in enumerate(got):
        assert str(message.topic) == f"devices/lamp{number}/command"
        payload = json.loads(bytes(message.payload))
        attributes = users(message) if version == "5" else payload
        assert (attributes["id"], attributes["shift"]) == (str(number), "spät")
        assert (payload if version == "5" else payload["data"]) == {"n": number}
