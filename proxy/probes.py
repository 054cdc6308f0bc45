"""Is the user container ready? The readiness probes that the queue-proxy runs (contract 4.3).

Owns the schedule of tries, the counters of successes and who shares a run: one run of all probes
serves everybody who asks while it lasts, and goes on when they leave. What a single try does is in
`probe_http` and `probe_grpc`, what a health check answers is the relay's business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from weir.proxy import contract
from weir.proxy.contract import Probe, RevisionSettings
from weir.proxy.wire.connection import TransportError
from weir.proxy.wire.dial import Dial, connect_once

_log = logging.getLogger(__name__)

Check = Callable[[], Awaitable[None]]
"""One try. Returns when the container is ready; its exceptions (see `_Schedule._try`) say why not.
"""


class Prober:
    """`ready()` runs the probes or joins the run that is on; `last_error` says why one failed."""

    def __init__(
        self,
        settings: RevisionSettings,
        dial: Dial,
        clock: Callable[[], float] = time.monotonic,
        told: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """`told` is called with every verdict, whoever asked for it."""
        self._napping: set[asyncio.Future[None]] = set()
        self._schedules = [
            _Schedule(probe, _check(probe, dial), clock, self.nap) for probe in settings.probes
        ]
        self._told = told
        self._run: asyncio.Task[bool] | None = None
        self.last_error = ""

    @property
    def tries(self) -> int:
        """Since the start, of all probes together."""
        return sum(schedule.tries for schedule in self._schedules)

    async def ready(self) -> bool:
        """The verdict. Cancelling the caller leaves the run alone."""
        if not self._schedules:
            return True
        if self._run is None or self._run.done():
            self._run = asyncio.get_running_loop().create_task(self._all())
        return await asyncio.shield(self._run)

    async def nap(self, seconds: float) -> None:
        """A pause that `hurry` ends."""
        loop = asyncio.get_running_loop()
        waking = loop.create_future()
        self._napping.add(waking)
        timer = loop.call_later(seconds, _wake, waking)
        try:
            await waking
        finally:
            timer.cancel()
            self._napping.discard(waking)

    def hurry(self) -> None:
        """Something has changed: whatever pauses between two tries makes the next one now."""
        for waking in self._napping:
            _wake(waking)

    async def _all(self) -> bool:
        """All at once; the verdict waits for the slowest, as the queue-proxy's does."""
        if len(self._schedules) == 1:
            errors = [await self._schedules[0].run()]
        else:
            async with asyncio.TaskGroup() as group:
                runs = [group.create_task(schedule.run()) for schedule in self._schedules]
            errors = [run.result() for run in runs]
        why = [error for error in errors if error is not None]
        if why:
            self.last_error = why[0]
        self._told(not why)
        return not why


class _Schedule:
    """The tries of one probe. Its count of successes outlives a run."""

    def __init__(
        self,
        probe: Probe,
        check: Check,
        clock: Callable[[], float],
        nap: Callable[[float], Awaitable[None]],
    ) -> None:
        self._probe = probe
        self._check = check
        self._clock = clock
        self._nap = nap
        self._successes = 0
        self.tries = 0

    async def run(self) -> str | None:
        """None when the probe passes, else why not, which is logged once."""
        if not self._probe.period:
            return await self._aggressively()
        error = await self._try()
        if error is not None:
            _log.info("%s", error)
        return error

    async def _aggressively(self) -> str | None:
        end = self._clock() + contract.AGGRESSIVE_PROBE_LIMIT_SECONDS
        failures = 0
        last = f"fewer than {self._probe.success_threshold} successes in time"
        while True:
            begun = self._clock()
            error = await self._try()
            if error is None:
                self._successes += 1
                if self._successes >= self._probe.success_threshold:
                    return None
            else:
                self._successes = 0
                failures += 1
                last = error
            now = self._clock()
            pause = max(begun + contract.AGGRESSIVE_PROBE_PERIOD_SECONDS - now, 0.0)
            if now + pause >= end:
                if failures:
                    _log.info("aggressive probe error (failed %d times): %s", failures, last)
                return last
            await self._nap(pause)

    async def _try(self) -> str | None:
        self.tries += 1
        limit = _limit(self._probe)
        questions = 3 if self._probe.http and self._probe.http.detect_http2 else 1
        try:
            async with asyncio.timeout(limit * questions):
                await self._check()
        except TimeoutError:
            return f"no answer within {limit:g} s"
        except (OSError, TransportError) as error:
            return str(error) or type(error).__name__
        except ValueError as error:  # the container redirects to what is no address
            return f"can't be dialled: {error}"
        return None


def _wake(waking: asyncio.Future[None]) -> None:
    if not waking.done():
        waking.set_result(None)


def _limit(probe: Probe) -> float:
    """Seconds of one question. A try is one, or when HTTP/2 is looked for up to three."""
    return max(probe.timeout, 1.0) if probe.period else contract.AGGRESSIVE_PROBE_TIMEOUT_SECONDS


def _check(probe: Probe, dial: Dial) -> Check:
    if probe.http is not None:
        from weir.proxy.probe_http import HttpCheck

        return HttpCheck(probe, probe.http, dial, _limit(probe)).run
    if probe.grpc is not None:
        from weir.proxy.probe_grpc import GrpcHealthCheck

        return GrpcHealthCheck(probe, probe.grpc, dial, _limit(probe)).run

    async def connect() -> None:
        sock = await connect_once(dial, probe.host, probe.port, 60.0)
        sock.close()

    return connect
