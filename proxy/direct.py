"""Calling a Knative function: straight into its pod where that is offered, else over the data port.

Owns which of the two paths a request takes, and on the direct path the duties of the proxy that is
not there: X-Forwarded-For, Forwarded, Host, what is not for the app, and the revision's timers
(design section 2). Whether a request is worth a retry is the caller's decision; here one is
repeated only if nobody listened, so that not a byte of it had left.

A pod is asked on its data port whether it offers the direct one. Requests never wait for that
answer; they are relayed until it is there. An original queue-proxy answers 400 by contract
(section 4.1) and is left alone for a while.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Literal

from weir.proxy import contract
from weir.proxy.policy.forwarded import appended, forwarded
from weir.proxy.policy.offer import Offer
from weir.proxy.wire.client import Call, HttpClient, Response, TransportError

if TYPE_CHECKING:
    import ssl

ASK_TIMEOUT_SECONDS = 5.0
DIRECT_CONNECT_SECONDS = 1.0
"""Short, because a relayed request is the price of giving up."""
ASK_AGAIN_SECONDS = 1.0
"""After the direct port refused, or the data port gave no answer: the pod may be restarting."""
ASK_AGAIN_LIMIT_SECONDS = 60.0
"""Where doubling ends for a port that is offered, but can't be reached from here."""
ASK_INELIGIBLE_SECONDS = 10.0
"""After a Weir that offers nothing: the pod may become eligible."""
ASK_STRANGER_SECONDS = 300.0
"""After something that is no Weir: it would have to be replaced first."""


_NOT_PASSED_ON = contract.PRUNED | {contract.ORIGINAL_HOST, b"x-forwarded-for"}
_MAYBE_OF_EARLIER_HOPS = re.compile(rb"\r\n[fkx]", re.IGNORECASE)
"""Forwarded, K-Original-Host, Knative-Serving-..., X-Forwarded-...: an event has none of them."""


class FunctionClient:
    """`request()` like HttpClient's, over the better of two paths.

    `ask=False`: an ordinary URL, never asked, always "relayed". `tls`: for the data port. `unsent`
    is called instead of failing a call that found nobody on either path, see HttpClient.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        limit: int = 64,
        ask: bool = True,
        tls: ssl.SSLContext | None = None,
        unsent: Callable[[Call, TransportError], None] | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self.direct_requests = 0
        self.relayed_requests = 0
        self._limit = limit
        self._relayed = HttpClient(host, port, limit=limit, tls=tls, unsent=self._nobody)
        self._unsent = unsent
        self._direct: HttpClient | None = None
        self._address = b""
        self._refusals = 0
        self._ask_at = 0.0 if ask else float("inf")
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking = False
        self._question: Call | None = None
        self._retired = False

    @property
    def path(self) -> Literal["direct", "relayed"]:
        return "relayed" if self._direct is None else "direct"

    def request(self, head: bytes, body: bytes, timeout: float) -> asyncio.Future[Response]:
        """The future ends in a Response or a TransportError; see HttpClient.request.

        A 504 `request timeout` may be our own: the revision's timers, kept for the direct path.
        """
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        now = time.monotonic()
        self.submit(Call(head, body, now + timeout, future), now)
        return future

    def submit(self, call: Call, now: float) -> None:
        """As `request`, for a call that already has its future and its deadline."""
        direct = self._direct
        if direct is None:
            if now >= self._ask_at and not self._asking:
                self._asking = True
                self._own(self._ask())
            self.relayed_requests += 1
            self._relayed.submit(call)
        else:
            call.otherwise = call.head
            call.head = self._as_proxied(call.head)
            self.direct_requests += 1
            direct.submit(call)

    async def retire(self) -> None:
        """Let what runs end, pass what waits to `unsent`, then close."""
        self._ask_at = float("inf")
        self._retired = True
        direct, self._direct = self._direct, None
        if direct is not None:
            self._own(direct.retire())
        try:
            await self._relayed.retire()
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            await self.close()

    async def close(self) -> None:
        """Close both paths; what runs or waits fails. Safe to call twice."""
        self._ask_at = float("inf")
        direct, self._direct = self._direct, None
        for task in self._tasks:
            task.cancel()
        if direct is not None:
            await direct.close()
        await self._relayed.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # --- which path ------------------------------------------------------------------------
    async def _ask(self) -> None:
        """Ask the pod, and set when to ask again."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = b"GET / HTTP/1.1\r\nHost: %s:%d\r\nUser-Agent: %s\r\nK-Network-Probe: %s\r\n" % (
            host.encode(),
            self.port,
            contract.WEIR_AGENT,
            contract.PROBE_WEIR,
        )
        wait = ASK_AGAIN_SECONDS
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._question = Call(head, b"", time.monotonic() + ASK_TIMEOUT_SECONDS, answer)
        self._relayed.submit(self._question)
        try:
            wait = self._answered(await answer)
        except TransportError:
            pass  # the request that made us ask meets the same fate, and its caller is told
        finally:
            self._asking = False
            self._question = None
            self._ask_at = max(self._ask_at, time.monotonic() + wait)

    def _answered(self, response: Response) -> float:
        """Take the offer, if there is one; seconds until the next question otherwise."""
        if response.status == 503:
            return ASK_AGAIN_SECONDS  # draining, or not started
        if response.status != 200 or response.body != contract.BODY_WEIR:
            return ASK_STRANGER_SECONDS
        value = response.header(contract.DIRECT_OFFER)
        if value is None:
            return ASK_INELIGIBLE_SECONDS
        try:
            offer = Offer.parse(value.decode("latin-1"))
        except ValueError:
            return ASK_STRANGER_SECONDS  # a Weir whose words we don't know
        address = self._relayed.local_address()
        if address is not None and self._direct is None and not self._retired:
            self._address = address
            self._direct = HttpClient(
                self.host,
                offer.port,
                limit=self._limit,
                connect_timeout=DIRECT_CONNECT_SECONDS,
                timeouts=offer.timeouts,
                unsent=self._refused,
            )
        return 0.0

    def _refused(self, call: Call, error: TransportError) -> None:
        """The direct port takes no new connection: this call, and the next ones, are relayed."""
        direct, self._direct = self._direct, None
        if direct is not None:
            self._refusals = 0 if direct.opened else self._refusals + 1
            wait = min(ASK_AGAIN_SECONDS * 2**self._refusals, ASK_AGAIN_LIMIT_SECONDS)
            self._ask_at = time.monotonic() + wait
            self._own(direct.retire())
        if call.otherwise is not None:
            call.head = call.otherwise
        self.direct_requests -= 1
        self.relayed_requests += 1
        if self._retired:
            self._nobody(call, error)
        else:
            self._relayed.submit(call)

    def _nobody(self, call: Call, error: TransportError) -> None:
        """The data port takes no new connection either."""
        if self._unsent is None or call is self._question:
            call.fail(error)
            return
        self.relayed_requests -= 1
        self._unsent(call, error)

    # --- what the proxy would have done ----------------------------------------------------
    def _as_proxied(self, head: bytes) -> bytes:
        """The head as the queue-proxy would have passed it on (contract sections 3.3, 3.5)."""
        if _MAYBE_OF_EARLIER_HOPS.search(head) is not None:
            return self._passed_on(head)
        return b"%sX-Forwarded-For: %s\r\n" % (head, self._address)

    def _passed_on(self, head: bytes) -> bytes:
        """The same for a head that may speak of earlier hops."""
        line, *fields = head.split(b"\r\n")[:-1]
        said: dict[bytes, bytes] = {}
        kept: list[tuple[bytes, bytes]] = []
        for each in fields:
            name, _, value = each.partition(b":")
            name = name.lower()
            said.setdefault(name, value.strip())
            if name not in _NOT_PASSED_ON:
                kept.append((name, each))
        host = said.get(contract.ORIGINAL_HOST)
        if host:
            kept = [(b"host", b"Host: " + host), *(each for each in kept if each[0] != b"host")]
        if b"forwarded" in said and not said[b"forwarded"]:
            kept = [each for each in kept if each[0] != b"forwarded"]  # an empty one is none
        lines = [line, *(each for _, each in kept)]
        for_ = said.get(b"x-forwarded-for", b"")
        if not said.get(b"forwarded"):
            origin = forwarded(
                for_, said.get(b"x-forwarded-host", b""), said.get(b"x-forwarded-proto", b"")
            )
            if origin:
                lines.append(b"Forwarded: " + origin)
        lines.append(b"X-Forwarded-For: " + appended([for_] if for_ else [], self._address))
        return b"\r\n".join([*lines, b""])

    def _own(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()  # anything unexpected goes to the loop's exception handler
