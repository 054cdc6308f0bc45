"""A sink that is a set of pods: every event goes to the best of them, or to the sink's URL.

Owns the connections to the pods (each by its direct port where it offers one, else by its data
port), moves a request on that found nobody, and tells the balance how requests ended. Who the pods
are is the resolver's business; which one is chosen, the balance's; whether an event is tried again,
the pipeline's. The URL is the way when the set has no pod to offer: whoever is behind it (ingress,
activator) can start one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol
from urllib.parse import urlsplit

from weir.proxy.direct import FunctionClient
from weir.proxy.policy.balance import Balance, Member, Revision
from weir.proxy.wire.client import Call, Response, TransportError

_POD_FAILED = frozenset({502, 503, 504})
"""Statuses that speak of the pod. Any other says that somebody looked at the event."""


class Resolver(Protocol):
    """Knows which pods a function has."""

    def watch(self, changed: Callable[[Sequence[Revision]], None]) -> Callable[[], None]:
        """Tell what is known now, and whatever it becomes, until what is returned is called."""


class Listed:
    """A resolver for pods that somebody has written down."""

    def __init__(self, revisions: Sequence[Revision]) -> None:
        self._revisions = revisions
        self._watching: list[Callable[[Sequence[Revision]], None]] = []

    def watch(self, changed: Callable[[Sequence[Revision]], None]) -> Callable[[], None]:
        self._watching.append(changed)
        changed(self._revisions)
        return lambda: self._watching.remove(changed)

    def change(self, revisions: Sequence[Revision]) -> None:
        """These are the pods now."""
        self._revisions = revisions
        for changed in self._watching:
            changed(revisions)


class _Sent(Call):
    """A request with the pod that has it; none: the URL has it."""

    __slots__ = ("begun", "member")

    member: Member[FunctionClient] | None
    begun: int


class PodSet:
    """`request` as FunctionClient's. Must be made and closed inside one event loop."""

    def __init__(self, url: FunctionClient, resolver: Resolver, limit: int) -> None:
        """`url`: the client of the sink's URL, closed with the set; `limit`: connections per
        pod and path."""
        self._url, self._limit = url, limit
        self._balance: Balance[FunctionClient] = Balance(self._client)
        self._leaving: dict[asyncio.Task[None], Member[FunctionClient]] = {}
        self._direct_before = self._relayed_before = 0
        """Requests of pods that are gone."""
        self._closed = False
        self._unwatch: Callable[[], None] | None = resolver.watch(self._changed)

    def request(self, head: bytes, body: bytes, timeout: float) -> asyncio.Future[Response]:
        """The future ends in a Response or a TransportError; see HttpClient.request. What nobody
        has seen yet goes from pod to pod, and at last to the URL, within `timeout`."""
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        now = time.monotonic()
        call = _Sent(head, body, now + timeout, future)
        self._send(call, now)
        future.add_done_callback(lambda ended: self._ended(call, ended))
        return future

    async def close(self) -> None:
        """What runs or waits fails. Safe to call twice."""
        self._closed = True
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        clients = [self._url, *self._clients()]
        self._balance.update(())
        leaving = list(self._leaving)
        for task in leaving:
            task.cancel()
        if leaving:
            await asyncio.wait(leaving)
        await asyncio.gather(*(client.close() for client in clients))

    # --- what is shown ---------------------------------------------------------------------
    @property
    def path(self) -> Literal["direct", "relayed"]:
        """`direct` as soon as one of the pods is called so."""
        direct = any(member.client.path == "direct" for member in self._balance)
        return "direct" if direct else "relayed"

    @property
    def direct_requests(self) -> int:
        return self._direct_before + sum(each.direct_requests for each in self._clients())

    @property
    def relayed_requests(self) -> int:
        """By the pods' data ports, or by the URL."""
        pods = sum(each.relayed_requests for each in self._clients())
        return self._relayed_before + pods + self.url_requests

    @property
    def url_requests(self) -> int:
        return self._url.relayed_requests + self._url.direct_requests

    def pods(self) -> list[dict[str, object]]:
        """Each pod's state, for the status."""
        now = time.monotonic()
        return [
            {
                "pod": member.name,
                "revision": member.revision,
                "state": member.state(now),
                "path": member.client.path,
                "in_flight": member.in_flight,
            }
            for member in self._balance
        ]

    def _clients(self) -> list[FunctionClient]:
        members = (*self._balance, *self._leaving.values())
        return [member.client for member in members]

    # --- the way of a request --------------------------------------------------------------
    def _send(self, call: _Sent, now: float) -> None:
        member = call.member = self._balance.choose(now)
        if member is None:
            self._url.submit(call, now)
        else:
            call.begun = member.begin()
            member.client.submit(call, now)

    def _unsent(self, call: Call, error: TransportError) -> None:
        """Nobody listens at the pod, or it has left the set: the next one gets the request."""
        assert isinstance(call, _Sent) and call.member is not None
        now = time.monotonic()
        if call.member.removed:
            call.member.left(call.begun)
        else:
            call.member.failed(call.begun, now)
        call.member = None
        if self._closed:
            call.fail(error)
        else:
            self._send(call, now)

    def _ended(self, call: _Sent, ended: asyncio.Future[Response]) -> None:
        member = call.member
        if member is None:
            return
        if ended.cancelled():
            member.left(call.begun)
        elif ended.exception() is not None or ended.result().status in _POD_FAILED:
            member.failed(call.begun, time.monotonic())
        else:
            member.succeeded()

    # --- the set ---------------------------------------------------------------------------
    def _client(self, pod: str) -> FunctionClient:
        parts = urlsplit(f"//{pod}")
        assert parts.hostname is not None and parts.port is not None
        return FunctionClient(parts.hostname, parts.port, limit=self._limit, unsent=self._unsent)

    def _changed(self, revisions: Sequence[Revision]) -> None:
        self._retire(self._balance.update(revisions))

    def _retire(self, members: list[Member[FunctionClient]]) -> None:
        for member in members:
            task = asyncio.get_running_loop().create_task(member.client.retire())
            self._leaving[task] = member
            task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        client = self._leaving.pop(task).client
        self._direct_before += client.direct_requests
        self._relayed_before += client.relayed_requests
        if not task.cancelled():
            task.result()  # anything unexpected goes to the loop's exception handler
