"""What a route can ask for, between a real broker and a sink."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.broker.harness import (
    QUICK,
    Answer,
    Mosquitto,
    Request,
    Sink,
    adaptor,
    one_route,
    properties,
    publish,
    routes,
    until,
)
from tests.broker.test_commands import weir
from weir.adaptor.service import client_id

both = pytest.mark.parametrize("version", ["5", "3.1.1"])
MANY = [("plant/x", b"%d" % n) for n in range(40)]


async def test_attributes_come_from_the_topic_user_properties_and_the_payload(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    text = routes(
        f"filter: plant/+, sink: '{sink.url}', type: 'io.{{json[/kind]|reading}}', "
        "source: 'mqtt://{level[1]}/{user[line]|none}', subject: '{json[/sensor]}', "
        "id: '{json[/n]}', time: '{json[/at]}', "
        "extensions: {unit: '{json[/unit]|celsius}', shift: '{user[shift]}', place: '{level[1]}'}"
    )
    full = b'{"kind": "heat", "sensor": "s1", "n": 7, "at": "2026-01-02T03:04:05Z", "unit": "K"}'
    async with adaptor(broker.url, text, tmp_path):
        await broker.publish(
            [("plant/oven", full)], properties=properties(line="l 3", shift="late")
        )
        await broker.publish([("plant/oven", b"not json")])
        await until(lambda: len(sink.taken) == 2, "both arrive")
    first, second = (each.headers for each in sink.taken)
    assert (first["ce-type"], first["ce-source"]) == ("io.heat", "mqtt://oven/l%25203")
    assert (first["ce-id"], first["ce-time"]) == ("7", "2026-01-02T03:04:05Z")
    assert (first["ce-subject"], first["ce-unit"]) == ("s1", "K")
    assert (first["ce-shift"], first["ce-place"]) == ("late", "oven")
    assert (second["ce-type"], second["ce-source"]) == ("io.reading", "mqtt://oven/none")
    assert (second["ce-unit"], second["ce-place"]) == ("celsius", "oven")
    assert "ce-subject" not in second and "ce-shift" not in second
    assert len(second["ce-id"]) == 36  # minted
    assert second["ce-time"].startswith(time.strftime("%Y-"))


async def test_extensions_are_added_to_events_that_were_published_as_such_and_override_nothing(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    text = routes(f"filter: plant/#, sink: '{sink.url}', extensions: {{unit: K, site: north}}")
    given = properties(specversion="1.0", id="7", source="/oven", type="hot", unit="F")
    async with adaptor(broker.url, text, tmp_path):
        await broker.publish([("plant/1", b"x")], properties=given)
        await until(lambda: sink.taken, "it arrives")
    headers = sink.taken[0].headers
    assert (headers["ce-unit"], headers["ce-site"], headers["ce-id"]) == ("F", "north", "7")


@both
@pytest.mark.parametrize("retained", ["new", "always", "never"])
async def test_retained_messages_come_when_the_route_wants_them(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str, retained: str
) -> None:
    await broker.publish([("plant/state", b"kept")], retain=True)
    text = one_route(sink, f"{QUICK}, retained: {retained}")
    async with adaptor(broker.url, text, tmp_path, protocol=version) as running:
        await broker.publish([("plant/now", b"1")])
        await until(lambda: b"1" in sink.bodies, "it runs")
        await broker.stop()
        await until(lambda: not running.sink(sink.url)["connected"], "the loss is seen")
        await broker.start()
        await running.connected()
        await broker.publish([("plant/now", b"2")])
        await until(lambda: b"2" in sink.bodies, "it runs again")
        await until(lambda: running.sink(sink.url)["window"]["used"] == 0, "all acknowledged")
    assert sink.bodies.count(b"kept") == {"new": 1, "always": 2, "never": 0}[retained]


@both
async def test_a_live_message_with_the_retain_flag_is_never_kept_out(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    text = one_route(sink, f"{QUICK}, retained: never")
    async with adaptor(broker.url, text, tmp_path, protocol=version):
        await broker.publish([("plant/live", b"x")], retain=True)
        await until(lambda: sink.bodies == [b"x"], "it arrives")


async def test_an_event_whose_time_is_over_while_the_sink_is_down_is_let_go_and_counted(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await sink.stop()
    short = properties()
    short.MessageExpiryInterval = 1
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        await broker.publish([("plant/1", b"short")], properties=short)
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "blocked")
        await broker.publish([("plant/1", b"long")])
        await until(lambda: running.route("all")["expired"] == 1, "its time is over")
        await sink.start()
        await until(lambda: len(broker.pubacks(client)) == 2, "both are acknowledged")
    assert sink.bodies == [b"long"]


@both
@pytest.mark.parametrize("qos", [0, 1])
async def test_no_more_than_its_concurrency_of_a_route_is_with_the_sink_at_a_time(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str, qos: int
) -> None:
    now = most = 0

    async def script(_: Request) -> Answer:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.002)
        now -= 1
        return Answer()

    sink.script = script
    text = one_route(sink, f"{QUICK}, concurrency: 3, qos: {qos}")
    async with adaptor(broker.url, text, tmp_path, protocol=version):
        await broker.publish(MANY)
        await until(lambda: len(sink.taken) == 40, "all arrive")
    assert most == 3


async def test_a_limited_route_does_not_hold_the_others_of_its_sink(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    gate = asyncio.Event()

    async def script(request: Request) -> Answer:
        if request.headers["ce-type"] == "slow":
            await gate.wait()
        return Answer()

    sink.script = script
    text = routes(
        f"name: slow, filter: slow/#, sink: '{sink.url}', type: slow, concurrency: 1",
        f"name: fast, filter: fast/#, sink: '{sink.url}', type: fast",
    )
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish([("slow/1", b"s%d" % n) for n in range(30)])
        await broker.publish([("fast/1", b"f%d" % n) for n in range(30)])
        await until(lambda: running.route("fast")["delivered"] == 30, "the fast one flows")
        assert running.route("slow")["delivered"] == 0
        gate.set()
        await until(lambda: running.route("slow")["delivered"] == 30, "then the slow one")
    assert [each.body for each in sink.taken if each.body.startswith(b"s")] == [
        b"s%d" % n for n in range(30)
    ]


async def test_a_rate_is_kept(broker: Mosquitto, sink: Sink, tmp_path: Path) -> None:
    times: list[float] = []

    def script(_: Request) -> Answer:
        times.append(asyncio.get_running_loop().time())
        return Answer()

    sink.script = script
    async with adaptor(broker.url, one_route(sink, f"{QUICK}, rate: 20"), tmp_path):
        await broker.publish(MANY[:15])
        await until(lambda: len(sink.taken) == 15, "all arrive")
    assert times[-1] - times[0] >= 0.5  # 15 events at 20 per second, a little slack at the start


async def test_a_limited_route_blocks_probes_and_recovers_like_any_other(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await sink.stop()
    text = one_route(sink, f"{QUICK}, concurrency: 1, rate: 1000")
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish(MANY)
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "blocked")
        await sink.start()
        await until(lambda: running.route("all")["delivered"] == 40, "all are delivered")
    assert sorted(sink.bodies) == sorted(payload for _, payload in MANY)


# --- weir routes ----------------------------------------------------------------------------------


async def test_what_try_prints_is_what_is_sent(
    broker: Mosquitto, sink: Sink, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    text = routes(
        f"name: all, filter: plant/+, sink: '{sink.url}', id: '{{json[/n]}}', "
        "time: '{json[/at]}', extensions: {unit: '{user[unit]|K}'}"
    )
    payload = b'{"n": 9, "at": "2026-01-02T03:04:05Z"}'
    async with adaptor(broker.url, text, tmp_path):
        await broker.publish([("plant/1", payload)], properties=properties("a/b", unit="F"))
        await until(lambda: sink.taken, "it arrives")
    file = tmp_path / "routes.yaml"
    file.write_text(text)
    where = ("--broker", broker.url, "--user", "unit=F", "--content-type", "a/b")
    assert weir("routes", "try", str(file), "plant/1", payload.decode(), *where) == 0
    head, _, body = capfdbinary.readouterr().out.partition(b"\n\n")
    lines = head.decode().splitlines()
    assert lines[0] == f"# route all -> {sink.url}"
    assert lines[1] == "POST /events HTTP/1.1"
    printed = dict(line.lower().split(": ", 1) for line in lines[2:])
    sent = {name: value.lower() for name, value in sink.taken[0].headers.items()}
    sent.pop("ce-recordedtime"), printed.pop("ce-recordedtime")
    assert printed == sent
    assert body == payload + b"\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("other/x", "1"), 1, "no route takes `other/x`; the filters are plant/+"),
        (("plant/+", "1"), 2, "without wildcards"),
        (("plant/x", "@/none"), 2, "/none"),
        (("plant/x", "1", "--user", "x"), 2, "NAME=VALUE"),
        (("plant/x", "1", "--mqtt-version", "3.1.1", "--user", "x=y"), 2, "no properties"),
    ],
)
def test_try_says_why_there_is_no_event(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    file = tmp_path / "routes.yaml"
    file.write_text("routes: [{filter: plant/+, sink: function}]")
    assert weir("routes", "try", str(file), *arguments) == code
    assert said in capsys.readouterr().err


def test_try_shows_what_an_event_that_is_none_comes_to(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "routes.yaml"
    file.write_text("routes: [{filter: a, sink: function, onFailure: drop}]")
    kind = ("--content-type", "application/cloudevents+json")
    assert weir("routes", "try", str(file), "a", "{}", *kind) == 0
    out = capfd.readouterr().out
    assert "not sent, but given to onFailure: drop: no CloudEvent" in out


def test_check_lists_the_routes_or_every_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "routes.yaml"
    file.write_text("routes:\n - {filter: a, sink: function}\n - {filter: b, sink: http://h}\n")
    assert weir("routes", "check", str(file)) == 0
    assert "b: b (QoS 1) -> http://h" in capsys.readouterr().out
    file.write_text("routes:\n - {filter: a}\n - {filter: b, sinc: http://h}\n")
    assert weir("routes", "check", str(file)) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in said] == [f"{file}:{n}" for n in (2, 3, 3)]


async def test_a_retained_message_of_two_routes_goes_to_the_one_that_wants_it(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await publish(broker.port, [("plant/a", b"kept")], retain=True)
    text = routes(
        f"name: wants, filter: plant/a, sink: '{sink.url}', type: wants",
        f"name: not, filter: plant/+, sink: '{sink.url}', type: not, retained: never",
    )
    async with adaptor(broker.url, text, tmp_path):
        await broker.publish([("plant/b", b"live")])
        await until(lambda: len(sink.taken) == 2, "both arrive")
    kinds = {(each.headers["ce-type"], each.body) for each in sink.taken}
    assert kinds == {("wants", b"kept"), ("not", b"live")}
