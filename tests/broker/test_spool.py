"""Routes with a spool: acknowledged once on our disk, delivered from there, whatever ends between.

What the file itself promises is in tests/unit/test_spool; what random deaths do, in test_faults.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from mqtt5 import PublishPacket, QoS

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
    routes,
    until,
)
from tests.broker.test_commands import weir
from tests.broker.test_operations import value
from weir.adaptor.operations import metrics
from weir.adaptor.quarantine import Quarantine
from weir.adaptor.service import client_id
from weir.adaptor.session import Session5
from weir.adaptor.spool import Batch, Entry, Spool, entries
from weir.proxy.wire.status import serve_status

READINGS = [("plant/x", b"%d" % n) for n in range(40)]
BODIES = [payload for _, payload in READINGS]
SPOOL = f"{QUICK}, spool: always"
both = pytest.mark.parametrize("version", ["5", "3.1.1"])


def spooled(running: Running, name: str = "all") -> int:
    return int(running.route(name)["spool"]["events"])


def ids_by_body(requests: Sequence[Request]) -> dict[bytes, set[str]]:
    found: dict[bytes, set[str]] = {}
    for request in requests:
        found.setdefault(request.body, set()).add(request.id)
    return found


# --- taken ----------------------------------------------------------------------------------------


@both
async def test_messages_are_acknowledged_while_the_sink_is_down_and_delivered_in_order_later(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    await sink.stop()
    text = one_route(sink, f"{SPOOL}, ordered: true")
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, text, tmp_path, protocol=version, receive_maximum=8) as running:
        await broker.publish(READINGS)
        await until(lambda: len(broker.pubacks(client)) == 40, "all are acknowledged")
        assert running.sink(sink.url)["window"]["used"] == 0
        assert spooled(running) == 40
        await sink.start()
        await until(lambda: spooled(running) == 0, "the spool is empty")
        assert running.route("all")["delivered"] == 40
    assert sink.bodies == BODIES


async def test_qos_0_messages_are_kept_as_well(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await sink.stop()
    async with adaptor(broker.url, one_route(sink, SPOOL), tmp_path) as running:
        await broker.publish(READINGS, qos=0)
        await until(lambda: spooled(running) == 40, "all are in the spool")
    await sink.start()
    async with adaptor(broker.url, one_route(sink, SPOOL), tmp_path):
        await until(lambda: len(sink.taken) == 40, "all are delivered by the next one")
    assert {request.headers["ce-mqttqos"] for request in sink.taken} == {"0"}


async def test_a_message_at_qos_2_is_delivered_once_and_the_broker_knows_it_is_over(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with adaptor(broker.url, one_route(sink, f"{SPOOL}, qos: 2"), tmp_path) as running:
        await broker.publish(READINGS, qos=2)
        await until(lambda: len(sink.taken) == 40, "all are delivered")
        await until(lambda: broker.completed(client_id("weir", sink.url)) == 40, "PUBCOMP")
        assert running.sink(sink.url)["reconnects"] == 0
    assert {request.headers["ce-mqttqos"] for request in sink.taken} == {"2"}
    assert max(Counter(sink.bodies).values()) == 1


async def test_a_route_that_goes_back_to_qos_1_still_takes_what_is_queued_at_qos_2(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with adaptor(broker.url, one_route(sink, f"{SPOOL}, qos: 2"), tmp_path):
        pass
    await broker.publish(READINGS, qos=2)
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        await until(lambda: len(sink.taken) == 40, "all are delivered")
        await until(lambda: broker.completed(client_id("weir", sink.url)) == 40, "PUBCOMP")
        assert running.sink(sink.url)["reconnects"] == 0


async def test_an_older_broker_gets_its_qos_2_route_subscribed_at_qos_1(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    text = one_route(sink, f"{SPOOL}, qos: 2")
    async with adaptor(broker.url, text, tmp_path, protocol="3.1.1") as running:
        await broker.publish(READINGS, qos=2)
        await until(lambda: len(sink.taken) == 40, "all are delivered")
        assert running.sink(sink.url)["refused_subscriptions"] == {}
    assert {request.headers["ce-mqttqos"] for request in sink.taken} == {"1"}


# --- kept -----------------------------------------------------------------------------------------


@both
async def test_what_was_acknowledged_survives_a_sigkill_and_keeps_its_ids(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    sink.script = lambda _: Answer(503)
    client = client_id("weir", sink.url)
    text = one_route(sink, SPOOL)
    async with AdaptorProcess(broker.url, text, tmp_path, "--mqtt-version", version) as process:
        await until(lambda: broker.subscribed(client), "subscribed")
        await broker.publish(READINGS)
        await until(lambda: len(broker.pubacks(client)) == 40, "all are acknowledged")
        await until(lambda: len(sink.requests) >= 10, "some have been tried")
        await process.kill()
        before = {each.event_id for each in entries(tmp_path / "spool.db")}
        assert len(before) == 40
        sink.script = lambda _: Answer()
        await process.start()
        await until(lambda: len(sink.taken) == 40, "all are delivered")
        assert await process.stop() == 0
    assert {request.id for request in sink.taken} == before
    assert all(len(found) == 1 for found in ids_by_body(sink.requests).values())


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_message_whose_acknowledgement_was_lost_is_recognised_by_the_next_process(
    broker: Mosquitto, sink: Sink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qos: int
) -> None:
    text = one_route(sink, f"{SPOOL}, qos: {qos}")
    with monkeypatch.context() as patched:
        patched.setattr(Session5, "_write_acks", lambda self, packet_ids: None)
        async with adaptor(broker.url, text, tmp_path):
            await broker.publish(READINGS, qos=qos)
            await until(lambda: len(sink.taken) == 40, "all are delivered")
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, text, tmp_path) as running:
        done = broker.completed if qos == 2 else lambda client: len(broker.pubacks(client))
        await until(lambda: done(client) == 40, "all are acknowledged now")
        assert running.route("all")["received"] == 0
        journal = running.adaptor.lanes[0].journal
        assert journal is not None
        await until(lambda: len(journal) == 0, "the notes are gone")
    assert len(sink.taken) == 40


async def test_a_message_whose_acknowledgement_was_lost_with_the_connection_is_recognised(
    broker: Mosquitto, sink: Sink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with adaptor(broker.url, one_route(sink, SPOOL), tmp_path) as running:
        with monkeypatch.context() as patched:
            patched.setattr(Session5, "_write_acks", lambda self, packet_ids: None)
            await broker.publish(READINGS)
            await until(lambda: len(sink.taken) == 40, "all are delivered")
            await broker.stop()
        await broker.start()
        await until(lambda: len(broker.pubacks(client_id("weir", sink.url))) == 40, "acknowledged")
        assert running.route("all")["received"] == 40
    assert len(sink.taken) == 40


async def test_equal_readings_that_come_while_nobody_is_there_are_all_delivered(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    """They look like what was acknowledged before, and have its packet ids, but are new."""
    async with adaptor(broker.url, one_route(sink, SPOOL), tmp_path):
        await broker.publish([("plant/x", b"21.5")] * 5)
        await until(lambda: len(sink.taken) == 5, "delivered")
    await broker.publish([("plant/x", b"21.5")] * 5)
    async with adaptor(broker.url, one_route(sink, SPOOL), tmp_path):
        await until(lambda: len(sink.taken) == 10, "delivered as well")
    assert len({request.id for request in sink.taken}) == 10


async def test_more_than_fits_into_memory_is_read_again_from_the_disk_in_order(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await sink.stop()
    many = [("plant/x", b"%d" % n) for n in range(1500)]
    async with adaptor(broker.url, one_route(sink, f"{SPOOL}, ordered: true"), tmp_path) as running:
        await broker.publish(many)
        await until(lambda: spooled(running) == 1500, "all are in the spool")
        assert running.sink(sink.url)["waiting"] < 500
        await sink.start()
        await broker.publish([("plant/x", b"late")])
        await until(lambda: len(sink.taken) == 1501, "all are delivered")
    assert sink.bodies == [*(payload for _, payload in many), b"late"]


async def test_large_messages_are_read_again_a_few_at_a_time(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await sink.stop()
    large = [("plant/x", b"%d:" % n + bytes(1 << 20)) for n in range(40)]
    async with adaptor(broker.url, one_route(sink, SPOOL), tmp_path) as running:
        await broker.publish(large)
        await until(lambda: spooled(running) == 40, "all are in the spool")
        assert running.sink(sink.url)["waiting"] <= 8
    async with adaptor(broker.url, one_route(sink, SPOOL), tmp_path) as running:
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "the sink is down")
        assert 0 < running.sink(sink.url)["waiting"] <= 8
        await sink.start()
        await until(lambda: spooled(running) == 0, "all are delivered")
    assert len(set(sink.bodies)) == 40


# --- full, old, damaged ---------------------------------------------------------------------------


async def test_a_full_spool_leaves_messages_with_the_broker_and_loses_none(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await sink.stop()
    large = [("plant/x", b"%d:" % n + b"x" * 10_000) for n in range(20)]
    text = one_route(sink, f"{QUICK}, spool: {{size: 65536}}")
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish(large)
        await until(lambda: running.sink(sink.url)["window"]["used"] == 14, "the rest waits")
        assert spooled(running) == 6
        assert len(broker.pubacks(client)) == 6
        await sink.start()
        await until(lambda: len(sink.taken) == 20, "all are delivered")
        await until(lambda: len(broker.pubacks(client)) == 20, "and acknowledged")
    assert max(Counter(sink.bodies).values()) == 1


async def test_a_full_share_is_told_and_stops_no_other_route(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    gate = asyncio.Event()

    async def script(request: Request) -> Answer:
        if request.headers["ce-mqtttopic"] == "plant/slow":
            await gate.wait()
        return Answer()

    sink.script = script
    text = routes(
        f"name: slow, filter: plant/slow, sink: '{sink.url}', {QUICK}, spool: {{size: 65536}}",
        f"name: fast, filter: plant/fast, sink: '{sink.url}', {SPOOL}",
    )
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish([("plant/slow", b"x" * 30_000)] * 4)
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "it is told")
        assert "share of the spool (65536 bytes) is full" in running.sink(sink.url)["reason"]
        await broker.publish([("plant/fast", b"1")])
        await until(lambda: running.route("fast")["delivered"] == 1, "the other goes on")
        gate.set()
        await until(lambda: running.route("slow")["delivered"] == 4, "then so does this")


@pytest.mark.parametrize("policy", ["quarantine", "drop"])
async def test_what_is_too_old_goes_the_way_of_onfailure_though_the_sink_is_down(
    broker: Mosquitto, sink: Sink, tmp_path: Path, policy: str
) -> None:
    await sink.stop()
    text = one_route(sink, f"{QUICK}, spool: {{age: PT1S}}, onFailure: {policy}")
    counted = {"quarantine": "quarantined", "drop": "dropped"}[policy]
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: running.route("all")[counted] == 40, "all have gone that way")
        await until(lambda: spooled(running) == 0, "and have left the spool")
    if policy == "quarantine":
        held = list(Quarantine(tmp_path / "quarantine.db").events())
        assert sorted(each.event.data for each in held) == sorted(BODIES)
        assert {each.reason for each in held} == {
            "it has lain in the spool for longer than the route allows"
        }


async def test_with_onfailure_block_nothing_is_ever_too_old(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await sink.stop()
    text = one_route(sink, f"{QUICK}, spool: {{age: PT1S}}, onFailure: block")
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: spooled(running) == 40, "they are in the spool")
        first = min(each.at for each in entries(tmp_path / "spool.db"))
        await until(lambda: time.time() - first > 2.5, "they are too old, and have been looked at")
        assert spooled(running) == 40
        await sink.start()
        await until(lambda: len(sink.taken) == 40, "all are delivered")


async def test_an_event_that_its_sink_refuses_leaves_the_spool_for_the_quarantine(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: Answer(422 if request.body == b"3" else 204)
    async with adaptor(broker.url, one_route(sink, SPOOL), tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: running.route("all")["quarantined"] == 1, "the quarantine has it")
        await until(lambda: spooled(running) == 0, "the spool is empty")
        assert running.route("all")["delivered"] == 39


async def test_an_event_that_its_sink_refuses_leaves_the_spool_for_the_dead_letter_sink(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: Answer(422 if request.body == b"3" else 204)
    letters = Sink()
    await letters.start()
    text = one_route(sink, f"{SPOOL}, deadLetterSink: '{letters.url}'")
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: running.route("all")["dead_lettered"] == 1, "the letter has arrived")
        await until(lambda: spooled(running) == 0, "the spool is empty")
    await letters.stop()
    (letter,) = letters.taken
    assert (letter.body, letter.headers["ce-knativeerrorcode"]) == (b"3", "422")
    assert letter.id == next(each.id for each in sink.requests if each.body == b"3")


async def test_events_of_a_route_that_is_gone_stay_until_it_is_back(
    broker: Mosquitto, sink: Sink, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await sink.stop()
    async with adaptor(broker.url, one_route(sink, SPOOL), tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: spooled(running) == 40, "they are in the spool")
    other = routes(f"name: other, filter: plant/#, sink: '{sink.url}', {QUICK}")
    async with adaptor(broker.url, other, tmp_path):
        assert "40 events lie in the spool" in caplog.text
        assert "for the route `all`" in caplog.text
    await sink.start()
    async with adaptor(broker.url, one_route(sink, SPOOL), tmp_path):
        await until(lambda: len(sink.taken) == 40, "all are delivered")


async def test_a_spool_that_is_moved_away_ends_the_adaptor_with_nothing_lost(
    broker: Mosquitto, sink: Sink, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    client = client_id("weir", sink.url)
    async with AdaptorProcess(broker.url, one_route(sink, SPOOL), tmp_path) as process:
        await until(lambda: broker.subscribed(client), "subscribed")
        for name in ("spool.db", "spool.db-wal", "spool.db-shm"):
            (tmp_path / name).rename(tmp_path / f"moved-{name}")
        await broker.publish(READINGS)
        assert await process.ended() == 2
        assert "spool.db was moved, deleted or replaced" in capfd.readouterr().err
        assert broker.pubacks(client) == []
        await process.start()
        await until(lambda: set(sink.bodies) == set(BODIES), "all are delivered")
        await process.stop()


async def test_a_damaged_spool_is_named_before_anything_is_taken(
    broker: Mosquitto, sink: Sink, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spool.db").write_bytes(os.urandom(8192))
    async with AdaptorProcess(broker.url, one_route(sink, SPOOL), tmp_path) as process:
        assert await process.ended() == 2
    told = capfd.readouterr().err
    assert f"the spool {tmp_path}/spool.db is damaged" in told
    assert "move it away" in told
    assert not broker.subscribed(client_id("weir", sink.url))


async def test_an_entry_that_is_no_message_any_more_is_named_and_can_be_discarded(
    broker: Mosquitto, sink: Sink, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spool.db"
    spool = Spool(path)
    spool.write(Batch(entries=[Entry(7, "all", 0.0, "id", b"\x32\x40\x00\x07plant")]))
    spool.close()
    text = one_route(sink, f"{SPOOL}, onFailure: block")
    async with AdaptorProcess(broker.url, text, tmp_path) as process:
        assert await process.ended() == 2
        assert f"{path} is damaged: entry 7 is no message" in capfd.readouterr().err
        assert weir("spool", "list", "--events", "--spool", str(path)) == 0
        assert "damaged: entry 7" in capfd.readouterr().out
        assert weir("spool", "discard", "7", "--spool", str(path)) == 0
        await process.start()
        await until(lambda: broker.subscribed(client_id("weir", sink.url)), "it starts")
        await process.stop()


async def test_a_spool_that_no_route_wants_and_another_adaptor_uses_stops_nobody(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with (
        adaptor(broker.url, one_route(sink, SPOOL), tmp_path, client_id="one"),
        adaptor(broker.url, one_route(sink), tmp_path, client_id="two") as other,
    ):
        assert other.adaptor.store is None


# --- what people see ------------------------------------------------------------------------------


async def test_status_and_metrics_tell_what_is_in_the_spool(
    broker: Mosquitto, sink: Sink, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await sink.stop()
    async with adaptor(broker.url, one_route(sink, SPOOL), tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: spooled(running) == 40, "they are in the spool")
        size = running.route("all")["spool"]["bytes"]
        text = metrics(running.adaptor).decode()
        assert value(text, "weir_adaptor_events_spooled", route="all") == 40
        assert value(text, "weir_adaptor_spool_bytes", route="all") == size > 0
        assert value(text, "weir_adaptor_spool_limit_bytes", route="all") == 256 << 20
        assert value(text, "weir_adaptor_events_pending", route="all") == 40
        server = await serve_status(tmp_path / "status", running.adaptor.snapshot)
        await asyncio.to_thread(weir, "adaptor", "status", str(tmp_path / "status"))
        server.close()
        told = capsys.readouterr().out
        assert f"spool {tmp_path}/spool.db: 40 events, {size} bytes" in told
        assert "in the spool 40 events" in told


def test_the_spool_can_be_listed_and_discarded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spool.db"
    packet = PublishPacket("plant/x", b"21.5", qos=QoS.AT_LEAST_ONCE, packet_id=1).write()
    spool = Spool(path)
    spool.write(
        Batch(entries=[Entry(n, "b" if n > 2 else "a", 0.0, f"id-{n}", packet) for n in (1, 2, 3)])
    )
    where = ("--spool", str(path))
    assert weir("spool", "list", *where) == 0
    assert "a: 2 events, the oldest of 1970-01-01 00:00:00Z\nb: 1 events" in capsys.readouterr().out
    assert weir("spool", "list", "--events", "--route", "b", *where) == 0
    assert "b  id id-3\n        plant/x, 4 bytes" in capsys.readouterr().out
    assert weir("spool", "list", "--json", *where) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["id"] == "id-1"
    assert weir("spool", "discard", *where) == 2
    assert "--all" in capsys.readouterr().err
    assert weir("spool", "discard", "1", *where) == 2
    assert "in use by another adaptor" in capsys.readouterr().err
    spool.close()
    assert weir("spool", "discard", "1", *where) == 0
    assert weir("spool", "discard", "--all", "--route", "b", *where) == 0
    assert [each.number for each in entries(path)] == [2]


def test_a_spool_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weir("spool", "list", "--spool", str(tmp_path / "none.db")) == 2
    assert "there is no spool" in capsys.readouterr().err
    assert not (tmp_path / "none.db").exists()
