"""What a session is subscribed to, noted so that a restart can tidy up."""

from __future__ import annotations

from pathlib import Path

import pytest

from weir.adaptor.subscriptions import Remembered, others


def remembered(folder: Path, client_id: str = "weir-a") -> Remembered:
    return Remembered(folder, "mqtt://h:1883", client_id, "5")


def test_what_was_held_and_is_not_wanted_any_more_is_stale(tmp_path: Path) -> None:
    remembered(tmp_path).holding(["plant/#", "b"])
    assert remembered(tmp_path).stale(["b", "plant/+"]) == ["plant/#"]


def test_a_crash_between_asking_and_the_answer_forgets_neither_old_nor_new(tmp_path: Path) -> None:
    session = remembered(tmp_path)
    session.holding(["old"])
    session.wanting(["new"])
    assert remembered(tmp_path).stale([]) == ["new", "old"]


def test_a_lost_session_has_nothing_to_unsubscribe(tmp_path: Path) -> None:
    session = remembered(tmp_path)
    session.holding(["old"])
    session.forget()
    assert session.stale([]) == remembered(tmp_path).stale([]) == []


def test_sessions_are_told_apart_by_broker_and_client_id(tmp_path: Path) -> None:
    remembered(tmp_path).holding(["a"])
    assert remembered(tmp_path, "weir-b").stale([]) == []
    assert Remembered(tmp_path, "mqtt://other:1883", "weir-a", "5").stale([]) == []


def test_sessions_that_no_sink_uses_are_found(tmp_path: Path) -> None:
    for name in ("weir-a", "weir-b", "plant-c"):
        remembered(tmp_path, name).holding(["x"])
    found = list(others(tmp_path, "mqtt://h:1883", "weir", ["weir-a"]))
    assert [(each.client_id, each.filters) for each in found] == [("weir-b", frozenset("x"))]
    assert not list(others(tmp_path, "mqtt://other:1883", "weir", []))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"filters": 5}'])
def test_a_damaged_note_costs_a_warning_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    remembered(tmp_path).holding(["a"])
    (note,) = tmp_path.iterdir()
    note.write_text(damage)
    session = remembered(tmp_path)
    assert session.stale([]) == []
    assert "can't read the noted subscriptions" in caplog.text
    session.holding(["b"])
    assert remembered(tmp_path).stale([]) == ["b"]


def test_a_folder_that_takes_no_file_costs_a_warning_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    session = remembered(tmp_path / "file" / "no-folder")
    session.holding(["a"])
    assert "can't note the subscriptions of weir-a" in caplog.text
    assert session.stale([]) == ["a"]
