"""The spool on a real file, and its writer on a real event loop."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from weir.adaptor.spool import Batch, Entry, Mark, Spool, SpoolError, SpoolTrouble, entries
from weir.adaptor.spool_writer import SpoolWriter

MARK = Mark("s", 7, "all", b"digest", exactly=True)


def entry(number: int, route: str = "all", packet: bytes = b"packet") -> Entry:
    return Entry(number, route, 1_700_000_000.5, f"id-{number}", packet)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "spool.db"


@pytest.fixture
def spool(path: Path) -> Iterator[Spool]:
    opened = Spool(path)
    yield opened
    opened.close()


# --- the file -------------------------------------------------------------------------------------


def test_what_was_written_is_there_after_a_restart(path: Path) -> None:
    first = Spool(path)
    first.write(Batch(entries=[entry(1), entry(2, "other")], marks=[MARK]))
    first.close()
    second = Spool(path)
    assert second.load("all", 0, 10, 1 << 20) == [entry(1)]
    assert second.held() == {"all": (1, entry(1).size), "other": (1, entry(2).size)}
    assert second.highest() == 2
    assert second.marks("s") == [MARK]
    assert second.marks("another session") == []
    second.close()


def test_what_was_written_survives_the_sudden_end_of_the_process(path: Path) -> None:
    script = (
        "import os, pathlib, sys\n"
        "from weir.adaptor.spool import Batch, Entry, Spool\n"
        "spool = Spool(pathlib.Path(sys.argv[1]))\n"
        "spool.write(Batch(entries=[Entry(1, 'all', 0.0, 'id', b'packet')]))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    spool = Spool(path)
    assert [each.number for each in spool.load("all", 0, 10, 1 << 20)] == [1]
    spool.close()


def test_what_was_removed_is_gone(spool: Spool) -> None:
    spool.write(Batch(entries=[entry(1), entry(2)], marks=[MARK]))
    spool.write(Batch(removed=[1], unmarked=[("s", 7)]))
    assert [each.number for each in spool.load("all", 0, 10, 1 << 20)] == [2]
    assert spool.marks("s") == []


def test_marks_go_one_by_one_and_only_of_their_session(spool: Spool) -> None:
    spool.write(
        Batch(marks=[Mark(s, n, "all", b"digest", exactly=False) for s in "ab" for n in range(90)])
    )
    spool.write(Batch(unmarked=[("a", 3), ("b", 4), ("a", 5)]))
    assert {each.packet_id for each in spool.marks("a")} == set(range(90)) - {3, 5}
    assert {each.packet_id for each in spool.marks("b")} == set(range(90)) - {4}


def test_a_session_that_ends_takes_its_marks_with_it(spool: Spool) -> None:
    spool.write(Batch(marks=[MARK]))
    spool.write(Batch(ended=["s"]))
    assert spool.marks("s") == []


def test_entries_are_loaded_in_order_and_only_so_many(spool: Spool) -> None:
    spool.write(Batch(entries=[entry(n, "all" if n % 2 else "other") for n in range(1, 20)]))
    assert [each.number for each in spool.load("all", 3, 4, 1 << 20)] == [5, 7, 9, 11]


def test_entries_are_loaded_up_to_so_many_bytes_but_always_one(spool: Spool) -> None:
    spool.write(Batch(entries=[entry(n, packet=b"x" * 1000) for n in range(1, 6)]))
    assert len(spool.load("all", 0, 10, 2000)) == 2
    assert len(spool.load("all", 0, 10, 1)) == 1


def test_people_may_look_at_it_while_an_adaptor_uses_it(spool: Spool, path: Path) -> None:
    spool.write(Batch(entries=[entry(1)]))
    assert list(entries(path)) == [entry(1)]


def test_two_adaptors_can_not_have_one_file(spool: Spool, path: Path) -> None:
    with pytest.raises(SpoolError, match=r"spool\.db is in use .*--spool"):
        Spool(path)


async def test_a_damaged_file_is_named_with_what_to_do(path: Path) -> None:
    first = Spool(path)
    first.write(Batch(entries=[entry(n, packet=os.urandom(3000)) for n in range(1, 100)]))
    first.close()
    with path.open("r+b") as stream:
        stream.seek(4096)
        stream.write(os.urandom(path.stat().st_size - 4096))
    with pytest.raises(SpoolError, match=r"spool\.db is damaged: .*move it away .*\.recover"):
        SpoolWriter(Spool(path))


def SpoolWriterInALoop(path: Path) -> None:
    async def make() -> None:
        SpoolWriter(Spool(path))

    asyncio.run(make())


def test_a_file_of_something_else_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(SpoolError, match="is no spool of this version"):
        Spool(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_named(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"routes: []\n" * 100)
    with pytest.raises(SpoolError, match=r"spool\.db is damaged"):
        Spool(path)


@pytest.mark.parametrize("name", ["spool.db", "spool.db-wal"])
def test_a_file_that_is_moved_while_in_use_takes_nothing_more(
    spool: Spool, path: Path, name: str
) -> None:
    spool.write(Batch(entries=[entry(1)]))
    shutil.move(path.with_name(name), path.with_name("moved"))
    with pytest.raises(SpoolError, match="was moved, deleted or replaced while in use"):
        spool.write(Batch(entries=[entry(2)]))


def fill_the_disk(spool: Spool) -> None:
    """As far as SQLite can tell: it may use no more pages than it has."""
    pages = spool._db.execute("PRAGMA page_count").fetchone()[0]
    spool._db.execute(f"PRAGMA max_page_count = {pages}")


def test_on_a_full_disk_nothing_is_taken_and_what_is_delivered_still_leaves(spool: Spool) -> None:
    spool.write(Batch(entries=[entry(1), entry(2)]))
    fill_the_disk(spool)
    large = entry(3, packet=b"x" * 100_000)
    with pytest.raises(SpoolTrouble, match=r"can't write the spool .*full"):
        spool.write(Batch(removed=[1], entries=[large]))
    assert spool.load("all", 0, 10, 1 << 20) == [entry(2)]


# --- the writer -----------------------------------------------------------------------------------


class Counted(Spool):
    """`batches`: what each commit had."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.batches: list[list[int]] = []

    def write(self, batch: Batch) -> None:
        super().write(batch)
        self.batches.append([each.number for each in batch.entries])


async def test_what_comes_in_one_turn_goes_into_one_commit_and_is_done_in_order(path: Path) -> None:
    spool = Counted(path)
    writer = SpoolWriter(spool)
    writer.share("all", 1 << 20)
    done: list[int] = []
    for number in range(1, 101):
        writer.put(entry(number), None, partial(done.append, number))
    assert not done
    await writer.flush()
    assert done == list(range(1, 101))
    assert spool.batches == [list(range(1, 101))]
    await writer.close()


async def test_what_finds_its_share_full_waits_in_order_until_something_has_left(
    path: Path,
) -> None:
    writer = SpoolWriter(Spool(path))
    share = writer.share("all", 2 * entry(1).size)
    writer.share("other", 1 << 20)
    done: list[int] = []
    for number in range(1, 6):
        writer.put(entry(number), None, partial(done.append, number))
    writer.put(entry(6, "other"), None, lambda: done.append(6))
    await writer.flush()
    assert done == [1, 2, 6]  # another route has room of its own
    assert len(share.blocked) == 3
    for number in (1, 2):
        writer.remove(entry(number))
        await writer.flush()  # the removal
        await writer.flush()  # and what it made room for
    assert done == [1, 2, 6, 3, 4]
    await writer.close()


async def test_an_entry_larger_than_its_share_is_taken_when_the_share_is_empty(path: Path) -> None:
    writer = SpoolWriter(Spool(path))
    writer.share("all", 10)
    done: list[int] = []
    writer.put(entry(1), None, lambda: done.append(1))
    writer.put(entry(2), None, lambda: done.append(2))
    await writer.flush()
    assert done == [1]
    await writer.close()


async def test_what_can_not_be_written_now_is_written_later_and_nothing_is_done_before(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weir.adaptor.spool_writer.AGAIN", 0.01)
    spool = Spool(path)
    writer = SpoolWriter(spool)
    writer.share("all", 1 << 30)
    pages = spool._db.execute("PRAGMA max_page_count").fetchone()[0]
    fill_the_disk(spool)
    done: list[int] = []
    for number in (1, 2):
        large = entry(number, packet=b"x" * 100_000)
        writer.put(large, None, partial(done.append, number))
        await writer.flush()
    assert not done
    assert "full" in str(writer.trouble)
    spool._db.execute(f"PRAGMA max_page_count = {pages}")
    async with asyncio.timeout(30):
        while writer.trouble is not None or len(done) < 2:
            await asyncio.sleep(0.005)
    assert done == [1, 2]
    await writer.close()


async def test_a_file_that_is_no_good_any_more_ends_the_writer(path: Path) -> None:
    writer = SpoolWriter(Spool(path))
    writer.share("all", 1 << 20)
    path.unlink()
    done: list[int] = []
    writer.put(entry(1), None, lambda: done.append(1))
    await writer.flush()
    assert not done
    with pytest.raises(SpoolError, match="deleted"):
        await writer.failed
    await writer.close()


async def test_numbers_go_on_where_the_file_ends(path: Path) -> None:
    spool = Spool(path)
    spool.write(Batch(entries=[entry(41)]))
    writer = SpoolWriter(spool)
    assert writer.next_number() == 42
    await writer.close()
