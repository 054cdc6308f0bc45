"""The connections of one pod's clients: how many there may be, and which go first.

Owns the order and the account. When a connection may be closed is its own business (`spare`), who
closes listeners when there is no more room is the gate's.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Generic, Protocol, TypeVar

from weir.proxy.policy.budget import Share
from weir.proxy.wire.turns import Turns

LOOKS = 64
"""Connections that are asked at once: where all are busy, no time is to be lost with them."""
SPARE_SECONDS = 1.0
"""So long whoever has connected has time to say something, however little room there is."""


class Sparing(Protocol):
    def spare(self, now: float) -> bool:
        """Close, unless something is asked or was asked since this was called the last time.

        `now` of the event loop's clock. True: it closes.
        """


CLIENT_BYTES = 4096
"""What any connection takes, about; TLS_BYTES more with TLS."""
TLS_BYTES = 48 << 10
C = TypeVar("C", bound=Sparing)


class Clients(Generic[C]):
    """A set of them. `share` is what they are charged to, `most` how many there may be."""

    __slots__ = ("_clients", "_most", "share", "turns")

    def __init__(self, share: Share | None = None, most: int = 1 << 31) -> None:
        self._clients: dict[C, None] = {}
        self.share = share
        self._most = most
        self.turns = Turns()
        """For what takes long, all of them together."""

    def __len__(self) -> int:
        return len(self._clients)

    def __iter__(self) -> Iterator[C]:
        return iter(list(self._clients))

    def add(self, client: C) -> None:
        self._clients[client] = None
        if self.share is not None:
            self.share.take()

    def discard(self, client: C) -> None:
        if client in self._clients:
            del self._clients[client]
            if self.share is not None:
                self.share.give()

    @property
    def room(self) -> bool:
        """Is there room for one more?"""
        return len(self._clients) < self._most and (self.share is None or self.share.room)

    def spare(self, now: float) -> bool:
        """Have one closed that nobody needs, if there is one among those not asked for longest."""
        for client in list(islice(self._clients, LOOKS)):
            if client.spare(now):
                return True
            del self._clients[client]
            self._clients[client] = None
        return False
