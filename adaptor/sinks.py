"""Where events go: a URL taken apart once, the trust and the token that it needs, and the client.

A `function` sink is asked for its direct path; an ordinary URL never is, and an https one must not
be: TLS ends in the proxy that the direct path would leave out. Knows nothing of MQTT, retries or
policies.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from weir.adaptor.endpoints import FUNCTION, Access, check_sink
from weir.adaptor.podset import Listed, PodSet, Resolver
from weir.adaptor.routes import RoutesError
from weir.proxy.direct import FunctionClient
from weir.proxy.wire.client import Response, TransportError

CONNECTIONS = 64
"""Keep-alive connections, and so requests at a time, per sink."""

TOKEN_SECONDS = 1.0
"""How old what we know of a token's file may be."""


@dataclass(frozen=True, slots=True)
class Target:
    """An http or https URL, as a request needs it."""

    host: str
    port: int
    authority: str
    path: str
    tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Target:
        """`url` has passed `routes.check_sink`."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), parts.netloc, path, tls)

    @property
    def request_line(self) -> bytes:
        """The head of every request to it, up to the event's own header lines."""
        return f"POST {self.path} HTTP/1.1\r\nHost: {self.authority}\r\n".encode("ascii")


def resolve(sink: str, function_url: str | None) -> str:
    """The URL of a route's sink. Raises RoutesError when it says `function` and there is none."""
    if sink != FUNCTION:
        return sink
    if function_url is None:
        raise RoutesError(
            f"a route's sink is `{FUNCTION}`, and nobody said where the function is; "
            "give its URL (--function-url http://host:port) or write a URL into the route"
        )
    try:
        check_sink(function_url)
    except ValueError as error:
        raise RoutesError(f"the function's URL: {error}") from error
    return function_url


class SinkClient:
    """`request` as FunctionClient's, with the sink's bearer token where it has one."""

    def __init__(
        self,
        sink: str,
        target: Target,
        access: Access,
        connections: int = CONNECTIONS,
        *,
        ca_certs: str | None = None,
        audience: str | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        """`ca_certs`: PEM of CAs that are trusted besides. `audience`: whose tokens the sink wants.
        `resolver`: who knows its pods; default: the routes file, if it does. Raises RoutesError."""
        bare = not target.tls and access.token is None and audience is None
        self.listed = Listed(access.pods) if resolver is None and access.pods else None
        """The pods of the routes file, which may be changed."""
        resolver = resolver or self.listed
        url = FunctionClient(
            target.host,
            target.port,
            limit=connections,
            ask=sink == FUNCTION and bare,
            tls=_trust(sink, access, ca_certs) if target.tls else None,
        )
        self.http: FunctionClient | PodSet = url
        if resolver is not None and bare:
            self.http = PodSet(url, resolver, connections)
        self._token = None if access.token is None else _Token(access.token)

    def request(self, head: bytes, body: bytes, timeout: float) -> asyncio.Future[Response]:
        """The future ends in a Response or a TransportError; see FunctionClient.request."""
        if self._token is None:
            return self.http.request(head, body, timeout)
        try:
            line = self._token.line()
        except OSError as error:
            failed: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
            failed.set_exception(TransportError(str(error), sent=False))
            return failed
        return self.http.request(head + line, body, timeout)

    def pods(self) -> list[dict[str, object]]:
        """The state of each pod, if they are known."""
        return self.http.pods() if isinstance(self.http, PodSet) else []

    async def close(self) -> None:
        await self.http.close()


class _Token:
    """A bearer token in a file that someone else renews."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._line = b""
        self._seen: tuple[int, int] | None = None
        self._looked = 0.0

    def line(self) -> bytes:
        """The Authorization header line. Raises OSError that names the file."""
        now = time.monotonic()
        if self._seen is not None and now - self._looked < TOKEN_SECONDS:
            return self._line
        try:
            found = self._path.stat()
            state = (found.st_mtime_ns, found.st_ino)
            if state != self._seen:
                self._line = self._header(self._path.read_bytes())
                self._seen = state
        except OSError as error:
            self._seen = None
            why = error.strerror or error
            raise OSError(f"can't use the token for the sink in {self._path}: {why}") from error
        self._looked = now
        return self._line

    def _header(self, content: bytes) -> bytes:
        token = content.strip()
        if not token or not all(0x21 <= byte <= 0x7E for byte in token):
            raise OSError("it is empty or has other characters than a token has")
        return b"Authorization: Bearer %s\r\n" % token


def _trust(sink: str, access: Access, ca_certs: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if access.ca is not None:
            context.load_verify_locations(cafile=str(access.ca))
        if ca_certs is not None:
            context.load_verify_locations(cadata=ca_certs)
    except (OSError, ValueError) as error:
        where = access.ca if access.ca is not None else "K_CA_CERTS"
        raise RoutesError(
            f"the CA for the sink {sink} in {where} can't be used: {error}; it must be PEM"
        ) from error
    return context
