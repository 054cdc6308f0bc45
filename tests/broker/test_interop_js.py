"""The official CloudEvents SDK for JavaScript, which has an MQTT binding, as the other end."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiomqtt
import pytest

from tests.broker.harness import Mosquitto, Sink, adaptor, one_route, properties, until
from tests.broker.test_backward import device, listening, send
from tests.broker.test_replies import users

SDK = "cloudevents@10.0.0"
WITNESS = Path(__file__).parent / "sdk_js" / "witness.js"
INSTALLED = Path(__file__).parents[2] / "build" / "sdk-js"

EVENT = {
    "specversion": "1.0",
    "id": "7 %C3",
    "source": "/hall/3",
    "type": "io.move",
    "subject": "lämp",
    "time": "2026-11-24T13:45:11.250Z",
    "shift": "spät, €",
}
Witness = Callable[..., Any]


@pytest.fixture(scope="module")
def witness() -> Witness:
    """Asks the SDK."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs Node.js (apt-get install nodejs npm)")
    if not (INSTALLED / "node_modules" / "cloudevents").exists():
        INSTALLED.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-save", "--ignore-scripts", "--prefix", str(INSTALLED), SDK]
        made = subprocess.run(command, cwd=INSTALLED, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"npm can't install {SDK}: {made.stderr.strip()[-200:]}")
    environment = {**os.environ, "NODE_PATH": str(INSTALLED / "node_modules")}

    def ask(op: str, **question: Any) -> Any:
        answer = subprocess.run(
            [node, str(WITNESS)],
            input=json.dumps({"op": op, **question}).encode(),
            capture_output=True,
            env=environment,
            check=True,
        )
        return json.loads(answer.stdout)

    return ask


@pytest.mark.parametrize("mode", ["binary", "structured"])
@pytest.mark.parametrize(
    ("content_type", "data", "body"),
    [
        ("application/json", {"on": True, "grün": [1, None]}, '{"on":true,"grün":[1,null]}'),
        ("text/plain", "grün", "grün"),
    ],
)
async def test_what_that_sdk_publishes_passes_through(
    broker: Mosquitto,
    sink: Sink,
    tmp_path: Path,
    witness: Witness,
    mode: str,
    content_type: str,
    data: object,
    body: str,
) -> None:
    made = witness(
        "write", mode=mode, event={**EVENT, "datacontenttype": content_type, "data": data}
    )
    given = properties(made["contentType"], **made["userProperties"])
    payload = base64.b64decode(made["payload"])
    async with adaptor(broker.url, one_route(sink, "mode: structured"), tmp_path):
        await broker.publish([("plant/1", payload)], properties=given)
        await until(lambda: sink.taken, "the event arrives")
    event = json.loads(sink.taken[0].body)
    assert event.items() >= {**EVENT, "datacontenttype": content_type, "data": data}.items()
    assert event["mqtttopic"] == "plant/1"
    assert body == (event["data"] if isinstance(data, str) else _compact(event["data"]))


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_that_sdk_reads_what_we_publish(
    broker: Mosquitto, tmp_path: Path, witness: Witness, version: str
) -> None:
    body = _compact({**EVENT, "datacontenttype": "text/plain", "data": "grün"}).encode()
    kind = {"content-type": "application/cloudevents+json"}
    async with (
        listening(broker.url, tmp_path, protocol=version) as (_, port),
        device(broker) as got,
    ):
        assert (await send(port, kind, body))[0] == 204
        await until(lambda: got, "the device gets it")
    message = got[0]
    declared = _content_type(message) if version == "5" else kind["content-type"]
    found = witness(
        "read",
        contentType=declared,
        userProperties=users(message),
        payload=base64.b64encode(bytes(message.payload)).decode(),
    )
    assert found["isEvent"] is True
    assert found["event"].items() >= {**EVENT, "data": "grün"}.items()
    assert declared == ("text/plain" if version == "5" else kind["content-type"])


def _content_type(message: aiomqtt.Message) -> str:
    given: Any = message.properties
    return str(given.ContentType)
