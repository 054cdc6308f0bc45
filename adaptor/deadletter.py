"""Dead letters: events that their sink does not take, handed on with the reason.

Knative's delivery contract says how: the event as it was, with `knativeerrordest`,
`knativeerrorcode` and `knativeerrordata` on it. A dead letter sink is retried like any other; when
it fails for good the caller puts the event into the quarantine, so nothing is ever without a place.
"""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Protocol

from weir.adaptor.events import Event
from weir.adaptor.httpbinding import encoded
from weir.adaptor.mqttbinding import Dialect
from weir.adaptor.publisher import NotPublished, Publisher
from weir.adaptor.quarantine import Held
from weir.adaptor.retry import Delivery, Verdict, judge, retry_after
from weir.adaptor.templates import Template
from weir.adaptor.topics import TopicFilter
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
    """A task per letter: letters are rare, and never more than the window of the session that they
    came by."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, event: Event, topic: str, delivery: Delivery) -> asyncio.Task[None]:
        """Ends when the letter has arrived, or raises Undeliverable. `topic`: of the message."""
        task = asyncio.get_running_loop().create_task(self._send(event, topic, delivery))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _send(self, event: Event, topic: str, delivery: Delivery) -> None:
        """As often as the route's delivery says."""
        for attempt in range(delivery.retry + 1):
            final, why, asked = await self._try(event, topic, delivery)
            if not why:
                return
            if final or attempt == delivery.retry:
                break
            await asyncio.sleep(delivery.backoff(attempt, asked))
        raise Undeliverable(why)

    async def _try(self, event: Event, topic: str, delivery: Delivery) -> tuple[bool, str, float]:
        """Whether trying again is no use, why it did not arrive ("" if it did), and the seconds
        that we are asked to wait."""
        raise NotImplementedError

    def stop(self) -> None:
        """What is under way is given up; its messages stay unacknowledged."""
        for task in list(self._tasks):
            task.cancel()


class LettersByHttp(DeadLetters):
    """To another sink."""

    def __init__(self, uri: str, request_line: bytes, caller: Caller) -> None:
        super().__init__()
        self._uri, self._request_line, self._caller = uri, request_line, caller

    async def _try(self, event: Event, topic: str, delivery: Delivery) -> tuple[bool, str, float]:
        lines, body = encoded(event, "binary")
        head = self._request_line + lines
        said = f"the dead letter sink {self._uri} does not take it: "
        try:
            response = await self._caller.request(head, body, delivery.timeout)
        except TransportError as error:
            return False, f"{said}{error}", 0.0
        verdict = judge(response.status)
        if verdict is Verdict.DELIVERED:
            return True, "", 0.0
        asked = retry_after(response.status, response.header(b"retry-after"), time.time())
        final = verdict is Verdict.REJECTED
        return final, f"{said}it answered {response.status}", asked


class LettersByMqtt(DeadLetters):
    """To a topic of the broker that the message came from; taken when the broker says so."""

    def __init__(
        self,
        template: Template,
        broker: str,
        taken: TopicFilter,
        publisher: Publisher,
        dialect: Dialect = "spec",
    ) -> None:
        """`broker`: for the template; `taken`: the route's filter, where no letter may go."""
        super().__init__()
        self._template, self._broker, self._taken = template, broker, taken
        self._publisher, self._dialect = publisher, dialect

    async def _try(self, event: Event, topic: str, delivery: Delivery) -> tuple[bool, str, float]:
        where = self._template.render(topic, self._broker)
        if not where or self._taken.matches(where):
            why = (
                "is none" if not where else "is taken by its own route, so it would go in a circle"
            )
            return True, f"the dead letter topic `{where}` {why}", 0.0
        try:
            await self._publisher.publish(where, event, dialect=self._dialect)
        except NotPublished as error:
            return error.for_good, f"the dead letter topic `{where}`: {error}", 0.0
        return True, "", 0.0
