"""One httpGet probe: a GET on a connection of its own, like the queue-proxy's (contract 4.3).

Owns what is sent, which answers are ready ones, redirects, HTTPS and the search for HTTP/2. When
to try and how long it may take is the schedule's business (`weir.proxy.probes`).
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weir.proxy import contract
from weir.proxy.contract import HttpGet, Probe
from weir.proxy.wire.connection import Connection, TransportError
from weir.proxy.wire.dial import Dial, connect_once
from weir.proxy.wire.protocol import as_protocol
from weir.proxy.wire.response import ResponseHead

if TYPE_CHECKING:
    import ssl

DIAL_SECONDS = 60.0  # never reached: a try is over long before
REST_BYTES = 64 << 10
REST_SECONDS = 1.0
"""How much more of an answer is read when its status is known, so that the container can finish."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NOT_IN_TARGET = re.compile(r"[^!$-;=?-Z_a-z~\[\]]|#.*")
_SECRETS = frozenset({"Authorization", "Cookie", "Www-Authenticate"})
_OURS = frozenset({"Host", "User-Agent", "Content-Length", "Transfer-Encoding", "Connection"})


class ProbeFailed(OSError):
    """The container answered, and the answer is no. `str()` is one line."""


@dataclass(frozen=True, slots=True)
class _Url:
    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"

    def joined(self, location: str) -> _Url:
        """Where a redirect leads from here. Raises ValueError for what is no address."""
        from urllib.parse import urljoin, urlsplit

        there = urlsplit(urljoin(str(self), location))
        if there.scheme not in _DEFAULT_PORTS or not there.hostname:
            raise ProbeFailed(f"redirected to {location}")
        port = there.port or _DEFAULT_PORTS[there.scheme]
        query = f"?{there.query}" if there.query else ""
        return _Url(there.scheme, there.hostname, port, _target(there.path + query))


class HttpCheck:
    """`run` asks once; `get` is the probe's, `limit` the seconds that the first question of a
    search for HTTP/2 may take. TLS is set up when it is first needed."""

    def __init__(self, probe: Probe, get: HttpGet, dial: Dial, limit: float) -> None:
        self._url = _Url(get.scheme, probe.host, probe.port, _target(get.path))
        self._headers = tuple((_canonical(name), value) for name, value in get.headers)
        self._detect_http2 = get.detect_http2
        self._dial = dial
        self._limit = limit
        self._tls: ssl.SSLContext | None = None

    async def run(self) -> None:
        """Returns when ready. Raises ProbeFailed, OSError, TransportError or ValueError."""
        if not self._detect_http2:
            await self._get(self._headers)
        elif self._url.scheme != "http" or not await self._ready_over_http2():
            await self._get(())

    async def _ready_over_http2(self) -> bool:
        """Does it speak HTTP/2, and say yes? Then that decides.

        A server of HTTP/1 only may leave the question unanswered, so it has a limit of its own.
        """
        from weir.proxy import probe_http2

        url = self._url

        async def status(headers: tuple[tuple[str, str], ...]) -> int:
            sock = await connect_once(self._dial, url.host, url.port, DIAL_SECONDS)
            return await probe_http2.get(sock, url.authority, url.target, headers)

        try:
            async with asyncio.timeout(self._limit):
                if not _is_ready(await status(())):
                    return False
        except (OSError, TransportError):
            return False
        _judge(await status(self._headers))
        return True

    async def _get(self, headers: tuple[tuple[str, str], ...]) -> None:
        url = self._url
        for _ in range(contract.PROBE_REDIRECTS):  # the tenth redirect is one too many for Go
            head = await self._ask(url, headers)
            location = dict(head.headers()).get(b"location")
            if head.status not in _REDIRECTS or not location:
                _judge(head.status)
                return
            there = url.joined(location.decode("latin-1"))
            if there.host != url.host:
                headers = tuple(pair for pair in headers if pair[0] not in _SECRETS)
            url = there
        raise ProbeFailed(f"stopped after {contract.PROBE_REDIRECTS} redirects")

    async def _ask(self, url: _Url, headers: tuple[tuple[str, str], ...]) -> ResponseHead:
        sock = await connect_once(self._dial, url.host, url.port, DIAL_SECONDS)
        loop = asyncio.get_running_loop()
        secure = url.scheme == "https"
        connection = Connection(_nothing)
        try:
            context = self._context() if secure else None
            await loop.create_connection(
                lambda: as_protocol(connection),
                sock=sock,
                ssl=context,
                server_hostname=url.host if secure else None,
            )
        except BaseException:
            sock.close()
            raise
        question = _Question(connection)
        try:
            connection.ask(question, b"GET", _request(url, headers))
            return await question.head
        finally:
            question.leave()

    def _context(self) -> ssl.SSLContext:
        """Verifies against the system's roots, so what is signed by nobody known isn't ready."""
        import ssl

        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


def _request(url: _Url, headers: tuple[tuple[str, str], ...]) -> bytes:
    """The user's headers are added to ours, which win: Go's client sends the first User-Agent and
    no Host but its own."""
    lines = [
        f"GET {url.target} HTTP/1.1",
        f"Host: {url.authority}",
        f"User-Agent: {contract.PROBE_AGENT.decode()}",
        *(f"{name}: {value}" for name, value in headers if name not in _OURS),
    ]
    if not any(name == "Accept-Encoding" for name, _ in headers):
        lines.append("Accept-Encoding: gzip")
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode()


def _judge(status: int) -> None:
    if not _is_ready(status):
        raise ProbeFailed(f"HTTP probe did not respond Ready, got status code: {status}")


def _is_ready(status: int) -> bool:
    return 200 <= status < 400


def _target(path: str) -> str:
    """Path and query with one leading slash and nothing that would break a request line."""
    target = "/" + path.lstrip("/")
    if not _NOT_IN_TARGET.search(target):
        return target
    from urllib.parse import quote

    return quote(target.partition("#")[0], safe="!$%&'()*+,-./:;=?@_~[]")


def _canonical(name: str) -> str:
    return "-".join(part.capitalize() for part in name.split("-"))


def _nothing(connection: Connection) -> None:
    pass


class _Question:
    """The Asker of a probe. Only the head of the response matters, but a container that is still
    writing the rest may do so for a moment: cutting it short would fill its log."""

    __slots__ = ("_connection", "_left", "_more", "_timer", "head")

    def __init__(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        self._connection = connection
        self._left = REST_BYTES
        self._more = True
        self._timer: asyncio.TimerHandle | None = None
        self.head: asyncio.Future[ResponseHead] = loop.create_future()

    def leave(self) -> None:
        """Nobody waits any more: close, now or when the rest has come."""
        if self.head.done() and not self.head.cancelled() and self.head.exception() is None:
            if not self._more:
                self._connection.close()
                return
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(REST_SECONDS, self._connection.forget)
        else:
            self._connection.forget()

    def response_begun(self, head: ResponseHead, piece: bytes, ended: bool) -> None:
        if not self.head.done():
            self.head.set_result(head)
        self.response_more(piece, ended)

    def response_more(self, piece: bytes, ended: bool) -> None:
        self._left -= len(piece)
        self._more = not ended
        if ended and self._timer is not None:
            self._over()
            self._connection.close()
        elif not ended and self._left < 0:
            self._over()
            self._more = False
            self._connection.forget()

    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        if not self.head.done():
            self.head.set_result(head)
        self._more = False

    def response_lost(self, error: TransportError) -> None:
        if not self.head.done():
            self.head.set_exception(error)
        self._more = False
        self._over()

    def response_informed(self, head: ResponseHead) -> None:
        pass

    def response_tunnelled(self, data: bytes) -> None:
        pass

    def request_hold(self) -> None:
        pass

    def request_release(self) -> None:
        pass

    def _over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
