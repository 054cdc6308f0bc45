"""Between a real broker and a sink that does all that sinks do."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.broker.harness import (
    QUICK,
    Answer,
    Mosquitto,
    Request,
    Sink,
    adaptor,
    held_by,
    one_route,
    properties,
    routes,
    until,
)
from weir.adaptor.quarantine import Quarantine
from weir.adaptor.quarantine_commands import replay
from weir.adaptor.service import client_id

READINGS = [(f"plant/{n}/temperature", b"%d" % n) for n in range(10)]
BODIES = sorted(payload for _, payload in READINGS)


async def test_a_message_becomes_a_cloudevent_in_http_binary_mode(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    text = routes(
        f"filter: plant/+/temperature, sink: '{sink.url}', type: 'io.example.{{level[2]}}', "
        "source: 'mqtt://plant/{level[1]}', datacontenttype: application/json"
    )
    async with adaptor(broker.url, text, tmp_path):
        await broker.publish([("plant/oven 1/temperature", b'{"celsius": 181}')])
        await until(lambda: sink.taken, "the event arrives")
    headers = sink.taken[0].headers
    assert headers["ce-specversion"] == "1.0"
    assert headers["ce-type"] == "io.example.temperature"
    assert headers["ce-source"] == "mqtt://plant/oven%25201"
    assert headers["ce-subject"] == "plant/oven%201/temperature"
    assert headers["content-type"] == "application/json"
    assert headers["ce-mqttqos"] == "1"
    assert "ce-datacontenttype" not in headers
    assert sink.taken[0].body == b'{"celsius": 181}'


async def test_the_publishers_id_and_content_type_are_kept(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    given = properties("text/csv", id="reading-1", traceparent="00-ab-cd-01")
    async with adaptor(broker.url, one_route(sink), tmp_path):
        await broker.publish([("plant/1", b"1,2")], properties=given)
        await until(lambda: sink.taken, "the event arrives")
    headers = sink.taken[0].headers
    assert headers["ce-id"] == "reading-1"
    assert headers["content-type"] == "text/csv"
    assert headers["ce-traceparent"] == "00-ab-cd-01"


async def test_a_published_cloudevent_passes_with_its_own_identity(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    given = properties(specversion="1.0", id="7", source="/oven", type="io.oven.hot")
    async with adaptor(broker.url, one_route(sink), tmp_path):
        await broker.publish([("plant/1", b"x")], properties=given)
        await until(lambda: sink.taken, "the event arrives")
    headers = sink.taken[0].headers
    identity = (headers["ce-id"], headers["ce-source"], headers["ce-type"])
    assert identity == ("7", "/oven", "io.oven.hot")


async def test_an_event_that_meets_500_is_retried_with_the_same_id(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    failures = 2

    def script(request: Request) -> Answer:
        seen = sum(each.id == request.id for each in sink.requests)
        return Answer(500) if seen <= failures else Answer()

    sink.script = script
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: len(sink.taken) == 10, "all are taken in the end")
        assert running.route("all")["retried"] == 20
    assert sorted(sink.bodies) == BODIES
    assert len({request.id for request in sink.requests}) == 10


async def test_nothing_is_acknowledged_while_a_slow_sink_thinks(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    sink.script = held_by(gate)
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: len(sink.requests) == 10, "all requests are with the sink")
        assert running.route("all")["unacknowledged"] == 10
        assert broker.pubacks(client) == []
        gate.set()
        await until(lambda: len(broker.pubacks(client)) == 10, "all are acknowledged")


async def test_acknowledgements_follow_the_order_of_arrival(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    first = asyncio.Event()

    async def script(request: Request) -> Answer:
        if request.body == b"0":
            await first.wait()
        return Answer()

    sink.script = script
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, one_route(sink), tmp_path):
        await broker.publish(READINGS)
        await until(lambda: len(sink.taken) == 9, "all but the first are taken")
        assert broker.pubacks(client) == []
        first.set()
        await until(lambda: len(broker.pubacks(client)) == 10, "all are acknowledged")
    sent = [packet_id for packet_id, _ in broker.publishes(client)]
    assert broker.pubacks(client) == sent


async def test_an_answer_cut_in_the_middle_is_no_delivery(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: (
        Answer(200, body=b"half", cut=True)
        if sum(each.id == request.id for each in sink.requests) == 1
        else Answer()
    )
    async with adaptor(broker.url, one_route(sink), tmp_path):
        await broker.publish(READINGS)
        await until(lambda: len(sink.taken) == 10, "all are taken at the second attempt")
    assert len(sink.requests) == 20


async def test_a_request_that_hangs_is_given_up_and_sent_again(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda _: Answer(hang=len(sink.requests) == 1)
    more = "delivery: {retry: 3, backoffDelay: PT0.02S, timeout: PT0.3S}"
    async with adaptor(broker.url, one_route(sink, more), tmp_path):
        await broker.publish(READINGS[:1])
        await until(lambda: len(sink.taken) == 1, "the second attempt is taken")
    assert sink.requests[0].id == sink.requests[1].id


async def test_a_rejected_event_goes_to_the_quarantine_and_comes_back_by_command(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: (
        Answer(400, body=b"no such unit") if request.body == b"3" else Answer()
    )
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: len(broker.pubacks(client)) == 10, "every message is acknowledged")
        assert running.route("all")["quarantined"] == 1
        assert running.sink(sink.url)["state"] == "up"
    assert len(sink.taken) == 9
    quarantine = Quarantine(tmp_path / "quarantine.db")
    (held,) = quarantine.events()
    assert (held.topic, held.status, held.answer) == ("plant/3/temperature", 400, b"no such unit")
    sink.script = lambda _: Answer()
    assert await replay(quarantine) == (1, 0)
    assert len(quarantine) == 0
    again = sink.taken[-1]
    assert again.body == b"3"
    first = next(request for request in sink.requests if request.body == b"3")
    del first.headers["content-length"], again.headers["content-length"]
    assert again.headers == first.headers


async def test_an_event_that_always_fails_is_quarantined_when_its_retries_are_used_up(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: Answer(500 if request.body == b"3" else 204)
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: running.route("all")["quarantined"] == 1, "the quarantine has it")
    assert sum(request.body == b"3" for request in sink.requests) == 1 + 3


async def test_an_event_that_kills_the_function_every_time_is_quarantined_once_others_pass(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: Answer(200, cut=request.body == b"3")
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        await broker.publish([READINGS[3]])
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "no one else to ask")
        await broker.publish(READINGS[:3])
        await until(lambda: running.route("all")["quarantined"] == 1, "the quarantine has it")
        assert running.route("all")["delivered"] == 3


async def test_onfailure_drop_lets_the_event_go_and_counts_it(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: Answer(422 if request.body == b"3" else 204)
    text = one_route(sink, f"{QUICK}, onFailure: drop")
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: running.route("all")["dropped"] == 1, "it is dropped")
        await until(lambda: running.route("all")["unacknowledged"] == 0, "nothing is left")
    assert len(sink.taken) == 9


async def test_onfailure_block_holds_everything_until_the_sink_takes_the_event(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: Answer(422)
    text = one_route(sink, f"{QUICK}, onFailure: block")
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, text, tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "blocked")
        assert "422" in running.sink(sink.url)["reason"]
        assert broker.pubacks(client) == []
        sink.script = lambda request: Answer()
        await until(lambda: len(broker.pubacks(client)) == 10, "all are acknowledged")


async def test_a_full_quarantine_leaves_the_event_unacknowledged_until_there_is_room(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: Answer(400)
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, one_route(sink), tmp_path, quarantine_bound=600) as running:
        await broker.publish(READINGS[:2])
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "it is full")
        assert "is full" in running.sink(sink.url)["reason"]
        assert len(broker.pubacks(client)) == 1
        quarantine = Quarantine(tmp_path / "quarantine.db")
        assert quarantine.discard([held.number for held in quarantine.events()]) == 1
        await until(lambda: len(broker.pubacks(client)) == 2, "there is room again")


async def test_a_sink_that_is_down_blocks_visibly_and_gets_everything_afterwards(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await sink.stop()
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "blocked")
        assert running.route("all")["unacknowledged"] == 10
        assert broker.pubacks(client) == []
        await sink.start()
        await until(lambda: len(broker.pubacks(client)) == 10, "all are acknowledged")
        assert running.sink(sink.url)["state"] == "up"
        assert running.route("all")["quarantined"] == 0
    assert sorted(sink.bodies) == BODIES


async def test_a_dead_sink_does_not_stop_the_other(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    dead = Sink()
    await dead.start()
    await dead.stop()
    text = routes(
        f"name: alive, filter: plant/#, sink: '{sink.url}', {QUICK}",
        f"name: dead, filter: plant/#, sink: '{dead.url}', {QUICK}",
    )
    many = [("plant/x", b"%d" % n) for n in range(40)]
    async with adaptor(broker.url, text, tmp_path, receive_maximum=5) as running:
        await broker.publish(many)
        await until(lambda: running.route("alive")["delivered"] == 40, "the living one gets all")
        await until(lambda: running.sink(dead.url)["state"] == "blocked", "the dead one blocks")
        assert running.route("dead")["unacknowledged"] == 5  # its own window, and no more
        await dead.start()
        await until(lambda: running.route("dead")["delivered"] == 40, "then it gets all as well")
    await dead.stop()


async def test_retry_after_is_obeyed(broker: Mosquitto, sink: Sink, tmp_path: Path) -> None:
    times: list[float] = []

    def script(_: Request) -> Answer:
        times.append(asyncio.get_running_loop().time())
        return Answer(429, ("Retry-After: 1",)) if len(times) == 1 else Answer()

    sink.script = script
    async with adaptor(broker.url, one_route(sink), tmp_path):
        await broker.publish(READINGS[:1])
        await until(lambda: sink.taken, "it is taken")
    assert times[1] - times[0] >= 0.99


async def test_a_stop_delivers_and_acknowledges_what_was_received(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    sink.script = held_by(gate)
    client = client_id("weir", sink.url)
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        await broker.publish(READINGS)
        await until(lambda: len(sink.requests) == 10, "all requests are with the sink")
        stopping = asyncio.create_task(running.stop())
        gate.set()
        await stopping
    assert len(sink.taken) == 10
    assert len(broker.pubacks(client)) == 10
    sink.script = lambda _: Answer()
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        await broker.publish([("plant/last", b"last")])
        await until(lambda: len(sink.taken) == 11, "only the new one comes")
    assert sink.bodies[-1] == b"last"


async def test_an_unlucky_structured_event_is_quarantined_as_it_was_published(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    given = properties("application/cloudevents+json")
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        await broker.publish([("plant/1", b'{"specversion": "1.0"}')], properties=given)
        await until(lambda: running.route("all")["quarantined"] == 1, "it is quarantined")
    (held,) = Quarantine(tmp_path / "quarantine.db").events()
    assert held.event.data == b'{"specversion": "1.0"}'
    assert "no CloudEvent" in held.reason
