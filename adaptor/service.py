"""The adaptor as a whole: one lane per sink, started together, stopped without losing anything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import replace
from typing import Any

from weir.adaptor import tracecontext
from weir.adaptor.backward import Backward
from weir.adaptor.broker import Broker, BrokerError, SessionSettings, end_session, log
from weir.adaptor.config import AdaptorConfig as AdaptorConfig
from weir.adaptor.lane import Lane as Lane
from weir.adaptor.lane import client_id as client_id
from weir.adaptor.lane import routes_of
from weir.adaptor.quarantine import Quarantine, QuarantineWriter
from weir.adaptor.routes import load
from weir.adaptor.session import Session5
from weir.adaptor.session311 import Session311
from weir.adaptor.spool import Spool, SpoolError
from weir.adaptor.spool_writer import SpoolWriter
from weir.adaptor.subscriptions import others
from weir.adaptor.watch import EVERY, Watch
from weir.proxy.policy.histogram import Latencies
from weir.proxy.wire.status import serve_status


class Adaptor:
    """All lanes. Must be made inside a running event loop."""

    def __init__(self, config: AdaptorConfig) -> None:
        """Raises ValueError (RoutesError), QuarantineError or SpoolError."""
        self._config = config
        self.draining = False
        self.reloaded: float | None = None
        self.stale: str | None = None
        """Why the routes file, as it is now, is not what we run."""
        self._tracing = tracecontext.start()
        self._keeper = QuarantineWriter(Quarantine(config.quarantine, config.quarantine_bound))
        self.store: SpoolWriter | None = None
        self._open_spool()
        self.lanes = tuple(self._new_lane(config, key) for key in _keys(config))
        self.backward: Backward | None = None
        if config.listen is not None and config.listen_topic is not None:
            self.backward = Backward(
                *(config.address, f"{config.client_id}-listen-{os.getpid()}", config.protocol),
                *(config.keep_alive, config.listen, config.listen_topic),
                config.listen_dialect,
            )

    def _new_lane(self, config: AdaptorConfig, key: tuple[Broker, str]) -> Lane:
        return Lane(config, *key, self._keeper, self.store, self._tracing)

    def _open_spool(self) -> None:
        """If a route wants one, or if there is one, which may hold something."""
        config = self._config
        spooling = [route for route in config.routes if route.keeping.spool is not None]
        if self.store is None:
            if not spooling and not config.spool_file.exists():
                return
            try:
                self.store = SpoolWriter(Spool(config.spool_file, config.spool_sync))
            except SpoolError as error:
                if spooling:
                    raise
                log.warning("not looked whether anything is left in it: %s", error)
                return
        store = self.store
        for route, count in store.strangers({route.name for route in spooling}).items():
            log.warning(
                "%d events lie in the spool %s for the route `%s`, which the routes file does not "
                "have, or not with a spool: they stay until it is back, or `weir spool discard`",
                *(count, store.path, route),
            )

    async def run(self, stop: asyncio.Event, reload: asyncio.Event | None = None) -> None:
        """Until `stop` is set or the task is cancelled; then everything is put away in order.
        `reload`: set it to have the routes file read again."""
        await self._look_after_unused_sessions()
        tasks = {lane: asyncio.create_task(lane.run()) for lane in self.lanes}
        ending = asyncio.Event()
        listening: list[asyncio.Task[None]] = []
        if self.backward is not None:
            running = self.backward.run(ending, self._config.stop_within)
            listening.append(asyncio.create_task(running))
        stopping = asyncio.create_task(stop.wait())
        asked = reload or asyncio.Event()
        watching = asyncio.create_task(self._watch(asked))
        try:
            while await self._asked_to_reload(asked, [*tasks.values(), *listening, stopping]):
                reloading = asyncio.create_task(self._reload(tasks))
                await asyncio.wait((reloading, stopping), return_when=asyncio.FIRST_COMPLETED)
                reloading.cancel()  # no effect if it is through
                await asyncio.gather(reloading, return_exceptions=True)
                if not reloading.cancelled():
                    reloading.result()
        finally:
            stopping.cancel()
            watching.cancel()
            self.draining = True
            ending.set()
            await asyncio.gather(*(lane.stop(self._config.stop_within) for lane in self.lanes))
            for task in tasks.values():
                task.cancel()
            results = await asyncio.gather(*tasks.values(), *listening, return_exceptions=True)
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

    # --- reload ---

    async def _watch(self, asked: asyncio.Event) -> None:
        """Another file is reason enough."""
        if self._config.routes_file is None:
            return
        watch = Watch(self._config.routes_file)
        while True:
            await asyncio.sleep(EVERY)
            if watch.changed():
                asked.set()

    async def _asked_to_reload(self, asked: asyncio.Event, ends: list[asyncio.Task[Any]]) -> bool:
        """Waits. False: one of `ends` has come, or the spool's."""
        asking = asyncio.create_task(asked.wait())
        broken = [] if self.store is None else [self.store.failed]
        everything: list[asyncio.Future[Any]] = [*ends, *broken, asking]
        try:
            await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asking.cancel()
        if any(each.done() for each in (*ends, *broken)):
            return False
        asked.clear()
        return True

    async def _reload(self, tasks: dict[Lane, asyncio.Task[None]]) -> None:
        """All of the new file or nothing of it. Lanes whose routes are the same go on undisturbed;
        the others stop as at an end of the adaptor, and begin anew: what was not delivered is with
        the broker, or in the spool."""
        old = self._config
        try:
            wanted = await self._read_again()
        except (ValueError, SpoolError) as error:
            self._config, self.stale = old, str(error)
            log.error("the routes go on as they were: %s", error)
            return
        kept = [lane for lane in self.lanes if lane.goes_on(routes_of(self._config, *lane.key))]
        leaving = [lane for lane in self.lanes if lane not in kept]
        await asyncio.gather(*(lane.stop(old.stop_within) for lane in leaving))
        for lane in leaving:
            tasks[lane].cancel()
        await asyncio.gather(*(tasks.pop(lane) for lane in leaving), return_exceptions=True)
        if self.store is not None:
            await self.store.flush()
        have = {lane.key: lane for lane in kept}
        self.lanes = tuple(have.get(key) or self._new_lane(self._config, key) for key in wanted)
        for lane in self.lanes:
            if lane not in tasks:
                tasks[lane] = asyncio.create_task(lane.run())
        self.reloaded, self.stale = time.time(), None
        log.info(
            "the routes were read again: %d lanes new, %d gone on",
            *(len(self.lanes) - len(kept), len(kept)),
        )
        await self._look_after_unused_sessions()

    async def _read_again(self) -> tuple[tuple[Broker, str], ...]:
        """What lanes there have to be. Raises ValueError (RoutesError) or SpoolError, and is sure
        of everything before anything is stopped."""
        file = self._config.routes_file
        if file is None:
            raise ValueError("the routes came from no file that could be read again")
        self._config = replace(self._config, routes=load(file, self._config.knative.sink))
        keys = _keys(self._config)
        self._open_spool()
        for key in keys:  # all that can be wrong with them shows when they are made
            await Lane(self._config, *key, self._keeper).discard()
        return keys

    # --- sessions that nobody uses ---

    async def _look_after_unused_sessions(self) -> None:
        for broker in dict.fromkeys(self._config.broker_of(each) for each in self._config.routes):
            await self._look_after_unused_sessions_of(broker)

    async def _look_after_unused_sessions_of(self, broker: Broker) -> None:
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
            "reloaded": self.reloaded,
            "stale": self.stale,
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


def _keys(config: AdaptorConfig) -> tuple[tuple[Broker, str], ...]:
    """Of the lanes that the routes need. Raises ValueError."""
    return tuple(dict.fromkeys((config.broker_of(route), route.sink) for route in config.routes))


async def serve(
    config: AdaptorConfig,
    stop: asyncio.Event | None = None,
    reload: asyncio.Event | None = None,
) -> None:
    """Run an adaptor until `stop` is set or we are cancelled, with its status socket if wanted.
    `reload`: see Adaptor.run."""
    async with contextlib.AsyncExitStack() as undo:
        adaptor = Adaptor(config)
        if config.status is not None:
            path = config.status
            undo.callback(path.unlink, missing_ok=True)
            undo.callback((await serve_status(path, adaptor.snapshot)).close)
        if config.http is not None:
            from weir.adaptor.operations import serve_operations

            undo.callback((await serve_operations(adaptor, *config.http)).close)
        await adaptor.run(stop or asyncio.Event(), reload)
