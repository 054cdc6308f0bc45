"""The routes file is changed while messages come: none is lost, and nobody is disturbed for it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.broker.harness import (
    QUICK,
    AdaptorProcess,
    Answer,
    Mosquitto,
    Running,
    Sink,
    one_route,
    routes,
    until,
)
from tests.broker.test_commands import weir
from tests.broker.test_faults import Publisher
from weir.adaptor.operations import metrics
from weir.adaptor.routes import load
from weir.adaptor.service import AdaptorConfig, client_id
from weir.proxy.wire.status import serve_status

both = pytest.mark.parametrize("version", ["5", "3.1.1"])


@contextlib.asynccontextmanager
async def reloadable(
    broker: Mosquitto, text: str, folder: Path, **more: object
) -> AsyncIterator[Running]:
    """An adaptor in this process whose routes are those of `routes.yaml`."""
    file = folder / "routes.yaml"
    file.write_text(text)
    config = AdaptorConfig(
        *(broker.url, load(file), folder / "quarantine.db"),
        routes_file=file,
        stop_within=5.0,
        **more,  # type: ignore[arg-type]
    )
    running = Running(config)
    try:
        await running.connected()
        yield running
    finally:
        await running.stop()


async def reloaded(running: Running, folder: Path, text: str) -> None:
    """Has taken this text, or said that it won't."""
    before = running.adaptor.reloaded
    (folder / "routes.yaml").write_text(text)
    running.reload.set()
    await until(
        lambda: running.adaptor.stale is not None or running.adaptor.reloaded != before, "reloaded"
    )


def connections(broker: Mosquitto, sink: Sink) -> int:
    """How often the session of this sink has connected."""
    return broker.connections(client_id("weir", sink.url))


@pytest.fixture
async def other() -> AsyncIterator[Sink]:
    started = Sink()
    await started.start()
    yield started
    await started.stop()


@both
async def test_a_route_changes_its_events_and_no_message_is_lost_under_load(
    broker: Mosquitto, sink: Sink, tmp_path: Path, version: str
) -> None:
    publisher = Publisher(broker.port, 1000)
    process = AdaptorProcess(broker.url, one_route(sink), tmp_path, "--mqtt-version", version)
    async with process:
        await until(lambda: broker.subscribed(client_id("weir", sink.url)), "subscribed")
        publishing = asyncio.create_task(publisher.run(4.0))
        for generation in range(4):
            kind = f"io.example.g{generation}"
            process.routes.write_text(one_route(sink, f"{QUICK}, type: {kind}"))
            process.send(signal.SIGHUP)
            await until(lambda: sink.taken[-1:] and sink.taken[-1].headers["ce-type"] == kind,  # noqa: B023
                        "the new type arrives")  # fmt: skip
        await publishing
        await until(lambda: {int(body) for body in sink.bodies} >= publisher.safe, "all arrive")
        assert await process.stop() == 0
    assert len(publisher.safe) > 1000


async def test_a_changed_file_is_enough(broker: Mosquitto, sink: Sink, tmp_path: Path) -> None:
    async with reloadable(broker, one_route(sink), tmp_path) as running:
        (tmp_path / "routes.yaml").write_text(one_route(sink, f"{QUICK}, type: io.example.new"))
        await until(lambda: running.adaptor.reloaded is not None, "it is seen and taken")
        await running.connected()
        await broker.publish([("plant/x", b"1")])
        await until(lambda: sink.taken, "it arrives")
    assert sink.taken[0].headers["ce-type"] == "io.example.new"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("routes: [{filter: 'a/#', sink: function}]", "nobody said where the function is"),
        ("routes: [{filter: 'a/#', sink: 'http://h/', onfailure: drop}]", "`onFailure`"),
        ("routes: [", "not valid YAML"),
        ("", "one key, `routes`"),
        (
            "routes: [{filter: a, sink: {uri: 'https://h/', caFile: /nowhere.pem}}]",
            "/nowhere.pem can't be used",
        ),
        ("routes: [{filter: a, sink: 'http://h/', broker: b}]", "not among `brokers`"),
    ],
)
async def test_a_file_that_is_no_good_changes_nothing_and_says_why(
    broker: Mosquitto, sink: Sink, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    text: str, why: str,
) -> None:  # fmt: skip
    async with reloadable(broker, one_route(sink), tmp_path) as running:
        await reloaded(running, tmp_path, text)
        assert running.adaptor.stale is not None
        assert why in running.adaptor.stale
        assert why in caplog.text
        assert "weir_adaptor_routes_current 0\n" in metrics(running.adaptor).decode()
        await broker.publish([("plant/x", b"1")])
        await until(lambda: sink.taken, "the old routes go on")
        assert connections(broker, sink) == 1
        await reloaded(running, tmp_path, one_route(sink, f"{QUICK}, type: io.example.good"))
        await until(lambda: running.adaptor.stale is None, "the next one is taken")
        assert "weir_adaptor_routes_current 1\n" in metrics(running.adaptor).decode()


async def test_the_status_says_that_the_file_was_not_taken(
    broker: Mosquitto, sink: Sink, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with reloadable(broker, one_route(sink), tmp_path) as running:
        server = await serve_status(tmp_path / "status", running.adaptor.snapshot)
        status = ("adaptor", "status", str(tmp_path / "status"))
        assert await asyncio.to_thread(weir, *status) == 0
        await reloaded(running, tmp_path, "routes: []")
        assert await asyncio.to_thread(weir, *status) == 1
        server.close()
    assert "was not taken" in capsys.readouterr().out


async def test_sinks_whose_routes_stay_the_same_are_not_disturbed(
    broker: Mosquitto, sink: Sink, other: Sink, tmp_path: Path
) -> None:
    sink.script = lambda _: Answer(503)
    first = f"name: all, filter: plant/#, sink: '{sink.url}', {QUICK}"
    second = f"name: other, filter: plant/#, sink: '{other.url}', {QUICK}"
    async with reloadable(broker, routes(first), tmp_path) as running:
        await broker.publish([("plant/x", b"%d" % n) for n in range(5)])
        await until(lambda: len(sink.requests) >= 5, "they are tried")
        ids = {request.id for request in sink.requests}
        await reloaded(running, tmp_path, routes(first, second))
        await running.connected()
        await reloaded(running, tmp_path, routes(first, f"{second}, type: io.example.t"))
        await reloaded(running, tmp_path, routes(first))
        sink.script = lambda _: Answer()
        await until(lambda: len(sink.taken) == 5, "all are taken")
    assert connections(broker, sink) == 1
    assert connections(broker, other) == 2
    assert {request.id for request in sink.taken} == ids


async def test_a_stop_in_the_middle_of_a_reload_is_an_orderly_end(
    broker: Mosquitto, sink: Sink, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sink.script = lambda _: Answer(hang=True)
    process = AdaptorProcess(broker.url, one_route(sink), tmp_path, "--grace", "3")
    async with process:
        await until(lambda: broker.subscribed(client_id("weir", sink.url)), "subscribed")
        await broker.publish([("plant/x", b"1")])
        await until(lambda: sink.requests, "it hangs")
        process.routes.write_text(one_route(sink, f"{QUICK}, type: io.example.new"))
        process.send(signal.SIGHUP)
        await asyncio.sleep(0.5)  # somewhere in the drain
        assert await process.stop() == 0
    assert "Traceback" not in capfd.readouterr().err
    sink.script = lambda _: Answer()
    async with reloadable(broker, one_route(sink), tmp_path):
        await until(lambda: sink.taken, "the message is still there")


async def test_what_a_route_no_longer_takes_is_not_asked_for_any_more(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with reloadable(broker, one_route(sink), tmp_path) as running:
        narrow = one_route(sink).replace("plant/#", "plant/a")
        await reloaded(running, tmp_path, narrow)
        await running.connected()
        await until(
            lambda: "plant/#" in broker.unsubscribed(client_id("weir", sink.url)), "unsubscribed"
        )
        await broker.publish([("plant/b", b"no"), ("plant/a", b"yes")])
        await until(lambda: sink.taken, "it arrives")
    assert sink.bodies == [b"yes"]


async def test_messages_that_a_blocked_sink_has_not_taken_are_delivered_by_the_new_route(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda _: Answer(503)
    async with reloadable(broker, one_route(sink), tmp_path) as running:
        await broker.publish([("plant/x", b"%d" % n) for n in range(20)])
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "blocked")
        await reloaded(running, tmp_path, one_route(sink, f"{QUICK}, type: io.example.new"))
        sink.script = lambda _: Answer()
        await until(lambda: len(set(sink.bodies)) == 20, "all are taken")
    assert {request.headers["ce-type"] for request in sink.taken} == {"io.example.new"}


async def test_what_lies_in_the_spool_follows_its_route_to_another_sink_with_its_ids(
    broker: Mosquitto, sink: Sink, other: Sink, tmp_path: Path
) -> None:
    sink.script = lambda _: Answer(503)
    spool = f"{QUICK}, spool: always"
    async with reloadable(broker, one_route(sink, spool), tmp_path) as running:
        await broker.publish([("plant/x", b"%d" % n) for n in range(600)])
        await until(lambda: running.route("all")["spool"]["events"] == 600, "in the spool")
        await reloaded(running, tmp_path, one_route(other, spool))
        await until(lambda: running.route("all")["spool"]["events"] == 0, "delivered")
    assert {int(body) for body in other.bodies} == set(range(600))
    tried = {request.body: request.id for request in sink.requests}
    assert tried
    assert all(tried.get(each.body, each.id) == each.id for each in other.taken)


async def test_the_first_route_with_a_spool_may_come_later(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with reloadable(broker, one_route(sink), tmp_path) as running:
        assert running.adaptor.store is None
        await reloaded(running, tmp_path, one_route(sink, f"{QUICK}, spool: always"))
        await running.connected()
        await sink.stop()
        await broker.publish([("plant/x", b"%d" % n) for n in range(20)])
        await until(lambda: running.route("all")["spool"]["events"] == 20, "in the spool")
        await sink.start()
        await until(lambda: len(sink.taken) == 20, "delivered")


async def test_a_broker_may_be_exchanged(
    broker: Mosquitto, sink: Sink, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    second = Mosquitto(tmp_path_factory.mktemp("second"))
    await second.start()
    named = f"brokers: {{b: '{second.url}'}}\n" + one_route(sink, f"{QUICK}, broker: b")
    async with reloadable(broker, one_route(sink), tmp_path) as running:
        await broker.publish([("plant/x", b"first")])
        await until(lambda: sink.taken, "from the first")
        await reloaded(running, tmp_path, named)
        await running.connected()
        await second.publish([("plant/x", b"second")])
        await until(lambda: len(sink.taken) == 2, "from the second")
    await second.stop()
    assert sink.bodies == [b"first", b"second"]


async def test_without_a_file_there_is_nothing_to_read_again(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    (tmp_path / "r").write_text(one_route(sink))
    running = Running(AdaptorConfig(broker.url, load(tmp_path / "r"), tmp_path / "q.db"))
    await running.connected()
    running.reload.set()
    await until(lambda: running.adaptor.stale is not None, "it says so")
    assert "no file" in str(running.adaptor.stale)
    await running.stop()


async def test_pods_of_a_sink_change_without_a_new_session(
    broker: Mosquitto, sink: Sink, other: Sink, tmp_path: Path
) -> None:
    def text(*pods: Sink) -> str:
        listed = ", ".join(f"'127.0.0.1:{pod.port}'" for pod in pods)
        where = f"{{uri: 'http://127.0.0.1:9/', pods: [{listed}]}}"
        return routes(f"name: all, filter: plant/#, sink: {where}, {QUICK}")

    def events(pod: Sink) -> list[bytes]:
        return [each for each in pod.bodies if each]  # beside the question for its direct port

    async with reloadable(broker, text(sink), tmp_path) as running:
        await broker.publish([("plant/x", b"one")])
        await until(lambda: events(sink) == [b"one"], "the first pod has it")
        await reloaded(running, tmp_path, text(other))
        assert running.adaptor.stale is None
        await broker.publish([("plant/x", b"two")])
        await until(lambda: events(other) == [b"two"], "the second pod has it")
        await reloaded(running, tmp_path, text(sink, other))
        await broker.publish([("plant/x", b"%d" % n) for n in range(20)])
        await until(lambda: len(events(sink)) == len(events(other)) == 11, "both have their part")
        assert broker.connections(client_id("weir", "http://127.0.0.1:9/")) == 1
