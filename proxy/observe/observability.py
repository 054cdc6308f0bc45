"""Everything that watches a sidecar's requests, put together from its settings.

Owns which observers there are, what the metrics port shows, and their start and end. What can't
be had (a package that is not there, a template that can't be parsed) is said in the log, once, and
left out: better a pod without its traces than none.

Whatever is not asked for is not even imported.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from weir.proxy import contract
from weir.proxy.environment import SidecarSettings
from weir.proxy.exchange import Observer
from weir.proxy.observe.failures import FailureLog
from weir.proxy.policy.deadlines import Timeouts

if TYPE_CHECKING:
    from weir.proxy.observe.instruments import Cell, Family, Labels, Value

log = logging.getLogger("weir.observe")


class Observability:
    """`observers` for the relay; `render` the page of 9091, None if there is none; `families` what
    is on it, `labels` what all of that has."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self.render: Callable[[], bytes] | None = None
        self.families: list[Family[Cell] | Family[Value]] = []
        self.labels: Labels = ()
        self._starts: list[Callable[[], None]] = []
        self._stops: list[Callable[[], object]] = []
        self._flushes: list[Callable[[float], Awaitable[None]]] = []

    async def start(self) -> None:
        """Start what has a thread of its own."""
        for start in self._starts:
            start()

    async def stop(self, seconds: float = contract.FLUSH_SECONDS) -> None:
        """Flush everything, for so long at most (contract section 6)."""
        until = time.monotonic() + seconds
        stops = [_in_thread(stop) for stop in self._stops]
        for flush in self._flushes:
            await flush(max(until - time.monotonic(), 0.0))
        if stops:
            _, late = await asyncio.wait(stops, timeout=max(until - time.monotonic(), 0.0))
            if late:
                log.warning("metrics or traces could not be flushed within %gs", seconds)


def observers_for(
    settings: SidecarSettings, *, in_line: Callable[[], int] = lambda: 0
) -> Observability:
    """What these settings ask for. `in_line` is the relay's: running and waiting requests."""
    made = Observability()
    made.observers.append(
        FailureLog(
            Timeouts.of(settings.revision),
            f"{settings.revision.user_host}:{settings.revision.user_port}",
        )
    )
    _metrics(made, settings, in_line)
    traced = _tracing(made, settings)
    if settings.observability.request_log.enabled:
        _request_log(made, settings, traced)
    return made


def _metrics(made: Observability, settings: SidecarSettings, in_line: Callable[[], int]) -> None:
    wanted = settings.observability.request_metrics
    current = settings.observability.names == "current"
    if wanted.protocol == "prometheus":
        _prometheus(made, settings, in_line, current)
    elif current and wanted.protocol in ("grpc", "http/protobuf"):
        _push(made, settings, in_line)
    elif wanted.protocol != "none":
        log.warning("no metrics: the backend %s is not supported", wanted.protocol)


def _prometheus(
    made: Observability, settings: SidecarSettings, in_line: Callable[[], int], current: bool
) -> None:
    revision = settings.revision
    lines: Callable[[], list[str]]
    if current:
        from weir.proxy.observe.identity import target_info
        from weir.proxy.observe.metrics import RequestMetrics

        recorded = RequestMetrics(revision.user_port, revision.container_concurrency, in_line)
        made.observers.append(recorded)
        made.families = recorded.families
        info = target_info(settings)
        lines = lambda: recorded.lines() + info  # noqa: E731
    else:
        from weir.proxy.observe.opencensus import RevisionMetrics

        before = RevisionMetrics(revision, in_line)
        made.observers.append(before)
        made.families, made.labels = before.families, before.common
        lines = before.lines
    made.render = lambda: "\n".join([*lines(), ""]).encode("utf-8", "replace")


def _push(made: Observability, settings: SidecarSettings, in_line: Callable[[], int]) -> None:
    wanted = settings.observability.request_metrics
    try:
        from weir.proxy.observe import push
        from weir.proxy.observe.identity import attributes
        from weir.proxy.observe.metrics import RequestMetrics

        export = push.exporter(wanted.protocol, wanted.endpoint)
    except ImportError as error:
        log.error("no metrics: %s", _missing(error))  # noqa: TRY400
        return
    except ValueError as error:
        log.error("no metrics: the endpoint %s can't be used: %s", wanted.endpoint, error)  # noqa: TRY400
        return
    revision = settings.revision
    recorded = RequestMetrics(revision.user_port, revision.container_concurrency, in_line)
    made.observers.append(recorded)
    pusher = push.Pusher(recorded, export, attributes(settings), push.interval(wanted.interval))
    made._starts.append(pusher.start)
    made._stops.append(pusher.stop)


def _tracing(made: Observability, settings: SidecarSettings) -> bool:
    """Are header fields replaced?"""
    wanted = settings.observability.tracing
    if wanted.protocol == "none":
        return False
    if wanted.protocol not in ("stdout", "grpc", "http/protobuf", "zipkin"):
        log.warning("no traces: the backend %s is not supported", wanted.protocol)
        return False
    revision = settings.revision
    try:
        from weir.proxy.observe import tracing
        from weir.proxy.observe.identity import attributes

        tracer = tracing.RequestTracer(
            wanted,
            tracing.exporter(wanted, settings.observability.service_name),
            attributes(settings),
            f"{revision.user_host}:{revision.user_port}",
            bool(revision.container_concurrency),
        )
    except ImportError as error:
        log.error("no traces: %s", _missing(error))  # noqa: TRY400
        return False
    except ValueError as error:
        log.error("no traces: the endpoint %s can't be used: %s", wanted.endpoint, error)  # noqa: TRY400
        return False
    made.observers.append(tracer)
    made._stops.append(tracer.provider.shutdown)
    return True


def _request_log(made: Observability, settings: SidecarSettings, traced: bool) -> None:
    from weir.proxy.observe.govalues import TemplateError
    from weir.proxy.observe.lines import Lines
    from weir.proxy.observe.requestlog import RequestLog

    if not settings.observability.request_log.template:
        return
    lines = Lines(sys.stdout.fileno(), "request log")
    try:
        request_log = RequestLog(settings, lines.say, traced=traced)
    except TemplateError as error:
        log.error("no request log: its template can't be parsed: %s", error)  # noqa: TRY400
        return
    made.observers.insert(0, request_log)  # it sees header fields before they are replaced

    async def flush(seconds: float) -> None:
        request_log.write()
        await lines.flush(seconds)

    made._flushes.append(flush)


def _missing(error: ImportError) -> str:
    return f"the OpenTelemetry SDK is not installed ({error}); pip install 'kn-weir[otel]' has it"


def _in_thread(function: Callable[[], object]) -> asyncio.Future[None]:
    """Run what blocks in a thread that does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not done.done():
            done.set_result(None)

    def run() -> None:
        try:
            function()
        except Exception:  # whatever an exporter raises at its end
            log.exception("metrics or traces could not be flushed")
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=run, daemon=True).start()
    return done
