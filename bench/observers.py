"""What watching a request costs: metrics by both generations' names, and the request log.

`python -m bench.observers` prints microseconds a request, of everything an observer does from the
beginning of a request to its end; a line of the log is rendered, but written nowhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from weir.proxy.contract import RevisionSettings
from weir.proxy.environment import (
    DEFAULT_REQUEST_LOG_TEMPLATE,
    Observability,
    RequestLog,
    SidecarSettings,
)
from weir.proxy.exchange import Exchange, Observer
from weir.proxy.observe.failures import FailureLog
from weir.proxy.observe.metrics import RequestMetrics
from weir.proxy.observe.opencensus import RevisionMetrics
from weir.proxy.observe.requestlog import RequestLog as RequestLogObserver
from weir.proxy.policy.deadlines import Timeouts
from weir.proxy.wire.head import RequestHead

REQUESTS = 20_000
HEAD = (
    b"GET /orders?id=7 HTTP/1.1\r\nHost: hello.default.example.com\r\nUser-Agent: curl/8\r\n"
    b"Accept: */*\r\nX-Forwarded-For: 10.0.0.9\r\nX-Forwarded-Proto: http\r\n\r\n"
)


class _Client:
    peer = b"10.0.0.9"
    peer_port = 40000
    tls = False
    exchange = None

    def answer(self, head: object, parts: list[bytes]) -> None:
        """Nobody is answered here."""


def exchanges() -> list[Exchange]:
    timeouts = Timeouts(300.0)
    made = []
    for _ in range(REQUESTS):
        exchange = Exchange(_Client(), RequestHead(HEAD), timeouts, time.monotonic, lambda _: None)
        exchange.status = exchange.user_status = 200
        exchange.sent = 512
        made.append(exchange)
    return made


def cost(observer: Observer, after: Callable[[], None] = lambda: None) -> float:
    """Microseconds a request, the best of five rounds."""
    best = float("inf")
    for _ in range(5):
        round_ = exchanges()
        started = time.perf_counter()
        for exchange in round_:
            observer.begun(exchange)
            observer.over(exchange, exchange.started + 0.003)
        after()
        best = min(best, time.perf_counter() - started)
    return best / REQUESTS * 1e6


async def main() -> None:
    revision = RevisionSettings(user_port=8080, container_concurrency=10)
    settings = SidecarSettings(
        revision,
        8012,
        8112,
        "10.0.0.1",
        observability=Observability(
            request_log=RequestLog(True, DEFAULT_REQUEST_LOG_TEMPLATE, False)
        ),
    )
    current = RequestMetrics(8080, 10, lambda: 3)
    before = RevisionMetrics(revision, lambda: 3)
    lines: list[bytes] = []
    log = RequestLogObserver(settings, lines.append)
    failures = FailureLog(Timeouts(300.0), "127.0.0.1:8080")
    print(f"metrics, current names      {cost(current):6.2f} µs a request")
    print(f"metrics, OpenCensus names   {cost(before):6.2f} µs a request")
    print(f"request log, default        {cost(log, log.write):6.2f} µs a request")
    print(f"failures (there are none)   {cost(failures):6.2f} µs a request")
    started = time.perf_counter()
    text = "\n".join(current.lines())
    spent = time.perf_counter() - started
    print(f"a scrape of {len(text) >> 10} KiB          {spent * 1e3:6.2f} ms")


if __name__ == "__main__":
    asyncio.run(main())
