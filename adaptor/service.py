"""The adaptor as a whole: one lane per sink, started together, stopped without losing anything.

A lane is a session, a pipeline and a client. Acknowledgements have to follow the order of arrival
and share one window per session, so a sink that is slow or dead must have a session of its own:
then it fills only its own window.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from weir.adaptor import sinks, tracecontext
from weir.adaptor.backward import Backward
from weir.adaptor.batches import Batcher
from weir.adaptor.broker import (
    Broker,
    BrokerError,
    Session,
    SessionSettings,
    Silence,
    Subscription,
    WrongVersion,
    end_session,
    log,
)
from weir.adaptor.deadletter import Caller, DeadLetters, LettersByHttp, LettersByMqtt
from weir.adaptor.delivery import Pipeline
from weir.adaptor.endpoints import FUNCTION
from weir.adaptor.knative import Environment
from weir.adaptor.mapping import Mapper
from weir.adaptor.outgoing import Flow
from weir.adaptor.publisher import AnyPublisher
from weir.adaptor.quarantine import BOUND, Quarantine, QuarantineWriter
from weir.adaptor.replies import Replies
from weir.adaptor.routes import Route
from weir.adaptor.session import Session5
from weir.adaptor.session311 import Session311
from weir.adaptor.subscriptions import others
from weir.adaptor.templates import Template
from weir.proxy.policy.histogram import Latencies
from weir.proxy.wire.status import serve_status

if TYPE_CHECKING:
    from weir.adaptor.tracing import Tracing

Protocol = Literal["5", "3.1.1", "auto"]

LETTER_CONNECTIONS = 4
"""To a dead letter sink."""

HIGHEST_NUMBER = 268_435_455
"""Of an MQTT 5 subscription identifier."""


@dataclass(frozen=True, slots=True)
class AdaptorConfig:
    """`client_id` is a prefix, different for every adaptor on a broker, the same after a restart.
    `function_url`: where the sink `function` is. `stop_within`: seconds for what is in flight.
    `http`: where to serve metrics and health. `listen`: where to take events to be published under
    `listen_topic`."""

    broker: str | Broker | None
    routes: tuple[Route, ...]
    quarantine: Path
    client_id: str = "weir"
    protocol: Protocol = "auto"
    receive_maximum: int = 256
    keep_alive: int = 30
    session_expiry: int = 7 * 24 * 3600
    function_url: str | None = None
    quarantine_bound: int = BOUND
    status: Path | None = None
    http: tuple[str, int] | None = None
    listen: tuple[str, int] | None = None
    listen_topic: Template | None = None
    stop_within: float = 10.0

    knative: Environment = field(default_factory=Environment)
    clean_start: bool = False
    end_unused_sessions: bool = False

    @property
    def address(self) -> Broker:
        """Of what names no broker of its own. Raises ValueError."""
        if self.broker is None:
            raise ValueError("a broker is missing: name it with --broker, or in each route")
        return self.broker if isinstance(self.broker, Broker) else Broker.parse(self.broker)

    def broker_of(self, route: Route) -> Broker:
        """Raises ValueError."""
        return route.broker or self.address

    @property
    def state(self) -> Path:
        """The folder of what must survive a restart."""
        return self.quarantine.parent


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
        tracing: Tracing | None = None,
    ) -> None:
        """Raises ValueError (RoutesError) when broker or sink make no sense."""
        self.sink = sink
        self.url = sinks.resolve(sink, config.function_url)
        self._config = config
        self._broker = broker
        routes = [
            route
            for route in config.routes
            if route.sink == sink and config.broker_of(route) == broker
        ]
        numbers = subscription_numbers(routes)
        self._publisher: AnyPublisher | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._letterboxes: dict[str, tuple[DeadLetters, sinks.SinkClient]] = {}
        target = sinks.Target.parse(self.url)
        self.client = sinks.SinkClient(
            sink, target, routes[0].access, ca_certs=config.knative.ca_certs
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
        self.session = self._new_session(Session311 if config.protocol == "3.1.1" else Session5)

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
        for flow in self.flows:
            flow.mapper.sniff = kind is Session311
        self.pipeline.skip_retained = kind is Session311 and "never" in retained.values()
        return session

    @property
    def broker(self) -> str:
        return str(self._broker)

    async def run(self) -> None:
        """Until `stop()`. Raises WrongVersion when the broker can't speak what was asked for.

        `auto`: 5 first; a broker that refuses it gets 3.1.1, and one that is silent gets the two
        in turn until it says something.
        """
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
        """Deliver what was received, acknowledge it, leave. What is not delivered by then is not
        acknowledged, so the broker keeps it."""
        self.session.stop_reading()
        await self.pipeline.drain(seconds)
        self.pipeline.stop()
        await self.session.close()
        if self._publisher is not None and self._publishing is not None:
            await self._publisher.close()
            self._publishing.cancel()
            await asyncio.gather(self._publishing, return_exceptions=True)
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


class Adaptor:
    """All lanes. Must be made inside a running event loop."""

    def __init__(self, config: AdaptorConfig) -> None:
        """Raises ValueError (RoutesError) or QuarantineError."""
        self._config = config
        self.draining = False
        self._tracing = tracecontext.start()
        self._keeper = QuarantineWriter(Quarantine(config.quarantine, config.quarantine_bound))
        wanted = dict.fromkeys((config.broker_of(route), route.sink) for route in config.routes)
        self.lanes = tuple(Lane(config, *each, self._keeper, self._tracing) for each in wanted)
        self.backward: Backward | None = None
        if config.listen is not None and config.listen_topic is not None:
            self.backward = Backward(
                *(config.address, f"{config.client_id}-listen-{os.getpid()}", config.protocol),
                *(config.keep_alive, config.listen, config.listen_topic),
            )

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set or the task is cancelled; then everything is put away in order."""
        for broker in dict.fromkeys(self._config.broker_of(each) for each in self._config.routes):
            await self._look_after_unused_sessions(broker)
        tasks = [asyncio.create_task(lane.run(), name=lane.sink) for lane in self.lanes]
        ending = asyncio.Event()
        if self.backward is not None:
            running = self.backward.run(ending, self._config.stop_within)
            tasks.append(asyncio.create_task(running, name="listen"))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((*tasks, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            self.draining = True
            ending.set()
            await asyncio.gather(*(lane.stop(self._config.stop_within) for lane in self.lanes))
            for task in tasks:
                if task.get_name() != "listen":
                    task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            self._keeper.close()
            if self._tracing is not None:
                await self._tracing.close()
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _look_after_unused_sessions(self, broker: Broker) -> None:
        """A sink that left the routes leaves a session that goes on collecting. Only on request is
        it ended: another adaptor may use it, or the sink may come back for what is queued."""
        config = self._config
        held = [
            lane.session.settings.client_id for lane in self.lanes if lane.broker == str(broker)
        ]
        for known in others(config.state, str(broker), config.client_id, held):
            if not config.end_unused_sessions:
                log.warning(
                    "the broker %s still queues messages for the session %s, which no route uses "
                    "any more; --end-unused-sessions ends it and lets them go",
                    *(known.broker, known.client_id),
                )
                continue
            kind = Session311 if known.protocol == "3.1.1" else Session5
            settings = SessionSettings(known.client_id, expiry=0, clean_start=True)
            try:
                await end_session(
                    kind(broker, settings, (), lambda message, ticket: None, config.state)
                )
            except BrokerError as error:
                log.warning("can't end the unused session %s: %s", known.client_id, error)
            else:
                log.info("ended the unused session %s", known.client_id)

    def _brokers(self) -> list[str]:
        """All that are in use."""
        named = [] if self.backward is None else [str(self._config.address)]
        return list(dict.fromkeys([*(lane.broker for lane in self.lanes), *named]))

    def snapshot(self) -> dict[str, object]:
        flows = [(lane, flow) for lane in self.lanes for flow in lane.flows]
        latency = Latencies.merged(flow.counters.latency.snapshot() for _, flow in flows)
        return {
            "broker": ", ".join(self._brokers()),
            "quarantine": str(self._config.quarantine),
            "latency": {"p50": latency.quantile(0.5), "p99": latency.quantile(0.99)},
            "routes": [
                {
                    "name": flow.route.name,
                    "filter": flow.route.filter.text,
                    "broker": lane.broker,
                    "sink": lane.sink,
                    **flow.counters.snapshot(),
                }
                for lane, flow in flows
            ],
            "sinks": [lane.snapshot() for lane in self.lanes],
            "listen": None if self.backward is None else self.backward.snapshot(),
        }


async def serve(config: AdaptorConfig, stop: asyncio.Event | None = None) -> None:
    """Run an adaptor until `stop` is set or we are cancelled, with its status socket if wanted."""
    async with contextlib.AsyncExitStack() as undo:
        adaptor = Adaptor(config)
        if config.status is not None:
            path = config.status
            undo.callback(path.unlink, missing_ok=True)
            undo.callback((await serve_status(path, adaptor.snapshot)).close)
        if config.http is not None:
            from weir.adaptor.operations import serve_operations

            undo.callback((await serve_operations(adaptor, *config.http)).close)
        await adaptor.run(stop or asyncio.Event())


def client_id(prefix: str, sink: str) -> str:
    """The same for the same sink for ever: the broker keeps the session under it."""
    if sink == FUNCTION:
        return f"{prefix}-{sink}"
    return f"{prefix}-{hashlib.sha256(sink.encode()).hexdigest()[:12]}"


def subscription_numbers(routes: Sequence[Route]) -> dict[str, int]:
    """An identifier for each filter, made of its text, so that it outlives changes of the file."""
    numbers: dict[str, int] = {}
    for text in dict.fromkeys(route.filter.text for route in routes):
        number = zlib.crc32(text.encode()) % HIGHEST_NUMBER + 1
        while number in numbers.values():
            number = number % HIGHEST_NUMBER + 1
        numbers[text] = number
    return numbers
