"""The quarantine on a real file."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from weir.adaptor.events import Event
from weir.adaptor.quarantine import (
    LONGEST_ANSWER,
    Held,
    Quarantine,
    QuarantineError,
    QuarantineWriter,
)

HELD = Held(
    at=1_700_000_000.0,
    route="all",
    sink="function",
    topic="plant/ü",
    reason="the sink answered 400",
    status=400,
    answer=b"no",
    event=Event({"specversion": "1.0", "id": "1", "source": "/s", "type": "ü"}, b"\0x", "text/csv"),
)


def test_what_was_put_is_there_after_reopening_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state" / "quarantine.db"
    quarantine = Quarantine(path)
    quarantine.put([HELD, replace(HELD, status=None)])
    quarantine.close()
    first, second = Quarantine(path).events()
    assert replace(first, number=0) == HELD
    assert second.status is None


def test_only_the_wanted_ones_are_discarded(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.db")
    quarantine.put([HELD, HELD, HELD])
    assert quarantine.discard([2, 9]) == 1
    assert [held.number for held in quarantine.events()] == [1, 3]
    assert [held.number for held in quarantine.events([3])] == [3]


def test_a_full_quarantine_refuses_all_or_nothing_and_has_room_after_a_discard(
    tmp_path: Path,
) -> None:
    quarantine = Quarantine(tmp_path / "q.db", bound=150)
    quarantine.put([HELD])
    with pytest.raises(QuarantineError, match=r"full.*replay or discard"):
        quarantine.put([HELD, HELD])
    assert len(quarantine) == 1
    quarantine.discard([1])
    assert quarantine.held_bytes() == 0
    quarantine.put([HELD])


def test_two_processes_see_each_others_events(tmp_path: Path) -> None:
    one, other = Quarantine(tmp_path / "q.db"), Quarantine(tmp_path / "q.db")
    one.put([HELD])
    assert other.discard([1]) == 1
    assert len(one) == 0


def test_a_long_answer_is_cut(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.db")
    quarantine.put([replace(HELD, answer=b"x" * 5000)])
    assert len(next(quarantine.events()).answer) == LONGEST_ANSWER


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.db"
    path.write_text("this is no database, and longer than a header of one" * 10)
    with pytest.raises(QuarantineError, match=r"q\.db"):
        Quarantine(path)


async def test_the_writer_keeps_everything_given_at_once(tmp_path: Path) -> None:
    writer = QuarantineWriter(Quarantine(tmp_path / "q.db"))
    await asyncio.gather(*(writer.put(HELD) for _ in range(50)))
    writer.close()
    assert len(Quarantine(tmp_path / "q.db")) == 50


async def test_the_writer_tells_each_caller_of_a_refusal(tmp_path: Path) -> None:
    writer = QuarantineWriter(Quarantine(tmp_path / "q.db", bound=100))
    await writer.put(HELD)
    with pytest.raises(QuarantineError):
        await writer.put(HELD)
    writer.close()


class _Wrapped:
    """A connection that behaves, until a subclass changes that."""

    _failed = False

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


class _FailingCommit(_Wrapped):
    """A connection whose first COMMIT fails and leaves the transaction open, as SQLITE_BUSY."""

    def execute(self, statement: str, *more: Any) -> sqlite3.Cursor:
        if statement == "COMMIT" and not self._failed:
            self._failed = True
            raise sqlite3.OperationalError("database is locked")
        return self._db.execute(statement, *more)


def test_a_failed_commit_keeps_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.db")
    quarantine._db = _FailingCommit(quarantine._db)  # type: ignore[assignment]
    with pytest.raises(QuarantineError, match="database is locked"):
        quarantine.put([HELD])
    assert len(quarantine) == 0
    quarantine.put([HELD])
    assert len(Quarantine(tmp_path / "q.db")) == 1


def test_a_discard_that_the_disk_refuses_says_so_and_deletes_nothing(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.db")
    quarantine.put([HELD])
    quarantine._db = _FailingCommit(quarantine._db)  # type: ignore[assignment]
    with pytest.raises(QuarantineError, match=r"can't delete .*q\.db"):
        quarantine.discard([1])
    assert len(quarantine) == 1


# --- files that are moved, deleted or replaced while in use ---------------------------------------


def test_a_file_that_was_deleted_meanwhile_is_made_anew(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.db")
    quarantine.put([HELD])
    for each in tmp_path.iterdir():
        each.unlink()
    quarantine.put([HELD])
    quarantine.put([HELD])
    assert len(Quarantine(tmp_path / "q.db")) == 2


def test_a_file_that_was_replaced_meanwhile_gets_the_event(tmp_path: Path) -> None:
    ours, other = Quarantine(tmp_path / "q.db"), Quarantine(tmp_path / "other.db")
    ours.put([HELD])
    other.put([replace(HELD, route="other")])
    other.close()
    (tmp_path / "other.db").replace(tmp_path / "q.db")
    ours.put([replace(HELD, route="late")])
    ours.close()
    assert [held.route for held in Quarantine(tmp_path / "q.db").events()] == ["other", "late"]


def test_a_log_that_was_deleted_alone_loses_nothing(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.db")
    quarantine.put([HELD])
    (tmp_path / "q.db-wal").unlink()
    quarantine.put([HELD])
    assert len(Quarantine(tmp_path / "q.db")) == 2


def test_a_file_moved_in_the_middle_of_a_write_is_noticed_before_the_event_counts_as_safe(
    tmp_path: Path,
) -> None:
    class Moved(_Wrapped):
        def execute(self, statement: str, *more: Any) -> sqlite3.Cursor:
            if statement == "COMMIT":
                (tmp_path / "q.db").rename(tmp_path / "old.db")
            return self._db.execute(statement, *more)

    quarantine = Quarantine(tmp_path / "q.db")
    quarantine._db = Moved(quarantine._db)  # type: ignore[assignment]
    quarantine.put([HELD])
    assert len(Quarantine(tmp_path / "q.db")) == 1


def test_a_quarantine_that_nobody_touches_is_not_opened_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Quarantine(tmp_path / "q.db").close()
    first, second = Quarantine(tmp_path / "q.db"), Quarantine(tmp_path / "q.db")
    for _ in range(3):
        first.put([HELD])
        second.put([HELD])
        first.discard([1])
    second.close()
    first.put([HELD])
    assert not caplog.records


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    command = [mount, "-t", "tmpfs", "-o", "size=20m", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this root may not mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(folder: Path) -> None:
    with (folder / "fill").open("ab", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            pass
    assert shutil.disk_usage(folder).free == 0


@pytest.mark.parametrize("opened", ["before", "after"])
def test_events_can_be_discarded_on_a_full_disk_and_then_there_is_room(
    small_disk: Path, opened: str
) -> None:
    path = small_disk / "q.db"
    quarantine = Quarantine(path)
    large = replace(HELD, event=Event(HELD.event.attributes, os.urandom(100_000)))
    with pytest.raises(QuarantineError, match="full"):
        for _ in range(1000):
            quarantine.put([large])
    _fill(small_disk)
    if opened == "after":
        quarantine.close()
        _fill(small_disk)
        quarantine = Quarantine(path)
        _fill(small_disk)
    numbers = [held.number for held in quarantine.events()]
    assert len(numbers) > 50
    assert quarantine.discard(numbers) == len(numbers)
    assert shutil.disk_usage(small_disk).free > 4 << 20
    quarantine.put([large])
    quarantine.close()
    assert len(Quarantine(path)) == 1
