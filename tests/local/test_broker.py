"""The broker of a run: the user's, else mosquitto, else amqtt; and clear words for none at all."""

import asyncio
import importlib.util
import shutil
from pathlib import Path

import aiomqtt
import pytest

from tests.local.conftest import Starter
from weir.adaptor.broker import Broker as Address
from weir.local import broker as brokers

needs_amqtt = pytest.mark.skipif(
    importlib.util.find_spec("amqtt") is None, reason="amqtt is not installed"
)
FLEET = ("--devices", "5", "--interval", "0.05")


def ignore(name: str, line: str) -> None:
    pass


@pytest.fixture
def no_mosquitto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)


async def passes_a_message(url: str) -> bool:
    address = Address.parse(url)
    async with aiomqtt.Client(address.host, address.port) as client:
        await client.subscribe("a/#", qos=1)
        await client.publish("a/b", b"x", qos=1)
        async for message in client.messages:
            return message.payload == b"x"
    return False


@pytest.mark.skipif(
    shutil.which("mosquitto", path="/usr/sbin:/usr/bin") is None, reason="mosquitto"
)
async def test_mosquitto_is_started_on_a_free_port_and_ends_with_the_run(tmp_path: Path) -> None:
    broker = await brokers.start(None, tmp_path, ignore)
    assert broker.version == "5"
    assert await passes_a_message(broker.url)
    await broker.close()
    assert broker.child is not None
    assert not broker.child.running


@needs_amqtt
async def test_without_mosquitto_amqtt_is_started_and_its_limit_is_told(
    tmp_path: Path, no_mosquitto: None
) -> None:
    broker = await brokers.start(None, tmp_path, ignore)
    try:
        assert broker.version == "3.1.1"
        assert "3.1.1 only" in broker.note
        assert await passes_a_message(broker.url)
    finally:
        await broker.close()


@needs_amqtt
async def test_a_run_over_amqtt_delivers_every_event(
    tmp_path: Path, no_mosquitto: None, weir_run: Starter
) -> None:
    broker = await brokers.start(None, tmp_path, ignore)
    try:
        run = weir_run("--broker", broker.url, *FLEET, "--for", "4", "--verify", "/count")
        summary = await asyncio.to_thread(run.summary)
        assert summary["problems"] == [], run.notes.read_text()
        assert summary["delivered"] == summary["published"] == summary["function_count"] > 0
        assert "MQTT 3.1.1" in summary["session"]
    finally:
        await broker.close()


async def test_without_any_broker_the_ways_out_are_named(
    tmp_path: Path, no_mosquitto: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(brokers.BrokerError) as caught:
        await brokers.start(None, tmp_path, ignore)
    for word in ("--broker", "apt-get install mosquitto", "pip install"):
        assert word in str(caught.value)


async def test_a_users_broker_is_named_without_its_password(tmp_path: Path) -> None:
    broker = await brokers.start("mqtt://me:secret@192.0.2.1:1884", tmp_path, ignore)
    assert broker.name == "mqtt://192.0.2.1:1884"
    assert "secret" not in broker.name
