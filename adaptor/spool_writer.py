"""The spool for an event loop: a thread that commits, as much as there is at a time.

Owns the order of writes (that of the calls), the room that each route has, and what happens when
there is none: a message that finds its route's share full waits, unacknowledged, until something of
the route has left. Nothing that was to be put is ever let go here. Knows nothing of messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from weir.adaptor.spool import Batch, Entry, Mark, Spool, SpoolError

log = logging.getLogger("weir.adaptor")

LAZY = 0.05
"""Seconds that removals wait for a commit to go with. Lost ones are delivered once more, with the
same id."""

AGAIN = 1.0
"""Seconds until a commit that failed is tried again."""

Done = Callable[[], None]
_Waiting = tuple[Entry, Mark | None, Done]


@dataclass(slots=True)
class Share:
    """What a route has in the spool. `bytes` counts what is on its way there, too; `blocked`: what
    has no room."""

    bound: int
    count: int = 0
    bytes: int = 0
    blocked: deque[_Waiting] = field(default_factory=deque)

    def has_room(self, size: int) -> bool:
        """One entry always has, or what is larger than the share would wait for ever."""
        return self.bytes + size <= self.bound or not self.bytes


class SpoolWriter:
    """`trouble`: why nothing can be written just now. `failed`: ends with a SpoolError when there
    is no use in going on."""

    def __init__(self, spool: Spool) -> None:
        """Raises SpoolError."""
        self._loop = asyncio.get_running_loop()
        self._spool = spool
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self._number = spool.highest()
        self._shares = {
            route: Share(bytes_, count, bytes_) for route, (count, bytes_) in spool.held().items()
        }
        self._batch, self._done = Batch(), list[Done]()
        self._leaving: list[Entry] = []
        self._writing = False
        self._planned: asyncio.Handle | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self.trouble: str | None = None
        self.failed: asyncio.Future[None] = self._loop.create_future()

    @property
    def path(self) -> str:
        return str(self._spool.path)

    def share(self, route: str, bound: int) -> Share:
        """The room of a route, from now on `bound` bytes."""
        share = self._shares.setdefault(route, Share(bound))
        share.bound = bound
        self._admit(share)
        return share

    def strangers(self, known: set[str]) -> dict[str, int]:
        """Routes with entries that are not among those known, and how many."""
        return {
            route: share.count
            for route, share in self._shares.items()
            if share.count and route not in known
        }

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def marks(self, session: str) -> list[Mark]:
        """What is committed by now. Raises SpoolError."""
        return self._spool.marks(session)

    # --- in ---

    def put(self, entry: Entry, mark: Mark | None, done: Done) -> None:
        """`done` is called when both are as safe as they are going to be."""
        share = self._shares[entry.route]
        if share.blocked or not share.has_room(entry.size):
            share.blocked.append((entry, mark, done))
        else:
            self._put(share, entry, mark, done)

    def _put(self, share: Share, entry: Entry, mark: Mark | None, done: Done) -> None:
        share.count += 1
        share.bytes += entry.size
        self._batch.entries.append(entry)
        if mark is not None:
            self._batch.marks.append(mark)
        self._done.append(done)
        self._soon()

    def _admit(self, share: Share) -> None:
        while share.blocked and share.has_room(share.blocked[0][0].size):
            self._put(share, *share.blocked.popleft())

    def remove(self, entry: Entry) -> None:
        """Its event needs it no more."""
        self._batch.removed.append(entry.number)
        self._leaving.append(entry)
        if self._planned is None and not self._writing:
            self._planned = self._loop.call_later(LAZY, self._write)

    def unmark(self, session: str, packet_id: int, done: Done | None) -> None:
        self._batch.unmarked.append((session, packet_id))
        if done is not None:
            self._done.append(done)
            self._soon()
        elif self._planned is None and not self._writing:
            self._planned = self._loop.call_later(LAZY, self._write)

    def end(self, session: str) -> None:
        """All marks of the session go."""
        self._batch.ended.append(session)
        self._soon()

    # --- commits ---

    def _soon(self) -> None:
        """At the end of this turn of the loop, with all that it brings."""
        if self._writing or self.trouble is not None:
            return
        if isinstance(self._planned, asyncio.TimerHandle):
            self._planned.cancel()
            self._planned = None
        if self._planned is None:
            self._planned = self._loop.call_soon(self._write)

    def _write(self) -> None:
        self._planned = None
        if self._writing or not self._batch or self.failed.done():
            return
        batch, self._batch = self._batch, Batch()
        done, self._done = self._done, []
        leaving, self._leaving = self._leaving, []
        self._writing = True
        written = self._loop.run_in_executor(self._thread, self._spool.write, batch)
        written.add_done_callback(lambda end: self._written(batch, done, leaving, end))

    def _written(
        self, batch: Batch, done: list[Done], leaving: list[Entry], end: asyncio.Future[None]
    ) -> None:
        self._writing = False
        error = end.exception()
        if error is None:
            self._settled(done, leaving)
        elif isinstance(error, SpoolError):
            self._fail(error)
        else:
            self._keep_for_later(batch, done, leaving, error)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        if self._batch and self.trouble is None:
            self._soon()

    def _settled(self, done: list[Done], leaving: list[Entry]) -> None:
        if self.trouble is not None:
            log.warning("the spool %s is written again", self._spool.path)
            self.trouble = None
        for each in done:
            each()
        for entry in leaving:
            share = self._shares[entry.route]
            share.count -= 1
            share.bytes -= entry.size
            self._admit(share)

    def _keep_for_later(
        self, batch: Batch, done: list[Done], leaving: list[Entry], error: BaseException
    ) -> None:
        if self.trouble is None:
            log.error("%s; messages for it stay unacknowledged", error)
        self.trouble = str(error)
        newer, self._batch = self._batch, batch
        self._batch.ended += newer.ended
        self._batch.unmarked += newer.unmarked
        self._batch.removed += newer.removed
        self._batch.entries += newer.entries
        self._batch.marks += newer.marks
        self._done, self._leaving = done + self._done, leaving + self._leaving
        if self._planned is not None:
            self._planned.cancel()
        self._planned = self._loop.call_later(AGAIN, self._write)

    def _fail(self, error: SpoolError) -> None:
        if not self.failed.done():
            log.error("%s", error)
            self.failed.set_exception(error)
            self.failed.exception()

    def damaged(self, error: ValueError, number: int) -> None:
        """An entry can't be read; nobody but people can decide on that."""
        advice = f"stop all adaptors that use it and `weir spool discard {number}`"
        self._fail(SpoolError(f"the spool {self.path} is damaged: {error}; {advice}"))

    # --- out ---

    async def load(self, route: str, after: int, limit: int, most: int) -> list[Entry]:
        """See Spool.load; sees everything whose `done` was called before. Empty when the spool has
        failed."""
        try:
            return await self._loop.run_in_executor(
                self._thread, self._spool.load, route, after, limit, most
            )
        except SpoolError as error:
            self._fail(error)
            return []

    def snapshot(self) -> dict[str, object]:
        shares = self._shares.values()
        return {
            "path": self.path,
            "trouble": self.trouble,
            "events": sum(share.count for share in shares),
            "bytes": sum(share.bytes for share in shares),
        }

    # --- the end ---

    async def flush(self) -> None:
        """Until all that was put is safe, or can't be by now."""
        while (self._batch or self._writing) and self.trouble is None and not self.failed.done():
            if not self._writing:
                self._soon()
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter

    async def close(self) -> None:
        await self.flush()
        if self._planned is not None:
            self._planned.cancel()
        await self._loop.run_in_executor(self._thread, self._spool.close)
        self._thread.shutdown()
