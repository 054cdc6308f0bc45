"""The quarantine: events that no retry can deliver, safe on disk until someone decides.

One SQLite file in WAL mode with synchronous=FULL: when `put` returns, the event survives a power
cut, so its message may be acknowledged. Bounded by bytes of data; a full quarantine refuses, and
the caller keeps the message unacknowledged. Several processes may open the file: the adaptor writes
while a command lists, replays or discards. Knows nothing of MQTT, sinks or policies.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weir.adaptor.events import Event

BOUND = 256 << 20
"""Bytes of data and attributes together, unless told otherwise."""

LONGEST_ANSWER = 1024
"""Bytes of the sink's answer that are kept, as for Knative's dead letters."""

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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=10
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise QuarantineError(
                f"can't open the quarantine {path}: {error}; "
                "check that the folder is writable and the file is a quarantine"
            ) from error

    def put(self, events: Sequence[Held]) -> None:
        """All or none, on disk when it returns. Raises QuarantineError."""
        try:
            with self._transaction():
                self._check_room(events)
                self._db.executemany(
                    "INSERT INTO quarantine (at, route, sink, topic, reason, status, answer, "
                    "attributes, content_type, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [_row(each) for each in events],
                )
        except sqlite3.Error as error:
            raise QuarantineError(f"can't write the quarantine {self.path}: {error}") from error

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
            with self._transaction():
                return sum(
                    self._db.execute("DELETE FROM quarantine WHERE number = ?", (each,)).rowcount
                    for each in numbers
                )
        except sqlite3.Error as error:
            raise QuarantineError(f"can't delete from {self.path}: {error}") from error

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
