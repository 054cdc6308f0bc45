"""What operators see: metrics, health, the log, the status, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.broker.harness import (
    PATIENCE,
    QUICK,
    AdaptorProcess,
    Answer,
    Mosquitto,
    Running,
    Sink,
    adaptor,
    free_port,
    held_by,
    one_route,
    routes,
    until,
)
from tests.broker.test_commands import weir
from weir.adaptor.logs import JsonLines
from weir.adaptor.operations import metrics, serve_operations
from weir.adaptor.service import client_id
from weir.proxy.wire.status import serve_status

READINGS = [(f"plant/{n}", b"secret payload %d" % n) for n in range(10)]


async def ask(port: int, request: bytes) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = (await reader.read()).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


async def get(port: int, path: str) -> tuple[int, str]:
    return await ask(port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


@contextlib.asynccontextmanager
async def operations(running: Running) -> AsyncIterator[int]:
    port = free_port()
    server = await serve_operations(running.adaptor, "127.0.0.1", port)
    yield port
    server.close()


def value(text: str, name: str, **labels: str) -> float:
    """Of one sample; its labels in any order."""
    for line in text.splitlines():
        match = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
        if match and match[1] == name:
            found = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2]))
            if found.items() >= labels.items():
                return float(match[3])
    raise AssertionError(f"no {name} with {labels} in\n{text}")


async def test_metrics_count_what_becomes_of_the_events_of_each_route(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    sink.script = lambda request: Answer(400 if request.body.endswith(b"3") else 204)
    text = routes(
        f"name: 'a \"b\"', filter: plant/#, sink: '{sink.url}', {QUICK}",
        f"name: idle, filter: idle/#, sink: '{sink.url}'",
    )
    async with adaptor(broker.url, text, tmp_path) as running, operations(running) as port:
        await broker.publish(READINGS)
        await until(lambda: running.route('a "b"')["quarantined"] == 1, "all have ended")
        await until(lambda: running.sink(sink.url)["window"]["used"] == 0, "acknowledged")
        status, body = await get(port, "/metrics")
    assert status == 200
    route, other = r"a \"b\"", "idle"
    for name, count in (("received", 10), ("delivered", 9), ("quarantined", 1), ("dropped", 0)):
        assert value(body, f"weir_adaptor_events_{name}_total", route=route) == count
        assert value(body, f"weir_adaptor_events_{name}_total", route=other) == 0
    assert value(body, "weir_adaptor_events_pending", route=route) == 0
    assert value(body, "weir_adaptor_delivery_seconds_count", route=route) == 9
    assert value(body, "weir_adaptor_delivery_seconds_bucket", route=route, le="+Inf") == 9
    assert value(body, "weir_adaptor_delivery_seconds_sum", route=route) > 0
    assert value(body, "weir_adaptor_sink_up", sink=sink.url) == 1
    assert value(body, "weir_adaptor_session_connected", sink=sink.url) == 1
    assert value(body, "weir_adaptor_session_window", sink=sink.url) == 256
    assert "secret" not in body


async def test_histogram_buckets_are_cumulative_and_tell_where_a_latency_fell(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        latency = running.adaptor.lanes[0].flows[0].counters.latency
        for seconds in (0.0001, 0.003, 0.003, 0.5, 100.0):
            latency.record(seconds)
        text = metrics(running.adaptor).decode()
    name = "weir_adaptor_delivery_seconds"
    expected = (("0.000128", 1), ("0.002048", 1), ("0.004096", 3), ("0.524288", 4), ("+Inf", 5))
    for bound, count in expected:
        assert value(text, f"{name}_bucket", le=bound) == count
    assert value(text, f"{name}_sum") == pytest.approx(100.5061, rel=1 / 32)


async def test_the_age_of_the_oldest_unacknowledged_message_grows_while_the_sink_thinks(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    sink.script = held_by(gate)
    name = "weir_adaptor_oldest_unacknowledged_seconds"
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        assert value(metrics(running.adaptor).decode(), name) == 0
        await broker.publish(READINGS)
        await until(lambda: len(sink.requests) == 10, "with the sink")
        await until(lambda: value(metrics(running.adaptor).decode(), name) > 0.1, "it ages")
        assert value(metrics(running.adaptor).decode(), "weir_adaptor_sink_in_flight") == 10
        gate.set()
        await until(lambda: value(metrics(running.adaptor).decode(), name) == 0, "acknowledged")


async def test_ready_means_connected_and_alive_means_running(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    await sink.stop()  # which must not matter
    async with (
        adaptor(broker.url, one_route(sink), tmp_path) as running,
        operations(running) as port,
    ):
        await broker.publish(READINGS)
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "blocked")
        assert await get(port, "/readyz") == (200, "ready\n")
        await broker.stop()
        await until(lambda: not running.sink(sink.url)["connected"], "the loss is seen")
        status, body = await get(port, "/readyz?verbose")
        assert (status, body.startswith(f"{sink.url}: ")) == (503, True)
        assert await get(port, "/healthz") == (200, "alive\n")
        await broker.start()
        await running.connected()
        assert (await get(port, "/readyz"))[0] == 200


async def test_an_adaptor_that_drains_is_not_ready_any_more(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    sink.script = held_by(gate)
    async with (
        adaptor(broker.url, one_route(sink), tmp_path) as running,
        operations(running) as port,
    ):
        await broker.publish(READINGS)
        await until(lambda: len(sink.requests) == 10, "with the sink")
        stopping = asyncio.create_task(running.stop())
        await until(lambda: running.adaptor.draining, "it drains")
        assert await get(port, "/readyz") == (503, "draining\n")
        gate.set()
        await stopping


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"\r\n\r\n", 405),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", 200),
    ],
)
async def test_nothing_else_is_served(
    broker: Mosquitto, sink: Sink, tmp_path: Path, request_: bytes, status: int
) -> None:
    async with (
        adaptor(broker.url, one_route(sink), tmp_path) as running,
        operations(running) as port,
    ):
        answered, body = await ask(port, request_)
    assert answered == status
    assert body == "" or request_[:4] != b"HEAD"


async def test_the_command_serves_them_logs_json_without_payloads_and_drains_on_sigterm(
    broker: Mosquitto, sink: Sink, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sink.script = lambda request: Answer(422 if request.body.endswith(b"3") else 204)
    port = free_port()
    options = ("--http", f"127.0.0.1:{port}", "--log-format", "json", "--grace", "5")
    text = one_route(sink, f"{QUICK}, onFailure: drop")
    async with AdaptorProcess(broker.url, text, tmp_path, *options) as process:
        client = client_id("weir", sink.url)
        await until(lambda: broker.subscribed(client), "subscribed")
        async with asyncio.timeout(PATIENCE):
            while (await get(port, "/readyz"))[0] != 200:  # the SUBACK may still be on its way
                await asyncio.sleep(0.005)
        await broker.publish(READINGS)
        await until(lambda: len(broker.pubacks(client)) == 10, "all are acknowledged")
        _, body = await get(port, "/metrics")
        assert value(body, "weir_adaptor_events_dropped_total") == 1
        assert await process.stop() == 0
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (dropped,) = [line for line in lines if "dropped" in line["message"]]
    assert (dropped["level"], dropped["logger"]) == ("warning", "weir.adaptor")
    assert "422" in dropped["message"]
    assert "secret" not in json.dumps(lines)


def test_a_log_line_is_one_line_whatever_is_in_it() -> None:
    record = logging.LogRecord("n", logging.ERROR, "f", 1, "a\n%s", ("ü\x1b",), None)
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "a\nü\x1b"


async def test_the_status_says_in_words_what_is_wrong(
    broker: Mosquitto, sink: Sink, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    socket = tmp_path / "status.sock"
    async with adaptor(broker.url, one_route(sink), tmp_path) as running:
        server = await serve_status(socket, running.adaptor.snapshot)
        await broker.publish(READINGS)
        await until(lambda: running.route("all")["delivered"] == 10, "delivered")
        assert await asyncio.to_thread(weir, "adaptor", "status", str(socket)) == 0
        said = capsys.readouterr().out
        for part in (f"sink {sink.url}: up", "MQTT 5", "received 10, delivered 10", "p99"):
            assert part in said
        await sink.stop()
        await broker.publish(READINGS)
        await until(lambda: running.sink(sink.url)["state"] == "blocked", "blocked")
        assert await asyncio.to_thread(weir, "adaptor", "status", str(socket)) == 1
        assert "unacknowledged 10 of 256" in capsys.readouterr().out
        assert await asyncio.to_thread(weir, "adaptor", "status", "--json", str(socket)) == 1
        assert json.loads(capsys.readouterr().out)["sinks"][0]["state"] == "blocked"
        server.close()


async def test_the_status_and_the_metrics_count_a_sink_s_pods(
    broker: Mosquitto, sink: Sink, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    socket = tmp_path / "status.sock"
    pods = f"['127.0.0.1:{sink.port}', '127.0.0.1:9']"
    where = f"{{uri: '{sink.url}', pods: {pods}}}"
    text = routes(f"name: all, filter: plant/#, sink: {where}, {QUICK}")
    async with adaptor(broker.url, text, tmp_path) as running:
        server = await serve_status(socket, running.adaptor.snapshot)
        await broker.publish(READINGS)
        await until(lambda: running.route("all")["delivered"] == 10, "the pod that lives has them")
        assert await asyncio.to_thread(weir, "adaptor", "status", str(socket)) == 0
        out = "(ejected|probing)"  # by how long ago it failed
        words = capsys.readouterr().out
        assert re.search(f"pods: 1 up, relayed; 1 {out}, relayed", words), words
        said = metrics(running.adaptor).decode()
        assert 'state="up"} 1\n' in said
        assert re.search(f'state="{out}"}} 1\n', said)
        server.close()


def test_what_is_missing_on_the_command_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEIR_BROKER", raising=False)
    routes_file = tmp_path / "routes.yaml"
    routes_file.write_text("routes: [{filter: a, sink: 'http://127.0.0.1:1'}]")
    where = ("--quarantine", str(tmp_path / "q.db"))
    assert weir("adaptor", "--routes", str(routes_file), *where) == 2
    assert "a broker is missing: name it with --broker" in capsys.readouterr().err
    assert weir("adaptor", "--broker", "mqtt://h") == 2
    assert "--routes (or --listen) is missing" in capsys.readouterr().err
    assert weir("adaptor", "status", str(tmp_path / "none.sock")) == 2
    assert "none.sock" in capsys.readouterr().err


async def test_a_stop_in_the_first_moments_is_an_orderly_end_as_well(
    broker: Mosquitto, sink: Sink, tmp_path: Path
) -> None:
    process = AdaptorProcess(broker.url, one_route(sink), tmp_path)
    ends = []
    for milliseconds in (0, 30, 100, 200, 300, 400):
        async with process:
            await until(lambda: process.minds(signal.SIGTERM), "it runs code of ours")
            await asyncio.sleep(milliseconds / 1000)  # somewhere in its start, each time elsewhere
            ends.append(await process.stop())
    assert ends == [0] * 6
