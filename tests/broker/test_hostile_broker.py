"""Brokers that lie, drip, flood and never end: a clear error, bounded memory, and recovery."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.broker.harness import (
    AdaptorProcess,
    Answer,
    Mosquitto,
    Request,
    Sink,
    adaptor,
    mosquitto_binary,
    one_route,
    until,
)
from tests.broker.hostile import HostileBroker, Talk, packet

both = pytest.mark.parametrize("version", ["5", "3.1.1"])
MIB = 1 << 20
BOUND = 300
"""MiB that an adaptor may ever have resident; the floods are several times that."""


# --- what it says -----------------------------------------------------------------------------


async def garbage(talk: Talk) -> None:
    talk.writer.write(random.Random(1).randbytes(4096))
    await talk.listen()


async def another_protocol(talk: Talk) -> None:
    talk.writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    await talk.listen()


async def hangs_up(talk: Talk) -> None:
    await talk.next_packet()


async def hangs_up_at_once(talk: Talk) -> None:
    pass


async def unknown_refusal(talk: Talk) -> None:
    await talk.next_packet()
    talk.writer.write(packet(0x20, b"\0\x77\0"[: len(talk.connack()) - 2]))
    await talk.listen()


async def garbage_for_a_suback(talk: Talk) -> None:
    await talk.until_subscribed()
    talk.writer.write(b"\x90\x01\xff" + b"\xff" * 64)
    await talk.listen()


async def an_endless_packet(talk: Talk) -> None:
    await talk.established()
    talk.writer.write(b"\x32\xff\xff\xff\x7f\x00\x07plant/x\x00\x01")
    while True:
        await talk.flood(b"\0" * MIB)


async def a_length_without_end(talk: Talk) -> None:
    await talk.established()
    talk.writer.write(b"\x32" + b"\xff" * 64)
    await talk.listen()


async def an_unfinished_packet(talk: Talk) -> None:
    await talk.established()
    talk.writer.write(talk.publish("plant/x", b"x" * 1000)[:-1])


async def packets_of_the_server_s_side_only(talk: Talk) -> None:
    await talk.established()
    talk.writer.write(b"\x82\x06\x00\x01\x00\x01x\x00" * 3)
    await talk.listen()


HOSTILE = (
    *(garbage, hangs_up, unknown_refusal),
    *(garbage_for_a_suback, a_length_without_end, an_unfinished_packet, an_endless_packet),
)
HOSTILE_5 = (*(another_protocol, hangs_up_at_once, packets_of_the_server_s_side_only),)
CASES = [
    *((script, version) for script in HOSTILE for version in ("5", "3.1.1")),
    *((script, "5") for script in HOSTILE_5),
]


@pytest.mark.parametrize(
    ("script", "version"), CASES, ids=[f"{script.__name__}-{version}" for script, version in CASES]
)
async def test_what_is_no_mqtt_is_named_and_a_real_broker_is_found_again(
    sink: Sink, tmp_path: Path, script: Callable[[Talk], Awaitable[None]], version: str
) -> None:
    if mosquitto_binary() is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    real = Mosquitto(tmp_path)
    hostile = HostileBroker(version, script, real.port)
    await hostile.start()
    async with adaptor(
        real.url, one_route(sink), tmp_path, connected=False, protocol=version
    ) as running:
        await until(lambda: running.sink(sink.url)["reconnects"] >= 1, "it comes back")
        said = ""

        def named() -> bool:
            """Between two attempts, not within one."""
            nonlocal said
            said = running.sink(sink.url)["session"]
            return str(real.port) in said

        await until(named, "what is wrong with it is said")
        assert len(said) < 1000, said
        if script is an_endless_packet:
            assert "a packet of 268435" in said and "the limit is" in said
        assert hostile.talks
        hostile.stop()
        await real.start()
        try:
            await running.connected()
            await real.publish([("plant/x", b"after all")])
            await until(lambda: sink.bodies == [b"after all"], "it works")
        finally:
            await real.stop()


@both
async def test_a_broker_that_says_everything_byte_by_byte_is_understood(
    sink: Sink, tmp_path: Path, version: str
) -> None:
    async def drip(talk: Talk) -> None:
        suback = await talk.until_subscribed()
        messages = [talk.publish("plant/x", b"%d" % n, number=n) for n in (1, 2, 3)]
        for byte in suback + b"".join(messages):
            talk.writer.write(bytes([byte]))
            await talk.writer.drain()
            await asyncio.sleep(0)
        await talk.listen()

    async with (
        HostileBroker(version, drip) as broker,
        adaptor(broker.url, one_route(sink), tmp_path, protocol=version),
    ):
        await until(lambda: len(sink.taken) == 3, "all arrive")
        await until(lambda: broker.talks[0].acknowledged == [1, 2, 3], "and are acknowledged")


# --- how much it says -------------------------------------------------------------------------


@both
async def test_a_broker_that_ignores_the_window_gets_its_acknowledgements_in_order(
    sink: Sink, tmp_path: Path, version: str
) -> None:
    chance, many = random.Random(3), 3000

    async def script(_: Request) -> Answer:
        await asyncio.sleep(chance.random() / 100)
        return Answer()

    async def flood(talk: Talk) -> None:
        await talk.established()
        everything = (talk.publish("plant/x", b"%d" % n, number=n) for n in range(1, many + 1))
        talk.writer.write(b"".join(everything))
        await talk.listen()

    sink.script = script
    async with (
        HostileBroker(version, flood) as broker,
        adaptor(
            broker.url, one_route(sink), tmp_path, protocol=version, receive_maximum=16
        ) as running,
    ):
        await until(lambda: running.sink(sink.url)["window"]["used"] > 0, "it begins")
        most = 0
        while len(broker.talks[0].acknowledged) < many:
            most = max(most, running.sink(sink.url)["window"]["used"])
            await asyncio.sleep(0.002)
            assert len(broker.talks) == 1, running.sink(sink.url)
        assert broker.talks[0].acknowledged == list(range(1, many + 1))
        assert sorted(map(int, sink.bodies)) == list(range(1, many + 1))
        assert most <= 16 * 20, "no more than was read at once"


def resident(process: AdaptorProcess) -> float:
    """MiB, at the most so far."""
    assert process._process is not None
    status = Path(f"/proc/{process._process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


@both
@pytest.mark.parametrize("size", [100, MIB])
@pytest.mark.parametrize("subscribed", [True, False])
async def test_a_flood_that_nobody_takes_is_not_read(
    sink: Sink, tmp_path: Path, version: str, size: int, subscribed: bool
) -> None:
    """The sink never answers. Before the SUBACK a broker may send, too: what it has from before."""

    async def flood(talk: Talk) -> None:
        if subscribed:
            await talk.established()
        else:
            await talk.until_subscribed()
        answering = asyncio.create_task(talk.listen())
        number = 0
        try:
            while talk.written < 1024 * MIB:
                several = b""
                for _ in range(max(1, 65_536 // size)):
                    number = number % 65_535 + 1
                    several += talk.publish("plant/x", b"x" * size, number=number)
                await talk.flood(several)
        finally:
            answering.cancel()

    sink.script = lambda _: Answer(hang=True)
    sink.remember = False
    options = ("--mqtt-version", version, "--grace", "0.5")
    async with (
        HostileBroker(version, flood) as broker,
        AdaptorProcess(broker.url, one_route(sink), tmp_path, *options) as process,
    ):
        await until(lambda: any(talk.stuck(1.0) for talk in broker.talks), "it stops reading")
        assert max(talk.written for talk in broker.talks) < 200 * MIB
        assert resident(process) < BOUND
        assert await process.stop() == 0


@both
async def test_a_flood_of_qos_0_is_read_and_let_go(
    sink: Sink, tmp_path: Path, version: str
) -> None:
    done = asyncio.Event()

    async def flood(talk: Talk) -> None:
        await talk.established()
        message = talk.publish("plant/x", b"x" * MIB, qos=0)
        while talk.written < 600 * MIB:
            await talk.flood(message)
        done.set()
        await talk.listen()

    sink.script = lambda _: Answer(hang=True)
    sink.remember = False
    options = ("--mqtt-version", version, "--grace", "0.5")
    async with (
        HostileBroker(version, flood) as broker,
        AdaptorProcess(broker.url, one_route(sink), tmp_path, *options) as process,
    ):
        async with asyncio.timeout(60):
            await done.wait()
        assert resident(process) < BOUND
        assert await process.stop() == 0
