"""Where events go: a URL taken apart once, and the client that calls it.

A `function` sink is asked for its direct path; an ordinary URL never is. Knows nothing of MQTT,
retries or policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from weir.adaptor.routes import FUNCTION, RoutesError, check_sink
from weir.proxy.direct import FunctionClient

CONNECTIONS = 64
"""Keep-alive connections, and so requests at a time, per sink."""


@dataclass(frozen=True, slots=True)
class Target:
    """An http URL, as a request needs it."""

    host: str
    port: int
    authority: str
    path: str

    @classmethod
    def parse(cls, url: str) -> Target:
        """`url` has passed `routes.check_sink`."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.hostname, parts.port or 80, parts.netloc, path)

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


def client(sink: str, target: Target, connections: int = CONNECTIONS) -> FunctionClient:
    return FunctionClient(target.host, target.port, limit=connections, ask=sink == FUNCTION)
