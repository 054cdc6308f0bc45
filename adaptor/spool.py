"""The spool: messages on disk from their acknowledgement until their events are delivered.

One SQLite file in WAL mode. An entry holds a message as it came (the PUBLISH packet) and the id
that its event got, so whatever delivers it, now or after a restart, makes the same event of it.
Beside the entries stands the journal: which packet ids of which session are in here and may come
again.

Synchronous; whoever calls it from an event loop does so in a thread, one at a time. Owns the file,
its lock and what is said when the file is no good. Knows nothing of routes beyond their names, of
bounds, of brokers or sinks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mqtt5 import PublishPacket, read

Sync = Literal["commit", "checkpoint"]
"""When the disk must have it: `commit`, before a message is acknowledged, so that it survives a
power cut; `checkpoint`, now and then: it survives the end of the process, however sudden, only."""

APPLICATION, VERSION = 0x77656972, 1  # "weir"

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
CREATE TABLE IF NOT EXISTS spool (
    number INTEGER PRIMARY KEY,
    route TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    at REAL NOT NULL,
    event_id TEXT NOT NULL,
    packet BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS spool_by_route ON spool (route, number, bytes);
CREATE TABLE IF NOT EXISTS journal (
    session TEXT NOT NULL,
    packet_id INTEGER NOT NULL,
    route TEXT NOT NULL,
    digest BLOB NOT NULL,
    exactly INTEGER NOT NULL,
    PRIMARY KEY (session, packet_id, route)
) STRICT, WITHOUT ROWID;
"""

LOG_PAGES = 4000
"""Of 4 KiB that the log takes before they are brought into the file. Most of what is written is
removed soon; the longer the log, the less of it ever gets there."""

ROWS = (64, 16, 4, 1)
"""Of one INSERT: a few statements that SQLite keeps prepared, for any number of rows."""

OVERHEAD = 150
"""Bytes of an entry besides its packet, about."""


class SpoolError(Exception):
    """The file can't be used; str() names it and says what to do."""


class SpoolTrouble(Exception):
    """What was to be written is not on disk, and may be later: str() says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """`number`: in order of arrival, over all routes. `at`: when the message was received, seconds
    since the epoch. `packet`: the PUBLISH packet of MQTT 5, whatever version it came by."""

    number: int
    route: str
    at: float
    event_id: str
    packet: bytes

    @property
    def size(self) -> int:
        return len(self.packet) + OVERHEAD

    def message(self) -> PublishPacket:
        """Raises ValueError when it is none: SQLite notices no flipped bit in what it holds."""
        try:
            packet, _ = read(memoryview(self.packet))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the codec panics on a topic not in UTF-8
            raise ValueError(f"entry {self.number} is no message: {error}") from error
        if not isinstance(packet, PublishPacket):
            raise ValueError(f"entry {self.number} is no message")
        return packet


@dataclass(frozen=True, slots=True)
class Mark:
    """A line of the journal: the message with this packet id of this session is in the spool, for
    this route. `digest`: of the message, because packet ids are used again; `exactly`: at QoS 2."""

    session: str
    packet_id: int
    route: str
    digest: bytes
    exactly: bool


@dataclass(slots=True)
class Batch:
    """What one commit does, in this order."""

    ended: list[str] = field(default_factory=list)
    """Sessions that are no more."""
    unmarked: list[tuple[str, int]] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.entries or self.marks or self.removed or self.unmarked or self.ended)


class Spool:
    """The file. One process at a time has it, which a lock beside it sees to."""

    def __init__(self, path: Path, sync: Sync = "commit") -> None:
        """Raises SpoolError."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.with_name(path.name + "-lock").open("a+")
        except OSError as error:
            raise SpoolError(f"can't open the spool {path}: {error}; name another one") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise SpoolError(
                f"the spool {path} is in use by another adaptor; "
                "stop that one, or give each a file of its own (--spool)"
            ) from error
        try:
            self._open(sync)
        except (OSError, sqlite3.Error) as error:
            self._lock.close()
            raise self._unusable(error) from error
        except SpoolError:
            self._lock.close()
            raise

    def _open(self, sync: Sync) -> None:
        self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self._check_kind()
        self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # of a new file
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")
        self._db.execute(f"PRAGMA synchronous={'FULL' if sync == 'commit' else 'NORMAL'}")
        self._db.executescript(_SCHEMA)
        self._opened = self._identity()

    def _check_kind(self) -> None:
        application, version, tables = (
            self._db.execute(question).fetchone()[0]
            for question in (
                *("PRAGMA application_id", "PRAGMA user_version"),
                "SELECT count(*) FROM sqlite_schema",
            )
        )
        if tables and (application, version) != (APPLICATION, VERSION):
            self._db.close()
            raise SpoolError(
                f"{self.path} is no spool of this version of Weir; name another file (--spool), or "
                "let the version that wrote it deliver what is in it"
            )

    def _unusable(self, error: Exception) -> SpoolError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            path = self.path
            return SpoolError(
                f"the spool {path} is damaged: {error}; move it away together with {path}-wal and "
                f"start again; `sqlite3 {path} .recover` may find what it held"
            )
        return SpoolError(
            f"can't use the spool {self.path}: {error}; "
            "check that the folder is writable and the disk has room"
        )

    def _identity(self) -> tuple[tuple[int, int], ...]:
        """Which files the names mean: the database, and the log that commits go to first."""
        found = [each.stat() for each in (self.path, Path(f"{self.path}-wal"))]
        return tuple((each.st_dev, each.st_ino) for each in found)

    def _check_place(self) -> None:
        """What goes into a file without a name is gone with the process."""
        try:
            if self._identity() == self._opened:
                return
        except FileNotFoundError:
            pass
        raise SpoolError(
            f"the spool {self.path} was moved, deleted or replaced while in use; "
            "put it back, together with its -wal, or start again with a new one"
        )

    # --- in ---

    def write(self, batch: Batch) -> None:
        """All of it or none, and as safe as `sync` says when it returns; only removals may happen
        without the rest. Raises SpoolTrouble, or SpoolError when trying again is no use."""
        try:
            self._check_place()
            try:
                self._apply(batch)
            except sqlite3.OperationalError:  # a full disk? removing makes room in the file
                self._apply(Batch(removed=batch.removed))
                self._apply(batch)
            self._check_place()
        except (OSError, sqlite3.Error) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._unusable(error) from error
            raise SpoolTrouble(f"can't write the spool {self.path}: {error}") from error

    def _apply(self, batch: Batch) -> None:
        """In as few statements as possible: each gives up the interpreter's lock, and waits for an
        event loop that is busy to get it back."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for session in batch.ended:
                self._db.execute("DELETE FROM journal WHERE session = ?", (session,))
            for session in dict(batch.unmarked):
                self._delete(
                    "journal WHERE session = ? AND packet_id",
                    *([each for of, each in batch.unmarked if of == session], session),
                )
            if batch.removed:
                self._delete("spool WHERE number", batch.removed)
            self._insert("INSERT INTO spool", [_row(each) for each in batch.entries])
            self._insert(
                "INSERT OR REPLACE INTO journal",
                [(m.session, m.packet_id, m.route, m.digest, m.exactly) for m in batch.marks],
            )
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:  # of some failures SQLite ends it by itself
                self._db.execute("ROLLBACK")

    def _delete(self, where: str, numbers: list[int], *before: str) -> None:
        among = f"DELETE FROM {where} IN (SELECT value FROM json_each(?))"
        self._db.execute(among, (*before, json.dumps(numbers)))

    def _insert(self, into: str, rows: list[tuple[object, ...]]) -> None:
        at = 0
        for size in ROWS:
            while len(rows) - at >= size:
                row = f"({', '.join('?' * len(rows[at]))})"
                values = [value for each in rows[at : at + size] for value in each]
                self._db.execute(f"{into} VALUES {', '.join([row] * size)}", values)
                at += size

    # --- out ---

    def load(self, route: str, after: int, limit: int, most: int) -> list[Entry]:
        """The next entries of a route: `limit` of them, fewer when they have more than `most`
        bytes, but at least one. Raises SpoolError."""
        found: list[Entry] = []
        size = 0
        try:
            rows = self._db.execute(
                "SELECT number, route, at, event_id, packet FROM spool "
                "WHERE route = ? AND number > ? ORDER BY number LIMIT ?",
                (route, after, limit),
            )
            for row in rows:
                found.append(Entry(*row))
                size += found[-1].size
                if size >= most:
                    break
            rows.close()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        return found

    def held(self) -> dict[str, tuple[int, int]]:
        """Entries and bytes of each route. Raises SpoolError, as do the next two."""
        question = "SELECT route, count(*), sum(bytes) FROM spool GROUP BY route"
        return {route: (count, size) for route, count, size in self._ask(question)}

    def highest(self) -> int:
        """The number of the newest entry; 0 if there is none."""
        return int(self._ask("SELECT coalesce(max(number), 0) FROM spool")[0][0])

    def marks(self, session: str) -> list[Mark]:
        question = "SELECT packet_id, route, digest, exactly FROM journal WHERE session = ?"
        try:
            with contextlib.closing(
                sqlite3.connect(self.path)
            ) as db:  # while another thread writes
                rows = db.execute(question, (session,)).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        return [
            Mark(session, packet_id, route, noted, bool(exactly))
            for packet_id, route, noted, exactly in rows
        ]

    def discard(self, numbers: Sequence[int]) -> int:
        """How many of them were there."""
        before = self._ask("SELECT count(*) FROM spool")[0][0]
        self.write(Batch(removed=list(numbers)))
        return int(before - self._ask("SELECT count(*) FROM spool")[0][0])

    def _ask(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(question, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def close(self) -> None:
        """Gives freed pages back to the disk, as far as that goes."""
        with contextlib.suppress(sqlite3.Error):
            self._db.execute(f"PRAGMA incremental_vacuum({LOG_PAGES})").fetchall()
        self._db.close()
        self._lock.close()


def entries(path: Path) -> Iterator[Entry]:
    """All of them, oldest first, also while an adaptor uses the file. Raises SpoolError."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        ) as db:
            db.execute("PRAGMA query_only=1")
            for row in db.execute(
                "SELECT number, route, at, event_id, packet FROM spool ORDER BY number"
            ):
                yield Entry(*row)
    except sqlite3.Error as error:
        raise SpoolError(f"can't read the spool {path}: {error}") from error


def _row(entry: Entry) -> tuple[object, ...]:
    text = _text(entry.event_id)
    return entry.number, entry.route, entry.size, entry.at, text, entry.packet


def _text(value: str) -> str:
    """SQLite takes no lone surrogates."""
    return value.encode("utf-8", "replace").decode()
