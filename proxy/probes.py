"""Is the user container ready? The readiness probe that the queue-proxy runs (contract 4.3).

Owns the schedule of tries, the counter of successes and the two kinds of check. One run serves all
who ask while it lasts, and goes on when they leave. What a health check answers is the relay's.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

from weir.proxy import contract
from weir.proxy.contract import Probe, RevisionSettings
from weir.proxy.wire.connection import Connection, TransportError
from weir.proxy.wire.dial import Dial, connect_once
from weir.proxy.wire.head import ResponseHead

_LOCATION = re.compile(rb"(?:http://([^/?#]*))?([/?][^#]*)?")


class Prober:
    """`ready()` runs the probe or joins the run that is on; `last_error` says why it failed."""

    def __init__(
        self,
        settings: RevisionSettings,
        dial: Dial,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe = settings.probes[0] if settings.probes else None
        self._dial = dial
        self._clock = clock
        self._successes = 0
        self._run: asyncio.Task[bool] | None = None
        self.tries = 0
        self.last_error = ""

    async def ready(self) -> bool:
        """The verdict. Cancelling the caller leaves the run alone."""
        if self._probe is None:
            return True
        if self._run is None or self._run.done():
            self._run = asyncio.get_running_loop().create_task(self._until_ready(self._probe))
        return await asyncio.shield(self._run)

    async def _until_ready(self, probe: Probe) -> bool:
        if probe.period:
            return await self._try(probe, max(probe.timeout, 1.0))
        end = self._clock() + contract.AGGRESSIVE_PROBE_LIMIT_SECONDS
        while True:
            begun = self._clock()
            if await self._try(probe, contract.AGGRESSIVE_PROBE_TIMEOUT_SECONDS):
                self._successes += 1
                if self._successes >= probe.success_threshold:
                    return True
            else:
                self._successes = 0
            now = self._clock()
            pause = max(begun + contract.AGGRESSIVE_PROBE_PERIOD_SECONDS - now, 0.0)
            if now + pause >= end:
                return False
            await asyncio.sleep(pause)

    async def _try(self, probe: Probe, limit: float) -> bool:
        self.tries += 1
        try:
            async with asyncio.timeout(limit):
                return await (self._get(probe) if probe.http else self._connect(probe))
        except TimeoutError:
            self.last_error = f"no answer within {limit:g} s"
        except (OSError, TransportError) as error:
            self.last_error = str(error)
        except ValueError as error:  # the container redirects to what is no address
            self.last_error = f"can't be dialled: {error}"
        return False

    async def _connect(self, probe: Probe) -> bool:
        sock = await connect_once(self._dial, probe.host, probe.port, 60.0)
        sock.close()
        return True

    async def _get(self, probe: Probe) -> bool:
        """GET, on a connection of its own each time; redirects of the same host are followed."""
        assert probe.http is not None
        path = ("/" + probe.http.path.lstrip("/")).encode()
        host, port = probe.host, probe.port
        for _ in range(contract.PROBE_REDIRECTS + 1):
            head = await self._ask(host, port, path, probe.http.headers)
            if not (300 <= head.status < 400):
                break
            location = dict(head.headers()).get(b"location")
            if not location:
                break
            match = _LOCATION.fullmatch(location)
            if match is None:
                self.last_error = f"redirected to {location.decode('latin-1')}"
                return False
            if match[1]:
                name, _, number = match[1].decode("latin-1").partition(":")
                host, port = name, int(number) if number.isdigit() else 80
            path = match[2] or b"/"
            if path.startswith(b"?"):
                path = b"/" + path
        else:
            self.last_error = f"stopped after {contract.PROBE_REDIRECTS} redirects"
            return False
        if 200 <= head.status < 400:
            return True
        self.last_error = f"HTTP probe did not respond Ready, got status code: {head.status}"
        return False

    async def _ask(
        self, host: str, port: int, path: bytes, headers: tuple[tuple[str, str], ...]
    ) -> ResponseHead:
        sock = await connect_once(self._dial, host, port, 60.0)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(_nothing), sock=sock)
        lines = {
            "Host": f"{host}:{port}",
            "User-Agent": contract.PROBE_AGENT.decode(),
            "Accept-Encoding": "gzip",
            "Connection": "close",
            **{name.title(): value for name, value in headers},
        }
        fields = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        request = b"GET %s HTTP/1.1\r\n%s\r\n" % (path, fields.encode("latin-1"))
        question = _Question(loop.create_future())
        try:
            connection.ask(question, b"GET", request)
            return await question.head
        finally:
            connection.forget()


def _nothing(connection: Connection) -> None:
    pass


class _Question:
    """The Asker of a probe: only the head of the response matters."""

    __slots__ = ("head",)

    def __init__(self, head: asyncio.Future[ResponseHead]) -> None:
        self.head = head

    def response_begun(self, head: ResponseHead, piece: bytes, ended: bool) -> None:
        if not self.head.done():
            self.head.set_result(head)

    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        self.response_begun(head, rest, True)

    def response_lost(self, error: TransportError) -> None:
        if not self.head.done():
            self.head.set_exception(error)

    def response_informed(self, head: ResponseHead) -> None:
        pass

    def response_more(self, piece: bytes, ended: bool) -> None:
        pass

    def response_tunnelled(self, data: bytes) -> None:
        pass

    def request_hold(self) -> None:
        pass

    def request_release(self) -> None:
        pass
