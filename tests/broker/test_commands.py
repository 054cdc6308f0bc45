"""`weir quarantine`, as people type it, and `weir adaptor` with what people get wrong."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.broker.harness import Answer, Mosquitto, Sink
from weir.adaptor import commands
from weir.adaptor.events import Event
from weir.adaptor.quarantine import Held, Quarantine
from weir.adaptor.quarantine_commands import replay


def weir(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    args = parser.parse_args(arguments)
    code: int = args.call(args)
    return code


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    path = tmp_path / "quarantine.db"
    event = Event({"specversion": "1.0", "id": "e1", "source": "/s", "type": "t"}, b"data")
    held = Held(0.0, "all", "function", "a/b", "the sink answered 400", 400, b"no such unit", event)
    quarantine = Quarantine(path)
    quarantine.put([held, replace(held, sink="http://127.0.0.1:1/gone")])
    quarantine.close()
    return path


def test_list_says_what_why_and_where(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert weir("quarantine", "list", "--quarantine", str(filled)) == 0
    out = capsys.readouterr().out
    for part in ("all -> function", "id e1", "a/b", "answered 400", "no such unit"):
        assert part in out


def test_list_for_machines(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert weir("quarantine", "list", "--json", "2", "--quarantine", str(filled)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["sink"] == "http://127.0.0.1:1/gone"


def test_discard_wants_numbers_or_all(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert weir("quarantine", "discard", "--quarantine", str(filled)) == 2
    assert "--all" in capsys.readouterr().err
    assert weir("quarantine", "discard", "1", "--quarantine", str(filled)) == 0
    assert weir("quarantine", "discard", "--all", "--quarantine", str(filled)) == 0
    assert len(Quarantine(filled)) == 0


def test_a_quarantine_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none.db"
    assert weir("quarantine", "list", "--quarantine", str(missing)) == 2
    assert str(missing) in capsys.readouterr().err
    assert not missing.exists()


def test_replay_without_the_functions_url_says_what_is_missing(
    filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weir("quarantine", "replay", "--quarantine", str(filled)) == 2
    assert "--function-url" in capsys.readouterr().err
    assert len(Quarantine(filled)) == 2


async def test_replay_keeps_what_is_still_refused_and_skips_a_sink_that_is_down(
    filled: Path, sink: Sink
) -> None:
    sink.script = lambda request: Answer(400)
    quarantine = Quarantine(filled)
    assert await replay(quarantine, (), sink.url) == (0, 2)
    sink.script = lambda request: Answer()
    assert await replay(quarantine, (), sink.url) == (1, 1)
    assert [held.number for held in quarantine.events()] == [2]


async def test_replay_sends_in_the_mode_that_the_sink_wants(filled: Path, sink: Sink) -> None:
    quarantine = Quarantine(filled)
    assert await replay(quarantine, (), sink.url, mode="structured") == (1, 1)
    assert sink.taken[0].headers["content-type"] == "application/cloudevents+json"
    assert json.loads(sink.taken[0].body)["specversion"] == "1.0"


@pytest.mark.parametrize(
    ("broker", "why"),
    [
        ("localhost:1883", "mqtt://host:port"),
        ("mqtt://", "a host and a port"),
        ("mqtt://h/topic", "nothing after them"),
    ],
)
def test_a_wrong_broker_url_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broker: str, why: str
) -> None:
    routes = tmp_path / "routes.yaml"
    routes.write_text("routes: [{filter: a, sink: 'http://127.0.0.1:1/'}]")
    where = ("--routes", str(routes), "--quarantine", str(tmp_path / "q.db"))
    assert weir("adaptor", "--broker", broker, *where) == 2
    assert why in capsys.readouterr().err


def test_a_function_sink_without_a_url_is_explained(
    broker: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    routes = tmp_path / "routes.yaml"
    routes.write_text("routes: [{filter: a, sink: function}]")
    where = ("--routes", str(routes), "--quarantine", str(tmp_path / "q.db"))
    assert weir("adaptor", "--broker", broker.url, *where) == 2
    assert "--function-url" in capsys.readouterr().err
