"""What operators ask a running adaptor over HTTP: /metrics, /healthz and /readyz.

Owns the three answers and a server that can do nothing else. Metrics are in Prometheus' text
format, made of what is counted anyway when someone asks; payloads and ids never stand in them.
Ready means that every session is connected and subscribed; a sink that is down makes no adaptor
unready, since restarting it would mend nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from weir.proxy.policy.histogram import SUB_BITS, Latencies, lower_bound

if TYPE_CHECKING:
    from weir.adaptor.backward import Backward
    from weir.adaptor.feed import Feed
    from weir.adaptor.service import Adaptor, Lane

PATIENCE = 5.0
"""Seconds for a client to say what it wants, and to take the answer."""

MOST_CONNECTIONS = 32
LARGEST_HEAD = 8192

_BOUNDS = range(7, 27)
"""Powers of two, in microseconds: 128 us to 67 s; where our own buckets double."""

_TEXT = b"text/plain; charset=utf-8"
_METRICS = b"text/plain; version=0.0.4; charset=utf-8"

_PER_ROUTE = (
    ("received", "counter", "Events that messages have become."),
    ("delivered", "counter", "Events that their sink has taken."),
    ("retried", "counter", "Attempts after a first one that failed."),
    ("dead_lettered", "counter", "Events that the dead letter sink has taken."),
    ("quarantined", "counter", "Events put into the quarantine."),
    ("dropped", "counter", "Events given up by onFailure: drop."),
    ("overflowed", "counter", "QoS 0 events that a slow sink left no room for."),
    ("expired", "counter", "Events not delivered within the lifetime given by their publisher."),
    ("replied", "counter", "Replies of the sink that the broker has."),
    ("unreplied", "counter", "Replies that can't be published, which onFailure took."),
    ("pending", "gauge", "Events received and not yet at an end."),
)


# --- metrics --------------------------------------------------------------------------------------


def metrics(adaptor: Adaptor) -> bytes:
    return "".join(_lines(adaptor)).encode()


def _lines(adaptor: Adaptor) -> Iterator[str]:
    flows = [
        (_labels(route=flow.route.name, sink=lane.sink, broker=lane.broker), flow)
        for lane in adaptor.lanes
        for flow in lane.flows
    ]
    for name, kind, about in _PER_ROUTE:
        suffix = "_total" if kind == "counter" else ""
        yield from _family(
            f"weir_adaptor_events_{name}{suffix}",
            *(kind, about),
            ((labels, getattr(flow.counters, name)) for labels, flow in flows),
        )
    yield from _spool([(labels, flow.feed) for labels, flow in flows if flow.feed is not None])
    full = "weir_adaptor_delivery_seconds"
    yield f"# HELP {full} From the message's receipt to its sink's 2xx.\n# TYPE {full} histogram\n"
    for labels, flow in flows:
        yield from _histogram(full, labels, flow.counters.latency.snapshot())
    for name, kind, about, value in _PER_SINK:
        yield from _family(
            f"weir_adaptor_{name}",
            *(kind, about),
            ((_labels(sink=lane.sink, broker=lane.broker), value(lane)) for lane in adaptor.lanes),
        )
    name = "weir_adaptor_routes_current"
    yield f"# HELP {name} 1: the routes file as it is now is what runs.\n# TYPE {name} gauge\n"
    yield f"{name} {int(adaptor.stale is None)}\n"
    yield from _pods(adaptor.lanes)
    if adaptor.backward is not None:
        yield from _backward(adaptor.backward)


def _spool(feeds: list[tuple[str, Feed]]) -> Iterator[str]:
    for name, about, value in _PER_FEED:
        if feeds:
            samples = ((labels, value(feed)) for labels, feed in feeds)
            yield from _family(f"weir_adaptor_{name}", "gauge", about, samples)


_PER_FEED: tuple[tuple[str, str, Callable[[Feed], float]], ...] = (
    ("events_spooled", "Events of the route in the spool.", lambda feed: feed.share.count),
    ("spool_bytes", "What they take there.", lambda feed: feed.share.bytes),
    ("spool_limit_bytes", "What they may take.", lambda feed: feed.share.bound),
)


def _pods(lanes: Iterable[Lane]) -> Iterator[str]:
    """Counted, not named: pods come and go, and series of theirs would stay."""
    samples: list[tuple[str, float]] = []
    for lane in lanes:
        states = Counter(str(pod["state"]) for pod in lane.client.pods())
        samples += (
            (_labels(sink=lane.sink, broker=lane.broker, state=state), states[state])
            for state in ("up", "ejected", "probing")
            if states
        )
    if samples:
        about = "Pods of sinks whose pods are known; ejected: failed, and not tried for a while."
        yield from _family("weir_adaptor_sink_pods", "gauge", about, samples)


_PER_SINK: tuple[tuple[str, str, str, Callable[[Lane], float]], ...] = (
    ("sink_up", "gauge", "0: blocked, nothing is sent but a probe now and then.",
     lambda lane: float(lane.pipeline.blocked is None and lane.pipeline.unsafe is None)),
    ("sink_in_flight", "gauge", "Requests with the sink.",
     lambda lane: lane.pipeline.in_flight),
    ("sink_direct_requests_total", "counter", "Requests straight into a pod.",
     lambda lane: lane.client.http.direct_requests),
    ("sink_relayed_requests_total", "counter", "Requests by a data port or by the sink's URL.",
     lambda lane: lane.client.http.relayed_requests),
    ("session_connected", "gauge", "1: the MQTT session is connected and subscribed.",
     lambda lane: float(lane.session.connected)),
    ("session_reconnects_total", "counter", "Connections after the first.",
     lambda lane: lane.session.reconnects),
    ("session_unacknowledged", "gauge", "Messages taken from the broker and not acknowledged.",
     lambda lane: lane.session.unacknowledged),
    ("session_window", "gauge", "Messages that may be unacknowledged.",
     lambda lane: lane.session.settings.receive_maximum),
    ("oldest_unacknowledged_seconds", "gauge", "Age of the oldest of them; 0 if there is none.",
     lambda lane: lane.oldest_unacknowledged()),
    ("unrouted_total", "counter", "Messages of subscriptions that no route has any more.",
     lambda lane: lane.pipeline.unrouted),
)  # fmt: skip


def _backward(backward: Backward) -> Iterator[str]:
    for name, value, about in (
        ("published", backward.published, "Events taken by HTTP that the broker has acknowledged."),
        ("refused", backward.refused, "Events answered 4xx."),
        ("failed", backward.failed, "Events answered 503, to be sent again."),
    ):
        full = f"weir_adaptor_listen_{name}_total"
        yield f"# HELP {full} {about}\n# TYPE {full} counter\n{full} {value}\n"


def _family(
    name: str, kind: str, about: str, samples: Iterable[tuple[str, float]]
) -> Iterator[str]:
    yield f"# HELP {name} {about}\n# TYPE {name} {kind}\n"
    for labels, value in samples:
        yield (
            f"{name}{{{labels}}} {value:g}\n"
            if value != int(value)
            else (f"{name}{{{labels}}} {int(value)}\n")
        )


def _histogram(name: str, labels: str, latencies: Latencies) -> Iterator[str]:
    counts = latencies.counts
    seen = at = 0
    for power in _BOUNDS:
        end = (power - SUB_BITS + 1) << SUB_BITS  # the bucket that begins at 2**power
        seen += sum(counts[at:end])
        at = end
        yield f'{name}_bucket{{{labels},le="{2**power / 1e6:g}"}} {seen}\n'
    total = latencies.total()
    # the middle of each bucket stands for what is in it: exact to 1/32
    both = (
        count * (lower_bound(index) + lower_bound(index + 1)) / 2e6
        for index, count in enumerate(counts)
        if count
    )
    yield f'{name}_bucket{{{labels},le="+Inf"}} {total}\n'
    yield f"{name}_sum{{{labels}}} {sum(both):.6f}\n{name}_count{{{labels}}} {total}\n"


def _labels(**labels: str) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    text = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return text.encode("utf-8", "replace").decode()


# --- health ---------------------------------------------------------------------------------------


def readiness(adaptor: Adaptor) -> tuple[int, bytes]:
    """The status, and in words what is missing."""
    if adaptor.draining:
        return 503, b"draining\n"
    missing = [
        f"{lane.sink}: {lane.session.error or 'connecting'}"
        for lane in adaptor.lanes
        if not lane.session.connected
    ]
    backward = adaptor.backward
    if backward is not None and not backward.publisher.connected:
        missing.append(f"listen: {backward.publisher.error or 'connecting'}")
    if missing:
        return 503, ("\n".join(missing) + "\n").encode("utf-8", "replace")
    return 200, b"ready\n"


# --- the server -----------------------------------------------------------------------------------


async def serve_operations(adaptor: Adaptor, host: str, port: int) -> asyncio.Server:
    """Raises OSError when it can't listen there."""
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            if connections <= MOST_CONNECTIONS:
                async with asyncio.timeout(PATIENCE):
                    request = await reader.readuntil(b"\r\n\r\n")
                    writer.write(_answer(adaptor, request))
                    await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.LimitOverrunError:
            writer.write(_response(431, b"the request's head is too long\n"))
        finally:
            connections -= 1
            with contextlib.suppress(ConnectionError):
                writer.close()

    return await asyncio.start_server(answer, host, port, limit=LARGEST_HEAD)


def _answer(adaptor: Adaptor, request: bytes) -> bytes:
    method, _, rest = request.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        response = _response(405, b"only GET\n")
    elif path == b"/metrics":
        response = _response(200, metrics(adaptor), _METRICS)
    elif path in (b"/healthz", b"/livez"):
        response = _response(200, b"alive\n")
    elif path == b"/readyz":
        response = _response(*readiness(adaptor))
    else:
        response = _response(404, b"there are /metrics, /healthz and /readyz\n")
    return response if method != b"HEAD" else response[: response.index(b"\r\n\r\n") + 4]


_REASONS = {200: b"OK", 404: b"Not Found", 405: b"Method Not Allowed", 503: b"Service Unavailable"}


def _response(status: int, body: bytes, kind: bytes = _TEXT) -> bytes:
    return (
        b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
        % (status, _REASONS.get(status, b"Refused"), kind, len(body), body)
    )
