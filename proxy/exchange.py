"""One proxied request, whatever its version of HTTP, until it has really ended on both sides.

Owns what the relay, the timers and the observers know of it. What passes between the two sides is
the business of the exchange of that version; which requests get here, and when their turn comes,
is decided in the relay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from weir.proxy.policy.breaker import Admission
from weir.proxy.policy.deadlines import Deadlines, Timeouts
from weir.proxy.wire import answers

HEAD_COPIES = 4
"""A head is kept as it came, as it goes on, and in its parts."""
FIELD_BYTES = 256
"""What a field takes besides, where they are taken apart."""


class Head(Protocol):
    """What is known of a request from its head. `seen` is by lower-case name."""

    seen: dict[bytes, bytes]
    method: bytes
    target: bytes
    length: int | None

    @property
    def version(self) -> bytes:
        """`HTTP/1.0`, `HTTP/1.1` or `HTTP/2.0`."""

    def fields(self) -> list[tuple[bytes, bytes]]:
        """All header fields as they came, in that order."""

    def replace(self, fields: dict[bytes, bytes]) -> None:
        """Set fields for the user container, in place of those of the same (lower-case) names.

        An empty value removes the field.
        """


class Client(Protocol):
    """Who sent a request: a connection, or a stream on one."""

    exchange: Any
    """Whoever waits with it for the answer; told when it leaves."""

    @property
    def peer(self) -> bytes:
        """IP address."""

    @property
    def peer_port(self) -> int: ...

    @property
    def tls(self) -> bool: ...

    def answer(self, head: Any, parts: list[bytes]) -> None:
        """A whole response of our own (`wire.answers`) to a request that goes no further."""


C = TypeVar("C", bound=Client, covariant=True)
H = TypeVar("H", bound=Head, covariant=True)


class ExchangeBase(Generic[C, H]):
    """`start` it when its turn has come; it ends in one call of `over`.

    `over` comes when neither side has any more of it: that is when the breaker's slot is free
    again (contract section 3.6).
    """

    __slots__ = (
        "_deadlines",
        "_over",
        "_timeouts",
        "admission",
        "admitted",
        "answered",
        "client",
        "clock",
        "counted",
        "failure",
        "head",
        "left",
        "proxied",
        "received",
        "sent",
        "started",
        "status",
        "trace",
        "upgraded",
        "user_status",
    )

    client: C
    head: H
    admission: Admission | None
    """Its place in the breaker, if there is one."""
    counted: bool
    """The autoscaler hears of it (contract section 5.3); `proxied`: it came by the activator."""
    proxied: bool
    started: float
    """When it came; `admitted`: when its turn came, or it was refused. Both of `clock`."""
    admitted: float
    answered: float
    """When a response began that did not end at once; 0.0 for the others."""
    status: int
    """What the client was told; `user_status` is the user container's. 0 for nothing."""
    user_status: int
    received: int
    """Body bytes of the request so far; `sent`: of the response."""
    sent: int
    failure: str
    """Empty, or one of contract.FAILURE_*: why it did not end like others."""
    upgraded: bool
    """It is a tunnel now (contract section 3.10)."""
    trace: Any
    """For the observer that traces."""

    def __init__(
        self,
        client: C,
        head: H,
        timeouts: Timeouts,
        clock: Callable[[], float],
        over: Callable[[Any], None],
    ) -> None:
        self.client = client
        self.head = head
        self.clock = clock
        self.started = self.admitted = clock()
        self.answered = 0.0
        self.admission = None
        self.counted = self.proxied = self.left = self.upgraded = False
        self.status = self.user_status = self.received = self.sent = 0
        self.failure = ""
        self.trace = None
        self._timeouts = timeouts
        self._deadlines: Deadlines | None = None
        self._over = over

    def start(self) -> None:
        """Pass it on."""
        raise NotImplementedError

    def resume(self) -> None:
        """Its turn has come, after it had to wait."""
        self.admitted = self.clock()
        self.start()

    def refuse(self, parts: list[bytes]) -> None:
        """Answer the client ourselves; whatever the user container still does is cut off."""
        raise NotImplementedError

    def _fail(self, failure: str, why: str) -> None:
        """The user container gave no answer that can be passed on: 502 (contract section 3.12)."""
        self.failure = failure
        self.refuse(answers.error(502, why.encode() + b"\n"))

    def expire(self, now: float) -> None:
        """A timer may have fired (contract section 3.7)."""
        raise NotImplementedError

    def client_lost(self) -> None:
        """The client left: so does its request, wherever it is."""
        raise NotImplementedError

    def weigh(self) -> int:
        """Bytes of memory, about, besides those of the client's connection."""
        raise NotImplementedError

    @property
    def deadlines(self) -> Deadlines:
        """Made when first asked for: most requests are over long before."""
        if self._deadlines is None:
            self._deadlines = Deadlines(self._timeouts, self.started)
        return self._deadlines

    def due(self) -> float:
        return self.deadlines.next()

    def _leave(self) -> None:
        if not self.left:
            self.left = True
            self._over(self)


Exchange = ExchangeBase[Client, Head]
"""One whose version of HTTP does not matter."""


class Observer(Protocol):
    """Someone who watches requests: metrics, the request log, traces."""

    def begun(self, exchange: Exchange) -> None:
        """It came and is not on its way yet: `exchange.head.replace` still has an effect."""

    def over(self, exchange: Exchange, now: float) -> None:
        """It has really ended; `now` of the relay's clock."""

    def probed(self, client: Client, head: Head, status: int, size: int, seconds: float) -> None:
        """A probe was answered with so many bytes, so long after it came."""
