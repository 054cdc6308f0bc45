"""The adaptor as a whole: one lane per sink, started together, stopped without losing anything."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

from weir.adaptor import tracecontext
from weir.adaptor.backward import Backward
from weir.adaptor.broker import Broker, BrokerError, SessionSettings, end_session, log
from weir.adaptor.config import AdaptorConfig as AdaptorConfig
from weir.adaptor.lane import Lane as Lane
from weir.adaptor.lane import client_id as client_id
from weir.adaptor.quarantine import Quarantine, QuarantineWriter
from weir.adaptor.session import Session5
from weir.adaptor.session311 import Session311
from weir.adaptor.spool import Spool
from weir.adaptor.spool_writer import SpoolWriter
from weir.adaptor.subscriptions import others
from weir.proxy.policy.histogram import Latencies
from weir.proxy.wire.status import serve_status


class Adaptor:
    """All lanes. Must be made inside a running event loop."""

    def __init__(self, config: AdaptorConfig) -> None:
        """Raises ValueError (RoutesError), QuarantineError or SpoolError."""
        self._config = config
        self.draining = False
        self._tracing = tracecontext.start()
        self._keeper = QuarantineWriter(Quarantine(config.quarantine, config.quarantine_bound))
        self.store = self._open_spool()
        wanted = dict.fromkeys((config.broker_of(route), route.sink) for route in config.routes)
        self.lanes = tuple(
            Lane(config, *each, self._keeper, self.store, self._tracing) for each in wanted
        )
        self.backward: Backward | None = None
        if config.listen is not None and config.listen_topic is not None:
            self.backward = Backward(
                *(config.address, f"{config.client_id}-listen-{os.getpid()}", config.protocol),
                *(config.keep_alive, config.listen, config.listen_topic),
                config.listen_dialect,
            )

    def _open_spool(self) -> SpoolWriter | None:
        """If a route wants one, or if there is one, which may hold something."""
        config = self._config
        spooling = [route for route in config.routes if route.keeping.spool is not None]
        if not spooling and not config.spool_file.exists():
            return None
        store = SpoolWriter(Spool(config.spool_file, config.spool_sync))
        for route, count in store.strangers({route.name for route in spooling}).items():
            log.warning(
                "%d events lie in the spool %s for the route `%s`, which the routes file does not "
                "have, or not with a spool: they stay until it is back, or `weir spool discard`",
                *(count, store.path, route),
            )
        return store

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
        ends: list[asyncio.Future[Any]] = [*tasks, stopping]
        if self.store is not None:
            ends.append(self.store.failed)
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            self.draining = True
            ending.set()
            await asyncio.gather(*(lane.stop(self._config.stop_within) for lane in self.lanes))
            for task in tasks:
                if task.get_name() != "listen":
                    task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self._keeper.close()
            if self.store is not None:
                await self.store.close()
            if self._tracing is not None:
                await self._tracing.close()
        for result in results:
            if isinstance(result, Exception):
                raise result
        if self.store is not None and self.store.failed.done():
            self.store.failed.result()

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
                    "spool": None if flow.feed is None else flow.feed.snapshot(),
                }
                for lane, flow in flows
            ],
            "spool": None if self.store is None else self.store.snapshot(),
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
