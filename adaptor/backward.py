"""The back direction: CloudEvents in by HTTP, out as MQTT messages, answered after the PUBACK.

So a Knative Trigger can command devices. The topic is a template over the event:

    {attr[subject]}     an attribute or extension of the event, with a default after |
    {json[/device]}     a value in its data, likewise

An answer tells the sender what to do, by Knative's delivery contract: 2xx means that the broker has
the message, 4xx that this event will never do, 503 that it should be sent again. A batch has the
answer of the event that fared worst. Nothing is kept here in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import cast

import httptools

from weir.adaptor.address import Broker
from weir.adaptor.broker import log
from weir.adaptor.events import Event, MalformedEvent
from weir.adaptor.httpbinding import events_from_http
from weir.adaptor.mqttbinding import Dialect
from weir.adaptor.publisher import AnyPublisher, NotPublished, Publisher5, Publisher311
from weir.adaptor.templates import Content, Template, TemplateError, User

LARGEST_EVENT = 1 << 20
"""Bytes of a request's body."""

AT_A_TIME = 64
"""Events of a batch that are on their way to the broker at once, in order."""

LARGEST_HEAD = 64 << 10
MOST_CONNECTIONS = 256
LONGEST_TOPIC = 65_535
IDLE = 60.0
"""Seconds that a connection may say nothing, or take for one request."""


def topic_template(text: str) -> Template:
    """Raises TemplateError."""
    template = Template.parse(text.replace("{attr[", "{user["), fewest_levels=0)
    if not template.parts or any(
        isinstance(part, str) and ("+" in part or "#" in part or "\0" in part)
        for part in template.parts
    ):
        raise TemplateError(f"`{text}` makes no topic to publish to; name one without wildcards")
    if "{user[" in text or any(getattr(part, "name", "") == "topic" for part in template.parts):
        raise TemplateError(
            f"`{text}`: here are {{attr[NAME]}} and {{json[/POINTER]}}; write one of those"
        )
    return template


def topic_of(template: Template, event: Event, broker: str) -> str:
    """Raises MalformedEvent when the event lacks what the topic needs, or would have it wrong."""
    content = Content(list(event.attributes.items()), event.data)
    topic = template.render("", broker, content)
    if topic is None:
        wanted = [f"the attribute {part.name}" for part in template.parts if isinstance(part, User)]
        raise MalformedEvent(
            "the event lacks what its topic is made of: "
            f"{', '.join(wanted) or 'a value in its data'}"
        )
    if not topic or any(each in topic for each in "+#\0"):
        raise MalformedEvent(f"`{topic}` is no topic: empty, or with + or # in it")
    if len(topic.encode("utf-8", "surrogatepass")) > LONGEST_TOPIC:
        raise MalformedEvent("the topic is longer than MQTT allows")
    if topic.startswith("$") and not template.text.startswith("$"):
        raise MalformedEvent(f"`{topic}` belongs to the broker itself")
    return topic


class Backward:
    """The server and the publisher. `run()` owns both."""

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        protocol: str,
        keep_alive: int,
        where: tuple[str, int],
        topic: Template,
        dialect: Dialect = "spec",
    ) -> None:
        """`protocol`: as of the sessions, 5 or 3.1.1 or auto."""
        self._broker, self._where, self._topic = broker, where, topic
        self._dialect = dialect
        self._publisher = AnyPublisher(broker, client_id, protocol, keep_alive)
        self._connections: set[_Connection] = set()
        self.published = self.refused = self.failed = 0
        self.port = 0

    @property
    def publisher(self) -> Publisher5 | Publisher311:
        """The session as it is now."""
        return self._publisher.session

    async def run(self, stop: asyncio.Event, seconds: float) -> None:
        """Until `stop` is set; then nothing new is taken, and what is under way gets `seconds`.
        Raises OSError when it can't listen, WrongVersion when the broker won't speak the asked."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(self), *self._where)
        self.port = server.sockets[0].getsockname()[1]
        publishing = asyncio.create_task(self._publisher.run())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((publishing, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            server.close()
            stopping.cancel()
            for connection in list(self._connections):
                connection.drain()
            answering = [each.answering for each in self._connections if each.answering is not None]
            if answering:
                await asyncio.wait(answering, timeout=seconds)
            for connection in list(self._connections):
                connection.close()
            await self._publisher.close()
            publishing.cancel()
            (end,) = await asyncio.gather(publishing, return_exceptions=True)
        if isinstance(end, Exception):
            raise end

    async def take(
        self, method: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, str]:
        """Status and text of the answer."""
        if method != b"POST":
            return 405, "POST a CloudEvent here"
        try:
            events = events_from_http(headers, body)
            topics = [topic_of(self._topic, each, self._broker.address) for each in events]
        except MalformedEvent as error:  # one is enough, and then none is published
            self.refused += 1
            return 400, str(error)
        status, text = 204, ""
        both = zip(topics, events, strict=True)
        while some := tuple(itertools.islice(both, AT_A_TIME)):
            for answer in await asyncio.gather(*(self._publish(*each) for each in some)):
                status, text = max((status, text), answer)
        return status, text

    async def _publish(self, topic: str, event: Event) -> tuple[int, str]:
        try:
            await self._publisher.publish(topic, event, dialect=self._dialect)
        except NotPublished as error:
            if error.for_good:
                self.refused += 1
                return 422, str(error)
            self.failed += 1
            return 503, str(error)
        self.published += 1
        return 204, ""

    def snapshot(self) -> dict[str, object]:
        publisher = self.publisher
        connected = f"MQTT {publisher.protocol}"
        return {
            "topic": self._topic.text,
            "connected": publisher.connected,
            "session": connected if publisher.connected else publisher.error or "connecting",
            "published": self.published,
            "refused": self.refused,
            "failed": self.failed,
        }

    # --- for connections ---

    def opened(self, connection: _Connection) -> bool:
        self._connections.add(connection)
        return len(self._connections) <= MOST_CONNECTIONS

    def closed(self, connection: _Connection) -> None:
        self._connections.discard(connection)


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection: a request at a time; the next is not read before the answer."""

    def __init__(self, backward: Backward) -> None:
        self._backward = backward
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._last = False
        self.answering: asyncio.Task[None] | None = None
        self._rest = b""
        self._reset()

    def _reset(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = bytearray()
        self._size = self._head = 0
        self._whole = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._backward.opened(self):
            self._answer(503, "too many connections", last=True)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._backward.closed(self)

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(IDLE, self.close)

    def data_received(self, data: bytes) -> None:
        if self._last and self.answering is None:
            return
        if self.answering is not None:
            self._rest += data  # no more than what was read before reading was paused
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._answer(400, "no upgrade is offered", last=True)
            return
        except httptools.HttpParserError as error:
            if self._whole:
                self._last = True  # a second request behind the first: that gets its answer alone
            elif not self._last:
                self._answer(400, f"not HTTP/1.1: {error}", last=True)
            return
        self._size += len(data)
        if not self._whole and self._size - len(self._body) > 2 * LARGEST_HEAD:
            self._too_long()  # a header without an end, or chunks of next to nothing

    def _too_long(self) -> None:
        if not self._last:
            self._answer(431, "the head is too long", last=True)

    # --- httptools ---

    def on_message_begin(self) -> None:
        if self._whole:
            raise ValueError("a second request before the first was answered")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head += len(name) + len(value)
        if self._head > LARGEST_HEAD:
            self._too_long()
        else:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if (b"expect", b"100-continue") in [(n, v.lower()) for n, v in self._headers]:
            assert self._transport is not None
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body += body
        if len(self._body) > LARGEST_EVENT and not self._last:
            self._answer(413, f"an event has at most {LARGEST_EVENT} bytes", last=True)

    def on_message_complete(self) -> None:
        if self._last:
            return
        assert self._transport is not None
        self._whole = True
        self._transport.pause_reading()
        self.answering = self._loop.create_task(
            self._take(self._parser.get_method(), self._parser.should_keep_alive())
        )

    async def _take(self, method: bytes, keep_alive: bool) -> None:
        try:
            status, text = await self._backward.take(method, self._headers, bytes(self._body))
        except Exception:  # noqa: BLE001 (whatever it was, the sender waits for an answer)
            log.exception("publishing an event failed in an unforeseen way")
            status, text = 500, "failed in an unforeseen way; see the log"
        self.answering = None
        self._answer(status, text, last=self._last or not keep_alive)
        if self._last or self._transport is None:
            return
        self._reset()
        self._wait()
        self._transport.resume_reading()
        if self._rest:
            rest, self._rest = self._rest, b""
            self.data_received(rest)

    def _answer(self, status: int, text: str, *, last: bool) -> None:
        body = f"{text}\n".encode("utf-8", "replace") if text else b""
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Refused')}"]
        if status != 204:
            lines += ["Content-Type: text/plain; charset=utf-8", f"Content-Length: {len(body)}"]
        if status == 503:
            lines.append("Retry-After: 1")
        if status == 405:
            lines.append("Allow: POST")
        if last:
            lines.append("Connection: close")
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write("\r\n".join([*lines, "", ""]).encode("ascii") + body)
            if last:
                self._last = True
                self._transport.close()

    def drain(self) -> None:
        """The answer under way is the last one."""
        self._last = True
        if self.answering is None:
            self.close()

    def close(self) -> None:
        if self._transport is not None:
            with contextlib.suppress(RuntimeError):
                self._transport.close()


_REASONS = {204: "No Content", 400: "Bad Request", 503: "Service Unavailable"}
