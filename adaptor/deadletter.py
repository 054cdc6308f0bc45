"""Dead letters: events that their sink does not take, handed to another one with the reason.

Knative's delivery contract says how: the event as it was, with `knativeerrordest`,
`knativeerrorcode` and `knativeerrordata` on it. A dead letter sink is retried like any other; when
it fails for good the caller puts the event into the quarantine, so nothing is ever without a place.
"""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Protocol

from weir.adaptor.events import Event, http_headers
from weir.adaptor.quarantine import Held
from weir.adaptor.retry import Delivery, Verdict, judge, retry_after
from weir.proxy.wire.client import Response, TransportError

LONGEST_DATA = 1024
"""Characters of knativeerrordata, as in Knative."""


class Undeliverable(Exception):
    """The dead letter sink does not take it; str() says why."""


class Caller(Protocol):
    def request(self, head: bytes, body: bytes, timeout: float) -> asyncio.Future[Response]: ...


def letter(held: Held, destination: str) -> Event:
    """The event with what happened to it. `destination`: the URL that did not take it."""
    attributes = dict(held.event.attributes)
    attributes["knativeerrordest"] = destination
    if held.status is not None:
        attributes["knativeerrorcode"] = str(held.status)
    if held.answer:
        data = base64.b64encode(held.answer).decode("ascii")
        attributes["knativeerrordata"] = data[:LONGEST_DATA]
    return Event(attributes, held.event.data, held.event.content_type)


class DeadLetters:
    """One dead letter sink. A task per letter: letters are rare, and never more than the window of
    the session that they came by."""

    def __init__(self, uri: str, request_line: bytes, caller: Caller) -> None:
        self._uri, self._request_line, self._caller = uri, request_line, caller
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, event: Event, delivery: Delivery) -> asyncio.Task[None]:
        """Ends when the sink has taken it, or raises Undeliverable."""
        task = asyncio.get_running_loop().create_task(self._send(event, delivery))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _send(self, event: Event, delivery: Delivery) -> None:
        head = self._request_line + http_headers(event)
        for attempt in range(delivery.retry + 1):
            asked = 0.0
            try:
                response = await self._caller.request(head, event.data, delivery.timeout)
            except TransportError as error:
                why = str(error)
            else:
                verdict, why = judge(response.status), f"it answered {response.status}"
                if verdict is Verdict.DELIVERED:
                    return
                if verdict is Verdict.REJECTED:
                    break
                value = response.header(b"retry-after")
                asked = retry_after(response.status, value, time.time())
            if attempt < delivery.retry:
                await asyncio.sleep(delivery.backoff(attempt, asked))
        raise Undeliverable(f"the dead letter sink {self._uri} does not take it: {why}")

    def stop(self) -> None:
        """What is under way is given up; its messages stay unacknowledged."""
        for task in list(self._tasks):
            task.cancel()
