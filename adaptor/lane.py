"""One sink and all that belongs to it: its session, pipeline and client, and its routes at work.

Acknowledgements have to follow the order of arrival and share one window per session, so a sink
that is slow or dead must have a session of its own: then it fills only its own window. Composes;
what is composed has the rules.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from weir.adaptor import sinks
from weir.adaptor.batches import Batcher
from weir.adaptor.broker import (
    Broker,
    Session,
    SessionSettings,
    Silence,
    Subscription,
    WrongVersion,
    log,
)
from weir.adaptor.config import AdaptorConfig
from weir.adaptor.deadletter import Caller, DeadLetters, LettersByHttp, LettersByMqtt
from weir.adaptor.delivery import Pipeline
from weir.adaptor.endpoints import FUNCTION
from weir.adaptor.feed import Feed
from weir.adaptor.journal import Journal
from weir.adaptor.mapping import Mapper
from weir.adaptor.outgoing import Flow
from weir.adaptor.publisher import AnyPublisher
from weir.adaptor.quarantine import QuarantineWriter
from weir.adaptor.replies import Replies
from weir.adaptor.routes import Route
from weir.adaptor.session import Session5
from weir.adaptor.session311 import Session311
from weir.adaptor.spool_writer import SpoolWriter

if TYPE_CHECKING:
    from weir.adaptor.tracing import Tracing

LETTER_CONNECTIONS = 4
"""To a dead letter sink."""

HIGHEST_NUMBER = 268_435_455
"""Of an MQTT 5 subscription identifier."""


class Lane:
    """One sink with the routes that lead to it from one broker."""

    session: Session
    pipeline: Pipeline
    client: sinks.SinkClient
    flows: tuple[Flow, ...]

    def __init__(
        self,
        config: AdaptorConfig,
        broker: Broker,
        sink: str,
        keeper: QuarantineWriter,
        store: SpoolWriter | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`store`: the spool, which must be there if a route wants it. Raises ValueError
        (RoutesError) when broker or sink make no sense."""
        self.sink = sink
        self.url = sinks.resolve(sink, config.function_url)
        self._config = config
        self._broker = broker
        self.routes = routes = routes_of(config, broker, sink)
        numbers = subscription_numbers(routes)
        self._publisher: AnyPublisher | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._letterboxes: dict[str, tuple[DeadLetters, sinks.SinkClient]] = {}
        target = sinks.Target.parse(self.url)
        knative = config.knative
        self.client = sinks.SinkClient(
            *(sink, target, routes[0].access),
            ca_certs=knative.ca_certs,
            audience=knative.audience if sink == knative.sink else None,
        )
        direct = self.client.http if routes[0].access.token is None else self.client
        self.flows = tuple(
            self._flow(route, numbers[route.filter.text], direct, keeper) for route in routes
        )
        in_batches = any(flow.batcher is not None for flow in self.flows)
        new_pipeline = Pipeline if tracing is None else tracing.pipeline
        self.pipeline = new_pipeline(
            *(sink, target.request_line, direct, keeper, self.flows),
            limit=max(sinks.CONNECTIONS, config.receive_maximum * in_batches),
            url=self.url,
        )
        self._store = store
        self.journal: Journal | None = None
        if store is not None:
            name = f"{client_id(config.client_id, sink)}@{broker}"
            self.journal = Journal(name, store, store.marks(name))
            self._feed(self.flows, store, self.journal)
        self.session = self._new_session(Session311 if config.protocol == "3.1.1" else Session5)

    def goes_on(self, routes: tuple[Route, ...]) -> bool:
        """Whether it can serve these as it is; if all that has changed is the sink's pods, they are
        changed in it."""
        if routes == self.routes:
            return True
        listed = self.client.listed
        pods = routes[0].access.pods if routes else ()
        if listed is None or not pods or _without_pods(routes) != _without_pods(self.routes):
            return False
        listed.change(pods)
        self.routes = routes
        return True

    def _flow(self, route: Route, number: int, caller: Caller, keeper: QuarantineWriter) -> Flow:
        config, address = self._config, self._broker.address
        mapper = Mapper(route, address, config.knative.extensions)
        flow = Flow(route, mapper, number, letters=self._letters(route))
        batch = route.sending.batch
        if batch is not None:  # no more than the window can ever be gathered
            events = min(batch.events, config.receive_maximum)
            flow.batcher = Batcher(replace(batch, events=events), caller)
        if route.sending.reply is not None:
            publisher, letters = self._to_publish(), flow.letters
            flow.replies = Replies(route, flow.counters, address, publisher, keeper, letters)
        return flow

    def _feed(self, flows: Sequence[Flow], store: SpoolWriter, journal: Journal) -> None:
        for flow in flows:
            spooling = flow.route.keeping.spool
            if spooling is not None:
                flow.feed = Feed(flow, spooling, store, journal, self.pipeline)

    def _to_publish(self) -> AnyPublisher:
        """What letters and replies go by."""
        if self._publisher is None:
            config = self._config
            name = f"{client_id(config.client_id, self.sink)}-publish-{os.getpid()}"
            self._publisher = AnyPublisher(self._broker, name, config.protocol, config.keep_alive)
        return self._publisher

    def _letters(self, route: Route) -> DeadLetters | None:
        """The dead letter sink of a route; routes with the same URL share it."""
        wanted = route.dead_letter
        if wanted is None:
            return None
        if wanted.topic is not None:
            where = wanted.topic, self._broker.address, route.filter
            return LettersByMqtt(*where, self._to_publish(), route.sending.dialect)
        uri, access = wanted.uri, wanted.access
        assert uri is not None
        if uri not in self._letterboxes:
            target, certs = sinks.Target.parse(uri), self._config.knative.ca_certs
            client = sinks.SinkClient(uri, target, access, LETTER_CONNECTIONS, ca_certs=certs)
            self._letterboxes[uri] = LettersByHttp(uri, target.request_line, client), client
        return self._letterboxes[uri][0]

    def _new_session(self, kind: type[Session5 | Session311]) -> Session:
        qos: dict[str, int] = {}
        for flow in self.flows:
            text = flow.route.filter.text
            qos[text] = max(flow.route.qos, qos.get(text, 0))
        retained = {flow.route.filter.text: flow.route.retained for flow in self.flows}
        numbers = {flow.route.filter.text: flow.number for flow in self.flows}
        session = kind(
            self._broker,
            SessionSettings(
                client_id(self._config.client_id, self.sink),
                self._config.receive_maximum,
                self._config.keep_alive,
                self._config.session_expiry,
                clean_start=self._config.clean_start,
            ),
            [Subscription(text, qos[text], numbers[text], retained[text]) for text in qos],
            self.pipeline.receive,
            self._config.state,
        )
        self.pipeline.settle = session.settle
        session.journal = self.pipeline.journal = self.journal
        for flow in self.flows:
            flow.mapper.sniff = kind is Session311
        self.pipeline.skip_retained = kind is Session311 and "never" in retained.values()
        return session

    @property
    def key(self) -> tuple[Broker, str]:
        """There is one lane of each."""
        return self._broker, self.sink

    @property
    def broker(self) -> str:
        return str(self._broker)

    async def run(self) -> None:
        """Until `stop()`. Raises WrongVersion when the broker can't speak what was asked for.

        `auto`: 5 first; a broker that refuses it gets 3.1.1, and one that is silent gets the two
        in turn until it says something.
        """
        self.pipeline.start()
        if self._publisher is not None:
            self._publishing = asyncio.create_task(self._publisher.run())
        tentative = self._config.protocol == "auto"
        kinds: Iterator[type[Session5 | Session311]] = itertools.cycle((Session311, Session5))
        while True:
            try:
                return await self.session.run(tentative=tentative)
            except (WrongVersion, Silence) as error:
                kind = next(kinds)
                if not tentative or (isinstance(error, WrongVersion) and kind is Session5):
                    raise
                log.warning("%s Trying MQTT %s.", error, kind.protocol)
            self.session = self._new_session(kind)

    async def stop(self, seconds: float) -> None:
        """Deliver what was received, acknowledge it, leave. What is not delivered by then is in the
        spool, or is not acknowledged, so the broker keeps it."""
        self.session.stop_reading()
        if self._store is not None:
            await self._store.flush()
        await self.pipeline.drain(seconds)
        self.pipeline.stop()
        await self.session.close()
        if self._publisher is not None and self._publishing is not None:
            await self._publisher.close()
            self._publishing.cancel()
            await asyncio.gather(self._publishing, return_exceptions=True)
        await self.discard()

    async def discard(self) -> None:
        """Of a lane that never ran there is no more to stop."""
        for client in (self.client, *(client for _, client in self._letterboxes.values())):
            await client.close()

    def oldest_unacknowledged(self) -> float:
        """Its age in seconds, 0.0 if there is none."""
        oldest = self.session.oldest
        return 0.0 if oldest is None else max(0.0, time.time() - oldest)

    def snapshot(self) -> dict[str, object]:
        session, client = self.session, self.client.http
        connected = f"MQTT {session.protocol}"
        return {
            "name": self.sink,
            "broker": self.broker,
            "url": self.url,
            **self.pipeline.snapshot(),
            "path": client.path,
            "pods": self.client.pods(),
            "direct_requests": client.direct_requests,
            "relayed_requests": client.relayed_requests,
            "connected": session.connected,
            "session": connected if session.connected else session.error or "connecting",
            "session_since": session.since,
            "client_id": session.settings.client_id,
            "reconnects": session.reconnects,
            "refused_subscriptions": dict(session.refused),
            "oldest_unacknowledged": self.oldest_unacknowledged(),
            "window": {"used": session.unacknowledged, "of": session.settings.receive_maximum},
        }


def client_id(prefix: str, sink: str) -> str:
    """The same for the same sink for ever: the broker keeps the session under it."""
    if sink == FUNCTION:
        return f"{prefix}-{sink}"
    return f"{prefix}-{hashlib.sha256(sink.encode()).hexdigest()[:12]}"


def routes_of(config: AdaptorConfig, broker: Broker, sink: str) -> tuple[Route, ...]:
    """Those that lead from the broker to the sink."""
    return tuple(
        route for route in config.routes if (config.broker_of(route), route.sink) == (broker, sink)
    )


def subscription_numbers(routes: Sequence[Route]) -> dict[str, int]:
    """An identifier for each filter, made of its text, so that it outlives changes of the file."""
    numbers: dict[str, int] = {}
    for text in dict.fromkeys(route.filter.text for route in routes):
        number = zlib.crc32(text.encode()) % HIGHEST_NUMBER + 1
        while number in numbers.values():
            number = number % HIGHEST_NUMBER + 1
        numbers[text] = number
    return numbers


def _without_pods(routes: tuple[Route, ...]) -> list[Route]:
    return [replace(route, access=replace(route.access, pods=())) for route in routes]
