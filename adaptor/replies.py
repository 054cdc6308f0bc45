"""What a sink answers with an event of its own: a reply, published where the message asked for it.

A request says `Prefer: reply` when there is somewhere to reply to: the response topic of the
message (MQTT 5) or the topic of the route. A 200 with a CloudEvent in it is a reply then; 202 and
any other status never are. The message is acknowledged only after the broker has the reply, so a
crash in between leads to delivery again, and to another reply, never to none.

A reply that the broker does not take now is tried until it does. One that it never will take, or
that has nowhere to go, goes the way of the route's events that can't be delivered: to the dead
letter sink, to the quarantine, or with `onFailure: drop` to nobody, each with a word in the log. So
does one that ends the connection time and again, as a 3.1.1 broker refuses; those that were under
way with it are published one by one from then on, to see which it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Protocol

from mqtt5 import PublishPacket

from weir.adaptor.counters import RouteCounters
from weir.adaptor.deadletter import DeadLetters, Undeliverable, letter
from weir.adaptor.events import Event, shown
from weir.adaptor.httpbinding import from_http, mode_of
from weir.adaptor.publisher import NotPublished, Publisher
from weir.adaptor.quarantine import Held, QuarantineError
from weir.adaptor.routes import Route
from weir.adaptor.templates import Content
from weir.proxy.wire.client import Response

log = logging.getLogger("weir.adaptor")


BEST_EFFORT = 64
"""Replies of a route under way, past which those to QoS 0 messages are let go: no window bounds
them."""


class Keeper(Protocol):
    """Puts events where they survive; the future is done when they do."""

    def put(self, event: Held) -> asyncio.Future[None]: ...


class NoTopic(ValueError):
    """A reply has nowhere to go; str() says why."""


def topic_of(route: Route, message: PublishPacket, broker: str) -> str:
    """Where the reply to this message goes. Raises NoTopic."""
    reply, topic = route.sending.reply, message.response_topic
    assert reply is not None
    if topic:
        if not reply.allow.matches(topic):
            raise NoTopic(f"the response topic `{shown(topic)}` is not in what `allow` allows")
    elif reply.topic is not None:
        content = Content(message.user_properties, message.payload)
        topic = reply.topic.render(message.topic, broker, content)
    if not topic or topic.startswith("$") or any(each in topic for each in "+#\0"):
        raise NoTopic(f"`{shown(topic or '')}` is no topic to publish to")
    if route.filter.matches(topic):
        raise NoTopic(
            f"the topic `{shown(topic)}` is taken by its own route, so it would go in a circle"
        )
    return topic


def read(response: Response) -> Event | None:
    """The event that a 200 carries, if it carries one. Raises MalformedEvent when it means to and
    does not."""
    if response.status != 200 or mode_of(response.headers) is None:
        return None
    return from_http(response.headers, response.body)


class Replies:
    """Of one route that wants them. A task per reply; never more than the session's window."""

    def __init__(
        self,
        route: Route,
        counters: RouteCounters,
        broker: str,
        publisher: Publisher,
        keeper: Keeper,
        letters: DeadLetters | None,
    ) -> None:
        """`broker`: for the template."""
        self._route, self._counters, self._broker = route, counters, broker
        self._publisher, self._keeper, self._letters = publisher, keeper, letters
        self._tasks: set[asyncio.Task[None]] = set()
        self._suspects = asyncio.Lock()
        self.waiting: str | None = None
        """Why replies can't be published at the moment."""

    def welcome(self, message: PublishPacket) -> bool:
        reply = self._route.sending.reply
        return reply is not None and reply.welcome(message.response_topic)

    def has_room(self, *, firm: bool) -> bool:
        """Whether one more reply may wait; of an event that is not `firm` (QoS 0) the reply is let
        go and counted when there is none."""
        if firm or len(self._tasks) < BEST_EFFORT:
            return True
        if not self._counters.unreplied:
            log.warning("replies of route %s to QoS 0 messages are let go", self._route.name)
        self._counters.unreplied += 1
        return False

    def send(self, message: PublishPacket, event: Event) -> asyncio.Task[None]:
        """Done when the reply is with the broker, or has gone the other way; cancelled by
        `stop()`, and then the message must stay unacknowledged."""
        task = asyncio.get_running_loop().create_task(self._send(message, event))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _send(self, message: PublishPacket, event: Event) -> None:
        try:
            topic = topic_of(self._route, message, self._broker)
        except NoTopic as error:
            await self._put_aside(message.response_topic or "", event, str(error))
            return
        attempt = losses = 0
        while True:
            try:
                async with self._suspects if losses else contextlib.nullcontext():
                    await self._publisher.publish(
                        topic,
                        event,
                        dialect=self._route.sending.dialect,
                        correlation=message.correlation_data,
                    )
            except NotPublished as error:
                losses += error.lost
                if error.for_good or losses > self._route.delivery.retry:
                    await self._put_aside(topic, event, str(error))
                    return
                self._wait_for(str(error))
            else:
                self.waiting = None
                self._counters.replied += 1
                return
            await asyncio.sleep(self._route.delivery.probe(attempt))
            attempt += 1

    def _wait_for(self, why: str) -> None:
        if self.waiting is None:
            log.error("replies of route %s wait: %s", self._route.name, why)
        self.waiting = why

    async def _put_aside(self, topic: str, event: Event, reason: str) -> None:
        self._counters.unreplied += 1
        name, reason = self._route.name, f"the reply can't be published: {reason}"
        log.error("route %s: %s; onFailure takes it", name, reason)
        if self._route.on_failure == "drop":
            return
        held = Held(time.time(), name, f"mqtt:{topic}", topic, reason, None, b"", event)
        if self._route.on_failure == "deadLetter" and self._letters is not None:
            try:
                await self._letters.send(letter(held, f"mqtt:{topic}"), topic, self._route.delivery)
            except Undeliverable as error:
                log.warning("a reply of route %s goes to the quarantine: %s", name, error)
            else:
                return
        await self._quarantine(held)

    async def _quarantine(self, held: Held) -> None:
        attempt = 0
        while True:
            try:
                await self._keeper.put(held)
            except QuarantineError as error:
                self._wait_for(str(error))
            else:
                self.waiting = None
                return
            await asyncio.sleep(self._route.delivery.probe(attempt))
            attempt += 1

    def stop(self) -> None:
        """What is under way is given up; its messages stay unacknowledged."""
        for task in list(self._tasks):
            task.cancel()
