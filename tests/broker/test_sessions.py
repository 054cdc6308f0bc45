"""The MQTT side: windows, crashes, restarts, subscriptions. One gate for both session kinds."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiomqtt
import pytest

from tests.broker.harness import (
    QUICK,
    AdaptorProcess,
    Answer,
    Mosquitto,
    Request,
    Sink,
    adaptor,
    every_broker,
    every_window,
    free_port,
    held_by,
    one_route,
    properties,
    publish,
    routes,
    until,
)
from weir.adaptor.broker import Broker
from weir.adaptor.lines import BEST_EFFORT
from weir.adaptor.service import client_id

TWELVE = [(f"plant/{n}", b"%d" % n) for n in range(12)]
WINDOW = 5

both = pytest.mark.parametrize("version", ["5", "3.1.1"])


def distinct(requests: list[Request]) -> set[bytes]:
    return {request.body for request in requests}


@every_broker
@both
async def test_the_crash_test(broker: Mosquitto, sink: Sink, tmp_path: Path, version: str) -> None:
    """12 messages, a window of 5, killed before any acknowledgement: all 12 come after resuming."""
    sink.script = lambda _: Answer(hang=True)
    options = ("--mqtt-version", version, "--receive-maximum", str(WINDOW))
    async with AdaptorProcess(broker.url, one_route(sink, "qos: 1"), tmp_path, *options) as process:
        client = client_id("weir", sink.url)
        await until(lambda: broker.subscribed(client), "subscribed")
        await broker.publish(TWELVE)
        # 3.1.1 has no Receive Maximum: the broker's own limit (20 in mosquitto) lets all through,
        # and the reader stops at the window, give or take what paho had in hand
        expected = WINDOW if version == "5" else len(TWELVE)
        await until(lambda: len(broker.publishes(client)) == expected, "the window is full")
        await until(lambda: len(distinct(sink.requests)) >= WINDOW, "the sink sees the window")
        if version == "5":
            assert len(distinct(sink.requests)) == WINDOW
        await process.kill()
        assert broker.pubacks(client) == []
        sink.script = lambda _: Answer()
        await process.start()
        await until(lambda: len(distinct(sink.taken)) == 12, "12 of 12 after resuming")
        # mochi repeats some of them once more, and gets them acknowledged once more
        await until(lambda: len(set(broker.pubacks(client))) == 12, "each is acknowledged")
        assert await process.stop() == 0


@every_window
async def test_killed_in_the_middle_of_a_window_loses_nothing(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    many = [("plant/x", b"%d" % n) for n in range(200)]
    answered = 0

    def script(_: Request) -> Answer:
        nonlocal answered
        answered += 1
        return Answer(hang=answered > 70)

    sink.script = script
    options = ("--mqtt-version", version, "--receive-maximum", "16")
    async with AdaptorProcess(broker.url, one_route(sink, "qos: 1"), tmp_path, *options) as process:
        client = client_id("weir", sink.url)
        await until(lambda: broker.subscribed(client), "subscribed")
        await broker.publish(many)
        await until(lambda: len(sink.taken) == 70 < answered, "some are taken, some hang")
        await process.kill()
        taken_before = len(sink.taken)
        assert len(broker.pubacks(client)) <= taken_before  # none acknowledged early
        sink.script = lambda _: Answer()
        await process.start()
        await until(lambda: len(distinct(sink.taken)) == 200, "every event at least once")
        assert await process.stop() == 0


@both
async def test_a_broker_restart_loses_nothing_and_delivers_nothing_twice(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    gate = asyncio.Event()
    sink.script = held_by(gate)
    text = one_route(sink)
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, text, tmp_path, protocol=version) as running:
        await broker.publish(TWELVE)
        await until(lambda: len(sink.requests) == 12, "all requests are with the sink")
        await broker.stop()
        await until(lambda: not running.sink(sink.url)["connected"], "the loss is seen")
        gate.set()
        await until(lambda: len(sink.taken) == 12, "the sink takes them meanwhile")
        await broker.start()
        await running.connected()
        await until(lambda: len(broker.pubacks(client)) == 12, "the repeats are acknowledged")
        await broker.publish([("plant/new", b"new")])
        await until(lambda: b"new" in sink.bodies, "and it goes on")
    assert max(Counter(sink.bodies).values()) == 1


@every_window
async def test_no_more_than_the_window_is_unacknowledged_whatever_the_broker_sends(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    """mosquitto 2.0.11 overruns a Receive Maximum once acknowledgements flow."""
    most = 0

    async def script(_: Request) -> Answer:
        nonlocal most
        await asyncio.sleep(0)
        most = max(most, running.sink(sink.url)["window"]["used"])
        return Answer()

    sink.script = script
    many = [("plant/x", b"%d" % n) for n in range(600)]
    async with adaptor(
        broker.url, one_route(sink), tmp_path, receive_maximum=3, protocol=version
    ) as running:
        await asyncio.gather(*(broker.publish(many[n::6]) for n in range(6)))
        await until(lambda: running.route("all")["delivered"] == 600, "all are delivered")
    assert 1 <= most <= 3 + 1


@every_broker
@both
async def test_wildcards_match_as_the_broker_matches(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    filters = ("one/+/temperature", "two/#", "+/exact", "$share/group/three/+")
    text = routes(*(f"filter: '{each}', sink: '{sink.url}', {QUICK}" for each in filters))
    topics = [
        *("one/a/temperature", "one//temperature", "two", "two/a/b/c", "any/exact", "three/x"),
        *("one/a/b/temperature", "one/a", "exact", "three/x/y", "four"),
    ]
    async with adaptor(broker.url, text, tmp_path, protocol=version):
        await broker.publish([(topic, topic.encode()) for topic in topics])
        await broker.publish([("two/last", b"last")])
        await until(lambda: len(sink.taken) == 7, "the matching ones arrive")
    assert sorted(sink.bodies) == sorted([*(t.encode() for t in topics[:6]), b"last"])


@every_broker
async def test_overlapping_routes_get_one_event_each_with_ids_of_their_own(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    text = routes(
        f"name: wide, filter: 'plant/#', sink: '{sink.url}', type: wide",
        f"name: narrow, filter: 'plant/+/hot', sink: '{sink.url}', type: narrow",
    )
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish([("plant/1/hot", b"a"), ("plant/1/cold", b"b")])
        await until(lambda: len(sink.taken) >= 3, "both routes have their events")
        await until(lambda: running.route("wide")["unacknowledged"] == 0, "settled")
        await until(
            lambda: len(broker.pubacks(client)) == len(broker.publishes(client)), "acknowledged"
        )
    types = sorted((each.headers["ce-type"], each.body) for each in sink.taken)
    assert types == [("narrow", b"a"), ("wide", b"a"), ("wide", b"b")]
    assert len({each.id for each in sink.taken}) == 3


async def test_retained_messages_come_with_a_new_subscription_and_not_with_a_reconnect(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await broker.publish([("plant/state", b"retained")], retain=True)
    for payload in (b"first", b"second"):
        async with adaptor(broker.url, one_route(sink), tmp_path):
            await broker.publish([("plant/now", payload)])
            await until(lambda: payload in sink.bodies, "it runs")  # noqa: B023
    assert sorted(sink.bodies) == [b"first", b"retained", b"second"]
    (retained,) = [each for each in sink.taken if each.body == b"retained"]
    assert retained.headers["ce-mqttretain"] == "true"


@every_broker
@both
async def test_a_qos_2_publish_is_delivered_once_it_arrives_at_qos_1(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    async with adaptor(broker.url, one_route(sink), tmp_path, protocol=version):
        await broker.publish(TWELVE, qos=2)
        await until(lambda: len(sink.taken) == 12, "all arrive")
    assert {each.headers["ce-mqttqos"] for each in sink.taken} == {"1"}


@both
async def test_qos_0_is_delivered_and_bounded_when_the_sink_is_slow(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    gate = asyncio.Event()
    sink.script = held_by(gate)
    flood = [("plant/x", b"%d" % n) for n in range(BEST_EFFORT + 500)]
    async with adaptor(
        broker.url, one_route(sink, f"{QUICK}, qos: 0"), tmp_path, protocol=version
    ) as running:
        await broker.publish(flood, qos=0)
        await until(lambda: running.route("all")["received"] == len(flood), "all are received")
        over = running.route("all")["overflowed"]
        assert over > 0
        assert running.route("all")["unacknowledged"] == len(flood) - over
        gate.set()
        await until(lambda: running.route("all")["unacknowledged"] == 0, "the rest is delivered")
    assert b"%d" % (len(flood) - 1) in sink.bodies  # the oldest went, not the newest


@both
async def test_a_route_that_went_away_does_not_stop_the_session(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    old = routes(f"filter: old/#, sink: '{sink.url}'", f"filter: plant/#, sink: '{sink.url}'")
    async with adaptor(broker.url, old, tmp_path, protocol=version):
        pass
    await broker.publish([("old/1", b"x"), ("old/2", b"x")])
    async with adaptor(
        broker.url, one_route(sink), tmp_path, receive_maximum=1, protocol=version
    ) as running:
        await broker.publish([("old/3", b"x"), ("plant/1", b"y")])
        await until(lambda: sink.bodies == [b"y"], "the living route gets its event")
        assert running.sink(sink.url)["unrouted"] == 2  # queued before; no more came since


@both
async def test_a_filter_that_was_changed_brings_each_message_once(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    def filtered(text: str) -> str:
        return routes(f"name: all, filter: '{text}', sink: '{sink.url}', {QUICK}")

    client = client_id("weir", sink.url)
    async with adaptor(broker.url, filtered("plant/#"), tmp_path, protocol=version):
        pass
    await broker.publish([("plant/1", b"queued")])
    async with adaptor(broker.url, filtered("plant/+"), tmp_path, protocol=version) as running:
        await broker.publish([("plant/1", b"once"), ("plant/1/deep", b"no more")])
        await broker.publish([("plant/2", b"last")])
        await until(lambda: b"last" in sink.bodies, "it goes on")
        assert running.sink(sink.url)["unrouted"] == 0
    assert sink.bodies == [b"queued", b"once", b"last"]
    assert broker.unsubscribed(client) == ["plant/#"]
    async with adaptor(broker.url, filtered("plant/+"), tmp_path, protocol=version):
        pass
    assert broker.unsubscribed(client) == ["plant/#"]


@both
async def test_an_adaptor_killed_while_it_subscribes_still_knows_what_to_unsubscribe(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    first = routes(f"filter: plant/#, sink: '{sink.url}'", f"filter: old/#, sink: '{sink.url}'")
    client = client_id("weir", sink.url)
    options = ("--mqtt-version", version)
    async with AdaptorProcess(broker.url, first, tmp_path, *options) as process:
        await until(lambda: broker.subscribed(client), "the broker has it")
        await process.kill()
    async with adaptor(broker.url, one_route(sink), tmp_path, protocol=version):
        pass
    assert broker.unsubscribed(client) == ["old/#"]


# --- several brokers ------------------------------------------------------------------------------


@both
async def test_one_adaptor_takes_from_several_brokers_and_a_dead_one_stops_no_other(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    (tmp_path / "second").mkdir()
    second = Mosquitto(tmp_path / "second")
    await second.start()
    text = f"brokers:\n  second: {{url: '{second.url}'}}\n" + routes(
        f"name: here, filter: plant/#, sink: '{sink.url}', {QUICK}",
        f"name: there, broker: second, filter: plant/#, sink: '{sink.url}', {QUICK}",
    )
    try:
        async with adaptor(broker.url, text, tmp_path, protocol=version) as running:
            await broker.publish([("plant/1", b"here")])
            await second.publish([("plant/1", b"there")])
            await until(lambda: len(sink.taken) == 2, "one of each arrives")
            sources = {each.body: each.headers["ce-source"] for each in sink.taken}
            assert sources == {b"here": broker.url, b"there": second.url}
            await second.stop()
            await broker.publish([("plant/1", b"still here")])
            await until(lambda: b"still here" in sink.bodies, "the other goes on")
            await second.start()
            await running.connected()
            await second.publish([("plant/1", b"there again")])
            await until(lambda: b"there again" in sink.bodies, "and the dead one comes back")
            await until(lambda: running.route("there")["delivered"] == 2, "counted")
        async with adaptor(
            None, text.replace("{name: here,", "{name: here, broker: second,"), tmp_path
        ) as running:
            assert [each.broker for each in running.adaptor.lanes] == [second.url]
    finally:
        await second.stop()


# --- troubles with the broker ---------------------------------------------------------------------


@both
async def test_wrong_credentials_are_named_and_tried_again(
    sink: Sink, tmp_path: Path, version: str
) -> None:
    passwords = tmp_path / "passwords"
    await _mosquitto_passwd(passwords, "ann", "right")
    broker = Mosquitto(tmp_path, f"allow_anonymous false\npassword_file {passwords}\n")
    await broker.start()
    try:
        wrong = broker.url.replace("mqtt://", "mqtt://ann:wrong@")
        async with adaptor(
            wrong, one_route(sink), tmp_path, connected=False, protocol=version
        ) as running:
            await until(lambda: running.sink(sink.url)["reconnects"] >= 2, "it tries again")
            error = running.sink(sink.url)["session"]
            assert "refuses the session" in error
            assert "check the user and password" in error
            assert "wrong@" not in error
        right = broker.url.replace("mqtt://", "mqtt://ann:right@")
        async with adaptor(right, one_route(sink), tmp_path, protocol=version):
            pass
    finally:
        await broker.stop()


async def _mosquitto_passwd(path: Path, user: str, password: str) -> None:
    try:
        process = await asyncio.create_subprocess_exec(
            *("mosquitto_passwd", "-c", "-b", str(path), user, password)
        )
    except FileNotFoundError:
        pytest.skip("mosquitto_passwd is not installed (apt-get install mosquitto)")
    assert await process.wait() == 0
    path.chmod(0o644)


@both
async def test_an_unreachable_broker_is_named_and_tried_again(
    sink: Sink, tmp_path: Path, version: str
) -> None:
    url = f"mqtt://127.0.0.1:{free_port()}"
    async with adaptor(
        url, one_route(sink), tmp_path, connected=False, protocol=version
    ) as running:
        await until(lambda: running.sink(sink.url)["reconnects"] >= 2, "it tries again")
        assert f"can't reach the broker {url}" in running.sink(sink.url)["session"]


@both
async def test_a_broker_that_hangs_is_noticed_and_reconnected_to(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    async with adaptor(
        broker.url, one_route(sink), tmp_path, protocol=version, keep_alive=1
    ) as running:
        broker.freeze()
        try:
            await until(lambda: not running.sink(sink.url)["connected"], "its silence is noticed")
        finally:
            broker.thaw()
        await running.connected()
        await broker.publish(TWELVE)
        await until(lambda: len(distinct(sink.taken)) == 12, "and it goes on")


@both
async def test_a_quiet_connection_is_kept_alive(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    async with adaptor(
        broker.url, one_route(sink), tmp_path, protocol=version, keep_alive=1
    ) as running:
        await until(lambda: broker.pings(client_id("weir", sink.url)) >= 3, "pings went both ways")
        assert running.sink(sink.url)["reconnects"] == 0


@both
async def test_a_lost_session_loses_nothing_that_was_received(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    gate = asyncio.Event()
    sink.script = held_by(gate)
    async with adaptor(broker.url, one_route(sink), tmp_path, protocol=version) as running:
        await broker.publish(TWELVE)
        await until(lambda: len(sink.requests) == 12, "all requests are with the sink")
        await broker.stop()
        (tmp_path / "mosquitto.db").unlink()
        await broker.start()
        await until(lambda: running.sink(sink.url)["reconnects"] >= 1, "the loss is seen")
        await running.connected()
        assert running.sink(sink.url)["window"]["used"] == 12
        gate.set()
        await until(lambda: len(sink.taken) == 12, "the sink takes them")
        await until(lambda: running.sink(sink.url)["window"]["used"] == 0, "the window is free")
        await broker.publish([("plant/new", b"new")])
        await until(lambda: b"new" in sink.bodies, "and it goes on")
    assert max(Counter(sink.bodies).values()) == 1


@both
async def test_mqtts_checks_the_brokers_certificate(
    sink: Sink, tmp_path: Path, version: str
) -> None:
    certificate, key = await _certificate(tmp_path)
    broker = Mosquitto(tmp_path, f"allow_anonymous true\ncertfile {certificate}\nkeyfile {key}\n")
    await broker.start()
    url = broker.url.replace("mqtt://", "mqtts://")
    context = ssl.create_default_context(cafile=str(certificate))
    try:
        trusted = Broker.parse(url, certificate)
        async with adaptor(trusted, one_route(sink), tmp_path, protocol=version):
            async with aiomqtt.Client("127.0.0.1", broker.port, tls_context=context) as client:
                await client.publish("plant/1", b"x" * 3_000_000, 1)
            await until(lambda: sink.taken, "it arrives, large as it is")
        assert len(sink.taken[0].body) == 3_000_000
        async with adaptor(
            url, one_route(sink), tmp_path, protocol=version, connected=False
        ) as running:
            await until(lambda: running.sink(sink.url)["reconnects"] >= 1, "a stranger is refused")
            assert "certificate verify failed" in running.sink(sink.url)["session"]
    finally:
        await broker.stop()


async def _certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (apt-get install openssl)")
    process = await asyncio.create_subprocess_exec(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"),
        *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0
    return certificate, key


async def test_a_session_taken_over_by_another_client_says_so(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    name = client_id("weir", sink.url)
    other = aiomqtt.Client("127.0.0.1", broker.port, identifier=name)
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        with contextlib.suppress(aiomqtt.MqttError):
            async with other:
                await until(lambda: not running.sink(sink.url)["connected"], "it is thrown out")
                assert (
                    f"another client uses the client id {name}"
                    in (running.sink(sink.url)["session"])
                )
                await until(lambda: running.sink(sink.url)["connected"], "it comes back")


async def test_a_refused_subscription_is_visible_and_the_others_work(
    sink: Sink, tmp_path: Path
) -> None:
    acl = tmp_path / "acl"
    acl.write_text("topic readwrite plant/#\n")
    acl.chmod(0o644)
    broker = Mosquitto(tmp_path, f"allow_anonymous true\nacl_file {acl}\n")
    await broker.start()
    text = routes(f"filter: secret/#, sink: '{sink.url}'", f"filter: plant/#, sink: '{sink.url}'")
    try:
        async with adaptor(broker.url, text, tmp_path) as running:
            await broker.publish([("plant/1", b"x")])
            await until(lambda: sink.taken, "the allowed route works")
            assert running.sink(sink.url)["refused_subscriptions"].keys() <= {"secret/#"}
    finally:
        await broker.stop()


# --- a broker that speaks 3.1.1 only --------------------------------------------------------------

_AMQTT = """
import asyncio, sys
from amqtt.broker import Broker
async def main():
    config = {"listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{sys.argv[1]}"}},
              "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin":
                          {"allow_anonymous": True}}}
    broker = Broker(config)
    await broker.start()
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
async def amqtt_port() -> AsyncIterator[int]:
    pytest.importorskip("amqtt")
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _AMQTT, str(port)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    yield port
    process.terminate()
    await process.wait()


@pytest.mark.parametrize("version", ["3.1.1", "auto"])
async def test_the_pure_python_broker_works_too(
    amqtt_port: int, sink: Sink, tmp_path: Path, version: str
) -> None:
    url = f"mqtt://127.0.0.1:{amqtt_port}"
    async with adaptor(url, one_route(sink), tmp_path, protocol=version) as running:
        await publish(amqtt_port, TWELVE, version=aiomqtt.ProtocolVersion.V311)
        await until(lambda: len(distinct(sink.taken)) == 12, "all arrive")
        assert running.sink(sink.url)["session"] == "MQTT 3.1.1"


async def test_asking_a_3_1_1_broker_for_5_says_what_is_wrong(
    amqtt_port: int, sink: Sink, tmp_path: Path
) -> None:
    url = f"mqtt://127.0.0.1:{amqtt_port}"
    async with adaptor(url, one_route(sink), tmp_path, connected=False, protocol="5") as running:
        await until(lambda: running.sink(sink.url)["reconnects"] >= 1, "it tried")
        assert "does it speak MQTT 5?" in running.sink(sink.url)["session"]


async def test_a_published_structured_event_is_recognised_in_3_1_1(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    event = b'{"specversion":"1.0","id":"7","source":"/oven","type":"hot","data":{"c":181}}'
    async with adaptor(broker.url, one_route(sink), tmp_path, protocol="3.1.1"):
        await broker.publish([("plant/1", event)])
        await until(lambda: sink.taken, "it arrives")
    assert (sink.taken[0].id, sink.taken[0].body) == ("7", b'{"c":181}')


async def test_a_published_structured_event_is_recognised_in_5(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    event = b'{"specversion":"1.0","id":"7","source":"/oven","type":"hot","data":{"c":181}}'
    given = properties("application/cloudevents+json; charset=utf-8")
    async with adaptor(broker.url, one_route(sink), tmp_path):
        await broker.publish([("plant/1", event)], properties=given)
        await until(lambda: sink.taken, "it arrives")
    assert (sink.taken[0].id, sink.taken[0].body) == ("7", b'{"c":181}')
