"""The agent's page for Prometheus: every pod of the node, and the node (docs/agent.md, Metrics).

Owns the names of the series and the server that answers with them. Everything is made of what is
counted anyway, when someone asks; nothing here grows with traffic, and no label is anything that a
client chose.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from weir import __version__
from weir.proxy import contract, ports
from weir.proxy.counters import ColdStarts, PodCounters
from weir.proxy.observe.direct import SECONDS, cell
from weir.proxy.observe.instruments import HistogramFamily, Value, ValueFamily, written
from weir.proxy.observe.process import process_lines
from weir.proxy.served import ServedPod
from weir.proxy.wire.protocol import as_protocol
from weir.proxy.wire.server import ServerConnection

log = logging.getLogger("weir.agent")

MOST_CONNECTIONS = 16
LARGEST_HEAD = 8 << 10
AGAIN_SECONDS = 1.0
PAGE_SECONDS = 1.0
"""So long a page is good for everybody who asks: asking often costs the node nothing."""
_LONGEST_LABEL = 253
"""Of what a pod says of itself. A name in Kubernetes is no longer."""

Sample = tuple[str, float]
Kind = Literal["counter", "gauge"]


@dataclass(frozen=True)
class _Facts:
    """One pod, looked at once for a page. `direct` is None if nothing of it was ever attached."""

    pod: ServedPod
    labels: str
    direct: dict[str, Any] | None
    relayed: dict[str, float]

    def with_(self, **labels: str) -> str:
        return f"{self.labels},{written(labels.items())}"


# --- the page -------------------------------------------------------------------------------------


def page(pods: Iterable[ServedPod], workers: int, no_kernel: str, cold_starts: ColdStarts) -> bytes:
    """`workers` that serve; `no_kernel` is why nothing can be steered here, empty if it can."""
    facts = [
        _Facts(pod, _labels(pod), _counted(pod.counted()), pod.relayed.totals()) for pod in pods
    ]
    lines = chain(
        _node(len(facts), workers, no_kernel, cold_starts),
        _both_paths(facts),
        _state(facts),
        _direct(facts),
        _relayed(facts),
        process_lines(),
    )
    return "\n".join((*lines, "")).encode("utf-8", "replace")


def _counted(direct: PodCounters | None) -> dict[str, Any] | None:
    return None if direct is None else {**vars(direct), **direct.told()}


def _labels(pod: ServedPod) -> str:
    """By the names that upstream's resource has. The name is ours to know: it tells pods apart,
    whatever they say of themselves."""
    labels = []
    if pod.environment is not None or not pod.spec.borrowed:  # else nothing is known yet
        settings = pod.spec.settings
        labels = [
            ("k8s_namespace_name", settings.namespace[:_LONGEST_LABEL]),
            ("kn_configuration_name", settings.configuration[:_LONGEST_LABEL]),
            ("kn_revision_name", settings.revision[:_LONGEST_LABEL]),
            ("kn_service_name", settings.service[:_LONGEST_LABEL]),
        ]
    known = ((name, value) for name, value in labels if value)
    return written([("k8s_pod_name", pod.spec.name), *known])


def _node(pods: int, workers: int, no_kernel: str, cold_starts: ColdStarts) -> Iterator[str]:
    version = written([("version", __version__), ("python", platform.python_version())])
    yield from _family("build_info", "gauge", "The agent.", [(version, 1)])
    yield from _family("pods", "gauge", "Pods that the agent knows.", [("", pods)])
    yield from _family("workers", "gauge", "Relay workers that serve.", [("", workers)])
    able = 0 if no_kernel else 1
    yield from _family("kernel_able", "gauge", "1: pods can be steered here.", [("", able)])
    if no_kernel:
        why = written([("reason", no_kernel[:_LONGEST_LABEL])])
        yield from _family("kernel_unable", "gauge", "Why not.", [(why, 1)])
    about = "From the start of a pod's container until it was ready for the first time."
    family = HistogramFamily("weir_cold_start_duration_seconds", about, ColdStarts.BOUNDS)
    yield from family.heading()
    yield from family.lines("", cell(cold_starts.counts, cold_starts.seconds, ColdStarts.BOUNDS))


def _both_paths(facts: list[_Facts]) -> Iterator[str]:
    for name, kind, about, of_direct, of_relayed in _PATHS:
        samples: list[Sample] = []
        for one in facts:
            if one.direct is not None:
                samples.append((one.with_(path="direct"), one.direct[of_direct]))
            samples.append((one.with_(path="relayed"), one.relayed.get(of_relayed, 0)))
        yield from _family(name, kind, about, samples)
    about = "From a request's first byte to its answer's last."
    family = HistogramFamily("weir_request_duration_seconds", about, SECONDS)
    yield from family.heading()
    for one in facts:
        if one.direct is not None:
            direct = cell(one.direct["latency"], one.direct["seconds"])
            yield from family.lines(one.with_(path="direct"), direct)
        relayed = cell(one.pod.relayed.latency(), one.relayed.get("seconds", 0))
        yield from family.lines(one.with_(path="relayed"), relayed)


def _direct(facts: list[_Facts]) -> Iterator[str]:
    attached = [(one.labels, one.direct) for one in facts if one.direct is not None]
    for name, about, field in _KERNEL:
        samples = ((labels, direct[field]) for labels, direct in attached)
        yield from _family(f"direct_{name}", "counter", about, samples)
    yield from _family(
        *("direct_overdue_total", "counter", "Connections that were reset long after a deadline."),
        ((one.labels, one.pod.overdue) for one in facts),
    )


def _relayed(facts: list[_Facts]) -> Iterator[str]:
    about = "Answers, by the class of their status; 1xx: upgraded connections."
    classes = [f"{digit}xx" for digit in range(1, 6)]
    yield from _family(
        *("relayed_responses_total", "counter", about),
        ((one.with_(code=code), one.relayed.get(code, 0)) for one in facts for code in classes),
    )
    for name, kind, about, field in _RELAYED:
        samples = ((one.labels, one.relayed.get(field, 0)) for one in facts)
        yield from _family(f"relayed_{name}", kind, about, samples)


def _state(facts: list[_Facts]) -> Iterator[str]:
    pods = [(one, one.pod) for one in facts]
    yield from _family(
        *("pod_ready", "gauge", "1: the user container is ready."),
        ((one.labels, pod.ready) for one, pod in pods),
    )
    yield from _family(
        *("direct_open", "gauge", "1: the pod takes direct connections."),
        ((one.labels, not pod.refused) for one, pod in pods),
    )
    yield from _family(
        *("direct_ineligible", "gauge", "Why it takes none."),
        ((one.with_(reason=pod.refused_word), 1) for one, pod in pods if pod.refused),
    )
    yield from _family(
        *("direct_steering", "gauge", "What reaches the pod's listener."),
        ((one.with_(by=pod.steering), 1) for one, pod in pods if pod.steering != "none"),
    )
    yield from _family(
        *("lease_state", "gauge", "Who serves the pod; own: it has no hold."),
        ((one.with_(state=pod.lease_state), 1) for one, pod in pods),
    )
    yield from _family(
        *("worker_restarts_total", "counter", "Relay workers that died with the pod."),
        ((one.labels, pod.restarts) for one, pod in pods),
    )
    yield from _family(
        *("cold_start_seconds", "gauge", "From its container's start until it was ready first."),
        ((one.labels, pod.cold_start) for one, pod in pods if pod.cold_start is not None),
    )


# name, kind, what it is, which field of the kernel's counters, which of the relay's
_PATHS: tuple[tuple[str, Kind, str, str, str], ...] = (
    ("requests_total", "counter", "Requests that began.", "started", "requests"),
    ("aborted_requests_total", "counter", "Requests that ended without a whole answer.",
     "aborted", "aborted"),
    ("requests_in_flight", "gauge", "Requests that have not ended.", "in_flight", "in_flight"),
    ("request_seconds_total", "counter", "Requests in flight, summed up over time.",
     "integral", "integral"),
    ("connections", "gauge", "Open connections of callers.", "open_connections", "connections"),
)  # fmt: skip

_RELAYED: tuple[tuple[str, Kind, str, str], ...] = (
    ("probes_total", "counter", "Probes that the relay answered.", "probes"),
    ("waiting", "gauge", "Requests that wait for containerConcurrency.", "waiting"),
    ("full_total", "counter", "How often the pod had its share of connections: new ones wait.",
     "full"),
    ("cut_total", "counter", "Connections that were cut to save the worker's memory.", "cut"),
)  # fmt: skip

_KERNEL = (
    ("connections_total", "Connections.", "connections"),
    ("http2_connections_total", "Connections that speak HTTP/2.", "http2"),
    ("upgraded_connections_total", "Connections that became tunnels.", "upgraded"),
    ("crowded_streams_total", "Streams whose time in flight is not known.", "crowded"),
    ("over_budget_total", "Connections no longer parsed: too costly.", "over_budget"),
    ("malformed_total", "Connections no longer parsed: not HTTP.", "malformed"),
    ("framing_lost_total", "Connections no longer parsed: bytes never seen.", "framing_lost"),
    ("out_of_order_segments_total", "Segments that came before their turn.", "out_of_order"),
    ("listeners_total", "Listeners that entered the map by themselves.", "listeners"),
    ("listeners_refused_total", "Listeners by MPTCP, which need tc.", "mptcp_refused"),
    ("steered_total", "Connections that were handed to a listener.", "steered"),
    ("missed_total", "Connections for which there was no listener.", "missed"),
)


def _family(name: str, kind: Kind, about: str, samples: Iterable[Sample]) -> Iterator[str]:
    """Nothing at all without a sample."""
    family = ValueFamily(f"weir_{name}", about, kind)
    heading: Iterable[str] = family.heading()
    for labels, value in samples:
        yield from heading
        heading = ()
        yield from family.lines(labels, Value(float(value)))


# --- the server -----------------------------------------------------------------------------------


async def serve(host: str, port: int, render: Callable[[], bytes]) -> None:
    """Until cancelled. A port that is taken is waited for: another agent may be about to leave."""
    said = ""
    while True:
        try:
            server = await listen(host, port, render)
        except OSError as error:
            if said != str(error):
                log.error("no metrics are served (yet): %s", error)  # noqa: TRY400
                said = str(error)
            await asyncio.sleep(AGAIN_SECONDS)
        else:
            async with server:
                await server.serve_forever()


async def listen(host: str, port: int, render: Callable[[], bytes]) -> asyncio.Server:
    """`/metrics` and nothing else, on all addresses without a host. Raises OSError.

    Of too many connections the oldest has to go, so that nobody keeps scrapers out by staying.
    """
    kept: dict[ServerConnection, None] = {}
    made, until = b"", 0.0

    def current() -> bytes:
        nonlocal made, until
        if time.monotonic() >= until:
            made = render()
            until = time.monotonic() + PAGE_SECONDS
        return made

    service = ports.prometheus(current)

    def protocol() -> asyncio.Protocol:
        if len(kept) >= MOST_CONNECTIONS:
            oldest = next(iter(kept))
            del kept[oldest]
            oldest.abort()
        client = ServerConnection(
            service,
            lambda gone: kept.pop(gone, None),
            patience=contract.READ_METRICS_HEAD_SECONDS,
            most_head=LARGEST_HEAD,
        )
        kept[client] = None
        return as_protocol(client)

    return await asyncio.get_running_loop().create_server(protocol, host or None, port)
