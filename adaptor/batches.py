"""Events of one route gathered into batches, each event told what became of it.

Stands where the sink's client stands and looks like it to the pipeline: the request of one event
goes in, a future of its answer comes out. So retries, backoff, acknowledgement and dead letters
stay what they are for single events: an event whose batch failed is tried again by its own count,
and is settled by the answer that it got itself.

A batch that is refused for what is in it is halved and sent again, at once and as often as it
takes, until the event at fault has its refusal to itself. Knows nothing of MQTT or of events.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial

from weir.adaptor.deadletter import Caller
from weir.adaptor.retry import Verdict, judge
from weir.adaptor.sending import Batch
from weir.proxy.wire.client import Response

TOO_LARGE = 413
SMALLEST_LIMIT = 64 << 10
"""Bytes that every receiver of CloudEvents should take; no 413 makes batches smaller than that."""

_OF_ALL = (401, 403, 405, 407, 410, 415)
"""Refusals that would meet every part of the batch alike."""


def to_be_halved(status: int) -> bool:
    """Whether smaller batches might fare better."""
    return judge(status) is Verdict.REJECTED and 400 <= status <= 499 and status not in _OF_ALL


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    head: bytes
    event: bytes
    timeout: float
    answer: asyncio.Future[Response]


class Batcher:
    """`request` is a client's."""

    def __init__(self, limits: Batch, caller: Caller) -> None:
        self._loop = asyncio.get_running_loop()
        self._limits, self._caller = limits, caller
        self._most_bytes = limits.bytes
        self._gathered: list[_Member] = []
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._hurried = False
        self.batches = 0
        """Requests made."""

    def request(self, head: bytes, body: bytes, timeout: float) -> asyncio.Future[Response]:
        """`body`: a batch of one event. `timeout` counts from when its batch goes out."""
        answer: asyncio.Future[Response] = self._loop.create_future()
        member = _Member(head, body[1:-1], timeout, answer)
        size = len(member.event) + 1  # and the bracket or comma
        if self._gathered and self._bytes + size + 1 > self._most_bytes:
            self._send_gathered()
        self._gathered.append(member)
        self._bytes += size
        full = len(self._gathered) >= self._limits.events or self._bytes >= self._most_bytes
        if full or self._hurried:
            self._send_gathered()
        elif self._timer is None:
            self._timer = self._loop.call_later(self._limits.age, self._send_gathered)
        return answer

    def hurry(self) -> None:
        """We are about to stop: nothing waits for company any more."""
        self._hurried = True
        if self._gathered:
            self._send_gathered()

    def _send_gathered(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        members, self._gathered, self._bytes = self._gathered, [], 0
        self._send(members)

    def _send(self, members: list[_Member]) -> None:
        self.batches += 1
        body = b"[%s]" % b",".join([each.event for each in members])
        sent = self._caller.request(members[0].head, body, members[0].timeout)
        sent.add_done_callback(partial(self._answered, members, len(body)))

    def _answered(self, members: list[_Member], size: int, sent: asyncio.Future[Response]) -> None:
        if not sent.cancelled() and sent.exception() is None:
            status = sent.result().status
            if status == TOO_LARGE:
                self._most_bytes = min(self._most_bytes, max(size // 2, SMALLEST_LIMIT))
            if len(members) > 1 and to_be_halved(status):
                middle = (len(members) + 1) // 2
                self._send(members[:middle])
                self._send(members[middle:])
                return
        for each in members:
            _tell(each.answer, sent)


def _tell(answer: asyncio.Future[Response], sent: asyncio.Future[Response]) -> None:
    if answer.done():
        return
    if sent.cancelled():
        answer.cancel()
    elif (error := sent.exception()) is not None:
        answer.set_exception(error)
    else:
        answer.set_result(sent.result())
