"""A change of a file counts when it is finished, and once."""

from __future__ import annotations

from pathlib import Path

import pytest

from weir.adaptor.watch import Watch


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "routes.yaml"
    path.write_text("one")
    return path


def test_what_stays_as_it_is_has_not_changed(path: Path) -> None:
    watch = Watch(path)
    assert [watch.changed() for _ in range(3)] == [False] * 3


def test_a_change_counts_when_two_looks_have_seen_it_and_only_once(path: Path) -> None:
    watch = Watch(path)
    path.write_text("another")
    assert [watch.changed() for _ in range(4)] == [False, True, False, False]


def test_a_file_that_is_still_being_written_is_waited_for(path: Path) -> None:
    watch = Watch(path)
    for length in range(1, 5):
        path.write_text("routes: " + "x" * length)
        assert not watch.changed()
    assert watch.changed()


def test_a_file_that_is_replaced_has_changed_though_it_looks_the_same(
    path: Path, tmp_path: Path
) -> None:
    watch = Watch(path)
    other = tmp_path / "other"
    other.write_text("two")
    other.replace(path)
    assert [watch.changed(), watch.changed()] == [False, True]


def test_a_link_that_is_turned_is_a_change(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
    link = tmp_path / "routes.yaml"
    link.symlink_to("old")
    watch = Watch(link)
    (tmp_path / "beside").symlink_to("new")
    (tmp_path / "beside").rename(link)
    assert [watch.changed(), watch.changed()] == [False, True]


def test_a_file_that_is_gone_is_no_file_to_take(path: Path) -> None:
    watch = Watch(path)
    path.unlink()
    assert [watch.changed() for _ in range(3)] == [False] * 3
    path.write_text("it is back")
    assert [watch.changed(), watch.changed()] == [False, True]
