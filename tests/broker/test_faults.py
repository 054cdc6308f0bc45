"""The fault runner: adaptor, broker and sink die at random under load; then we count the messages.

A message counts when the broker has acknowledged it to the publisher; each of those must reach the
sink, and what reaches it twice must have the id of the first time: the publisher's, or with a
spool the one that we made. Short by default; WEIR_FAULT_SECONDS=300 runs it for five minutes.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import defaultdict
from pathlib import Path

import mqtt5
import pytest

from tests.broker.harness import (
    QUICK,
    AdaptorProcess,
    Answer,
    Mosquitto,
    Request,
    Sink,
    one_route,
    until,
)
from weir.adaptor.service import client_id

SECONDS = float(os.environ.get("WEIR_FAULT_SECONDS", "6"))
PER_SECOND = 2000
WINDOW = 500
EVERYONE = ("adaptor", "adaptor", "sink", "broker")


class Publisher:
    """Publishes numbered messages at a rate over any number of connections. `safe`: numbers that
    the broker has acknowledged. `ids`: give each message one, and publish again what the broker
    may not have; else every message has a number of its own."""

    def __init__(self, port: int, rate: int, qos: int = 1, *, ids: bool = True) -> None:
        self._port, self._rate, self._ids = port, rate, ids
        self._qos = mqtt5.QoS.EXACTLY_ONCE if qos == 2 else mqtt5.QoS.AT_LEAST_ONCE
        self._next = 0
        self._unsure: list[int] = []
        self.safe: set[int] = set()

    async def run(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end or self._unsure:
            try:
                await self._connection(end)
            except (OSError, EOFError):
                await asyncio.sleep(0.05)

    async def _connection(self, end: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        open_: dict[int, int] = {}
        try:
            writer.write(mqtt5.ConnectPacket("fault-publisher", clean_start=True).write())
            reading = asyncio.create_task(self._read(reader, writer, open_))
            try:
                await self._write(writer, open_, end, reading)
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
        finally:
            if self._ids:
                self._unsure += open_.values()
            writer.close()

    async def _write(
        self,
        writer: asyncio.StreamWriter,
        open_: dict[int, int],
        end: float,
        reading: asyncio.Task[None],
    ) -> None:
        loop = asyncio.get_running_loop()
        packet_id, start, sent = 0, loop.time(), 0
        while loop.time() < end or self._unsure or open_:
            if reading.done():
                raise EOFError
            due = int((loop.time() - start) * self._rate) - sent
            while due > 0 and len(open_) < WINDOW and (loop.time() < end or self._unsure):
                number = self._unsure.pop() if self._unsure else self._fresh()
                packet_id = packet_id % 65_535 + 1
                open_[packet_id] = number
                writer.write(
                    mqtt5.PublishPacket(
                        "plant/x",
                        b"%d" % number,
                        qos=self._qos,
                        packet_id=packet_id,
                        user_properties=[("id", f"reading-{number}")] if self._ids else [],
                    ).write()
                )
                due, sent = due - 1, sent + 1
            await writer.drain()
            await asyncio.sleep(0.002)

    def _fresh(self) -> int:
        self._next += 1
        return self._next

    async def _read(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, open_: dict[int, int]
    ) -> None:
        rest = b""
        while data := await reader.read(65_536):
            rest += data
            while rest:
                try:
                    packet, size = mqtt5.read(memoryview(rest))
                except IndexError:
                    break
                rest = rest[size:]
                if isinstance(packet, mqtt5.PubRecPacket):
                    writer.write(mqtt5.PubRelPacket(packet.packet_id).write())
                elif isinstance(packet, mqtt5.PubAckPacket | mqtt5.PubCompPacket):
                    number = open_.pop(packet.packet_id, None)
                    if number is not None:
                        self.safe.add(number)


@pytest.mark.timeout(SECONDS * 4 + 120)
@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_nothing_is_lost_whoever_dies_and_whenever(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    publisher = Publisher(broker.port, PER_SECOND)
    text = one_route(sink)
    ids = await storm(broker, sink, tmp_path, text, publisher, "--mqtt-version", version)
    if version == "5":  # 3.1.1 carries no user properties
        assert all(found == {f"reading-{number}"} for number, found in ids.items())


@pytest.mark.timeout(SECONDS * 4 + 120)
@pytest.mark.parametrize(
    ("qos", "mortal"),
    [(1, (*EVERYONE, "routes")), (2, ("adaptor", "adaptor", "sink", "routes"))],
)
async def test_with_a_spool_every_event_keeps_the_id_that_it_was_given_first(
    broker: Mosquitto, sink: Sink, tmp_path: Path, qos: int, mortal: tuple[str, ...]
) -> None:
    """At QoS 2 the broker stays: mosquitto 2.0.11 forgets in a restart whose PUBREC it has had, and
    publishes again what it has sent PUBREL for."""
    publisher = Publisher(broker.port, PER_SECOND, qos, ids=False)
    text = one_route(sink, f"{QUICK}, spool: always, qos: {qos}")
    options = ("--mqtt-version", "5")
    ids = await storm(broker, sink, tmp_path, text, publisher, *options, mortal=mortal)
    assert {number: found for number, found in ids.items() if len(found) != 1} == {}


@pytest.mark.timeout(SECONDS * 4 + 120)
async def test_with_a_spool_and_an_older_broker_nothing_is_lost_either(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    """3.1.1 has no way to prove that a PUBACK has arrived, so some may have a second id."""
    publisher = Publisher(broker.port, PER_SECOND, ids=False)
    text = one_route(sink, f"{QUICK}, spool: always")
    await storm(broker, sink, tmp_path, text, publisher, "--mqtt-version", "3.1.1")


async def storm(
    broker: Mosquitto,
    sink: Sink,
    folder: Path,
    text: str,
    publisher: Publisher,
    *options: str,
    mortal: tuple[str, ...] = EVERYONE,
) -> dict[int, set[str]]:
    """The ids by which each number has reached the sink, when all that are safe have. `mortal`: who
    dies, or what changes (`routes`, the file of `text`)."""
    chance = random.Random(os.environ.get("WEIR_FAULT_SEED", "1"))
    ids: defaultdict[int, set[str]] = defaultdict(set)
    sink.remember = False

    def script(request: Request) -> Answer:
        ids[int(request.body)].add(request.id)
        return Answer()

    sink.script = script
    options += ("--receive-maximum", "64")
    deaths = dict.fromkeys(mortal, 0)
    async with AdaptorProcess(broker.url, text, folder, *options) as process:
        client = client_id("weir", sink.url)
        await until(lambda: broker.subscribed(client), "subscribed")
        publishing = asyncio.create_task(publisher.run(SECONDS))
        while not publishing.done():
            await asyncio.sleep(chance.uniform(0.2, 1.5))
            who = chance.choice(mortal)
            deaths[who] += 1
            if who == "adaptor":
                await process.kill()
                await process.start()
            elif who == "routes":
                kind = f"type: io.example.g{deaths[who]}"
                process.routes.write_text(text.replace("spool: always", f"spool: always, {kind}"))
                process.send(signal.SIGHUP)
            elif who == "sink":
                await sink.stop()
                await asyncio.sleep(chance.uniform(0.0, 0.5))
                await sink.start()
            else:  # in order: a SIGKILL of mosquitto loses what it has acknowledged
                await broker.stop()
                await broker.start()
        await publishing
        while missing := publisher.safe - ids.keys():  # however long it takes, if it goes on
            await until(lambda: not missing.isdisjoint(ids), "one more safe message arrives")
        await process.stop()
    assert len(publisher.safe) > SECONDS * PER_SECOND / 20
    print(f"{len(publisher.safe)} messages, deaths {deaths}, 0 lost")
    return ids
