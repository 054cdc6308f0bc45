"""The quarantine: events that no retry can deliver, safe on disk until someone decides.

One SQLite file in WAL mode with synchronous=FULL: when `put` returns, the event survives a power
cut, so its message may be acknowledged. Bounded by bytes of data; a full quarantine refuses, and
the caller keeps the message unacknowledged. Several processes may open the file: the adaptor writes
while a command lists, replays or discards. Knows nothing of MQTT, sinks or policies.

Two troubles of files are met here. A full disk: deleting needs room too (SQLite writes it to the
log first), so a reserve lies beside the file, given up for a discard and taken back afterwards. A
file that is moved or replaced while we have it open: SQLite would go on writing into the one that
nobody finds any more, so every write looks whether the name still means our file, before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weir.adaptor.events import Event

log = logging.getLogger("weir.adaptor")

BOUND = 256 << 20
"""Bytes of data and attributes together, unless told otherwise."""

LONGEST_ANSWER = 1024
"""Bytes of the sink's answer that are kept, as for Knative's dead letters."""

RESERVE = 8 << 20
"""Bytes beside the file that make room for a discard on a full disk: for what the log (4 MiB) still
has to bring into the file, and for deleting thousands of rows."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS quarantine (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    route TEXT NOT NULL,
    sink TEXT NOT NULL,
    topic TEXT NOT NULL,
    reason TEXT NOT NULL,
    status INTEGER,
    answer BLOB NOT NULL,
    attributes TEXT NOT NULL,
    content_type TEXT,
    data BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS held (bytes INTEGER NOT NULL) STRICT;
INSERT INTO held SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM held);
CREATE TRIGGER IF NOT EXISTS grow AFTER INSERT ON quarantine BEGIN
    UPDATE held SET bytes = bytes + length(CAST(NEW.attributes AS BLOB)) + length(NEW.data);
END;
CREATE TRIGGER IF NOT EXISTS shrink AFTER DELETE ON quarantine BEGIN
    UPDATE held SET bytes = bytes - length(CAST(OLD.attributes AS BLOB)) - length(OLD.data);
END;
"""
_COLUMNS = "number, at, route, sink, topic, reason, status, answer, attributes, content_type, data"


class QuarantineError(Exception):
    """The event is not safe; str() names the file and says why and what to do."""


_FileId = tuple[int, int] | None
"""Device and inode; None: no such file."""


@dataclass(frozen=True, slots=True)
class Held:
    """One event in quarantine. `at`: seconds since the epoch; `number` is 0 until it is stored."""

    at: float
    route: str
    sink: str
    topic: str
    reason: str
    status: int | None
    answer: bytes
    event: Event
    number: int = 0


class Quarantine:
    """The file, synchronously. Not thread-safe: one thread at a time."""

    def __init__(self, path: Path, bound: int = BOUND) -> None:
        """Raises QuarantineError when the file can't be opened or is something else."""
        self.path, self._bound = path, bound
        self._reserve = path.with_name(path.name + "-reserve")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except sqlite3.Error as error:  # its log needs room on the disk as well
                if not _disk_is_full(error) or not self._give_up_reserve():
                    raise
                self._open()
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except (OSError, sqlite3.Error) as error:
            raise QuarantineError(
                f"can't open the quarantine {path}: {error}; "
                "check that the folder is writable, the disk has room and the file is a quarantine"
            ) from error
        self._take_reserve()

    def _open(self) -> None:
        self._db = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=10
        )
        self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # of a new file; a discard frees disk
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA secure_delete=FAST")  # ON would write all of what is deleted
        self._db.executescript(_SCHEMA)
        self._opened = self._identity()

    # --- the file and its name ---

    def _identity(self) -> tuple[_FileId, _FileId]:
        """Which files the names mean: the database, and the log that commits go to first."""
        return _file_id(self.path), _file_id(Path(f"{self.path}-wal"))

    def _replaced(self) -> bool:
        """Whether what we write would be found by nobody; if so, the file of that name is open
        now, a new one if there is none."""
        if self._identity() == self._opened:
            return False
        log.warning(
            "the quarantine %s was moved, deleted or replaced while in use; "
            "going on with the file of that name (events in the old one are where it is now)",
            self.path,
        )
        self._forget_old_log()
        self._db.close()
        self._open()
        return True

    def _forget_old_log(self) -> None:
        """Our log must not be read as one of the file that has taken our name."""
        database, wal = self._identity()
        if database != self._opened[0] and wal == self._opened[1]:
            for suffix in ("-wal", "-shm"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    # --- the disk ---

    def _take_reserve(self) -> None:
        """As well as it goes: without it everything works but a discard on a full disk."""
        try:
            with self._reserve.open("ab") as stream:
                if stream.tell() < RESERVE:
                    os.posix_fallocate(stream.fileno(), 0, RESERVE)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                log.warning("no reserve beside the quarantine %s: %s", self.path, error)
            with contextlib.suppress(OSError):
                self._reserve.unlink(missing_ok=True)  # all or nothing: a part helps nobody

    def _give_up_reserve(self) -> bool:
        """Whether there was one to give up."""
        try:
            self._reserve.unlink()
        except OSError:
            return False
        return True

    # --- events ---

    def put(self, events: Sequence[Held]) -> None:
        """All or none, on disk when it returns. Raises QuarantineError."""
        try:
            self._replaced()
            self._insert(events)
            while self._replaced():  # meanwhile, and perhaps before the COMMIT
                self._insert(events)
        except (OSError, sqlite3.Error) as error:
            raise QuarantineError(f"can't write the quarantine {self.path}: {error}") from error

    def _insert(self, events: Sequence[Held]) -> None:
        with self._transaction():
            self._check_room(events)
            self._db.executemany(
                "INSERT INTO quarantine (at, route, sink, topic, reason, status, answer, "
                "attributes, content_type, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [_row(each) for each in events],
            )

    def _check_room(self, events: Sequence[Held]) -> None:
        wanted = sum(len(_attributes(each).encode()) + len(each.event.data) for each in events)
        if self.held_bytes() + wanted > self._bound:
            raise QuarantineError(
                f"the quarantine {self.path} is full ({self._bound} bytes); "
                "replay or discard events with `weir quarantine`"
            )

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)

    def held_bytes(self) -> int:
        return int(self._db.execute("SELECT bytes FROM held").fetchone()[0])

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM quarantine").fetchone()[0])

    def events(self, numbers: Sequence[int] = ()) -> Iterator[Held]:
        """Oldest first; `numbers`: only these. One row in memory at a time."""
        known = self._db.execute("SELECT number FROM quarantine ORDER BY number").fetchall()
        wanted = set(numbers)
        for (number,) in known:
            if wanted and number not in wanted:
                continue
            row = self._db.execute(
                f"SELECT {_COLUMNS} FROM quarantine WHERE number = ?", (number,)
            ).fetchone()
            if row is not None:  # else: another process took it meanwhile
                yield _held(row)

    def discard(self, numbers: Sequence[int]) -> int:
        """How many were there to discard. Raises QuarantineError, and then all are still there."""
        try:
            try:
                gone = self._delete(numbers)
            except sqlite3.Error as error:
                if not _disk_is_full(error) or not self._give_up_reserve():
                    raise
                gone = self._delete(numbers)
        except sqlite3.Error as error:
            raise QuarantineError(f"can't delete from {self.path}: {error}") from error
        finally:
            self._take_reserve()
        return gone

    def _delete(self, numbers: Sequence[int]) -> int:
        with self._transaction():
            gone = sum(
                self._db.execute("DELETE FROM quarantine WHERE number = ?", (each,)).rowcount
                for each in numbers
            )
        self._shrink()
        return gone

    def _shrink(self) -> None:
        """Give the freed pages back to the disk, piece by piece; whoever has no room for the log of
        a piece, or is not alone, keeps them for the next events."""
        with contextlib.suppress(sqlite3.Error):
            while True:
                before = self._db.execute("PRAGMA freelist_count").fetchone()[0]
                self._db.execute("PRAGMA incremental_vacuum(64)").fetchall()
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                if self._db.execute("PRAGMA freelist_count").fetchone()[0] in (0, before):
                    return

    def close(self) -> None:
        self._db.close()


class _Transaction:
    """BEGIN IMMEDIATE, so that two writers queue up instead of failing half-way."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:  # a COMMIT that failed may leave it open; SQLite ends it
                self._db.execute("ROLLBACK")  # by itself when the disk is full or broken


class QuarantineWriter:
    """`put` for an event loop: a thread of its own writes, many events in one commit."""

    def __init__(self, quarantine: Quarantine) -> None:
        self._quarantine = quarantine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quarantine")
        self._batch: list[tuple[Held, asyncio.Future[None]]] = []
        self._writing = False

    def put(self, event: Held) -> asyncio.Future[None]:
        """Done when the event is on disk; fails with QuarantineError."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._batch.append((event, done))
        if not self._writing:
            self._write()
        return done

    def _write(self) -> None:
        batch, self._batch = self._batch, []
        self._writing = bool(batch)
        if batch:
            loop = asyncio.get_running_loop()
            written = loop.run_in_executor(
                self._thread, self._quarantine.put, [event for event, _ in batch]
            )
            written.add_done_callback(lambda future: self._written(batch, future))

    def _written(
        self, batch: list[tuple[Held, asyncio.Future[None]]], future: asyncio.Future[None]
    ) -> None:
        error = future.exception()
        for _, done in batch:
            if done.done():
                continue
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
        self._write()

    def close(self) -> None:
        """Waits for the commit under way."""
        self._thread.shutdown(wait=True)
        self._quarantine.close()


def _disk_is_full(error: sqlite3.Error) -> bool:
    """SQLite says FULL, or for its shared memory only that it could not write."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest is detail
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


def _file_id(path: Path) -> _FileId:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _attributes(held: Held) -> str:
    return json.dumps(dict(held.event.attributes), ensure_ascii=True)


def _row(held: Held) -> tuple[object, ...]:
    event = held.event
    return (
        *(held.at, held.route, held.sink, _text(held.topic), _text(held.reason), held.status),
        *(held.answer[:LONGEST_ANSWER], _attributes(held), event.content_type, event.data),
    )


def _text(value: str) -> str:
    """SQLite takes no lone surrogates."""
    return value.encode("utf-8", "replace").decode()


def _held(row: tuple[object, ...]) -> Held:
    number, at, route, sink, topic, reason, status, answer, attributes, content_type, data = row
    return Held(
        at=float(str(at)),
        route=str(route),
        sink=str(sink),
        topic=str(topic),
        reason=str(reason),
        status=None if status is None else int(str(status)),
        answer=_bytes(answer),
        event=Event(
            _strings(json.loads(str(attributes))),
            _bytes(data),
            None if content_type is None else str(content_type),
        ),
        number=int(str(number)),
    )


def _bytes(value: object) -> bytes:
    assert isinstance(value, bytes)
    return value


def _strings(value: object) -> Mapping[str, str]:
    assert isinstance(value, dict)
    return {str(name): str(text) for name, text in value.items()}
