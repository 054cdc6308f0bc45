"""The facts of the Knative queue-proxy contract, each written down once.

Ports, header names, user agents, statuses, bodies and defaults, as they hold for knative/serving
`main` of August 2026 (one cycle past v1.23). Names in headers are lower-case bytes, because that
is what the hot path compares; bodies are the exact bytes a client reads.

This module imports nothing of ours and decides nothing: what follows from these facts is decided
in the policies and in the relay.
"""

from __future__ import annotations

from dataclasses import dataclass

RELEASE = "knative/serving main, August 2026"

# --- ports (section 1.5) --------------------------------------------------------------------
DATA_PORT = 8012
DATA_PORT_H2C = 8013
DATA_PORT_TLS = 8112
ADMIN_PORT = 8022
AUTOSCALER_PORT = 9090
METRICS_PORT = 9091
DIRECT_PORT = 8014
"""Weir's own: nothing listens on it, the kernel hands its connections to the user container."""

# --- user agents that make a request a health check (section 3.2) ----------------------------
HEALTH_CHECK_AGENTS = (b"kube-probe/", b"Knative-Activator-Probe", b"Knative-Autoscaling-Probe")
ACTIVATOR_AGENT = b"Knative-Activator-Probe"
WEIR_AGENT = b"Knative-Activator-Probe (weir)"
PROBE_AGENT = b"kube-probe//"
"""How the queue-proxy introduces itself to the user container (section 4.3)."""

# --- header names (section 3.3) --------------------------------------------------------------
NETWORK_PROBE = b"k-network-probe"
NETWORK_HASH = b"k-network-hash"
KUBELET_PROBE = b"k-kubelet-probe"
ORIGINAL_HOST = b"k-original-host"
PROXY_REQUEST = b"k-proxy-request"
PRUNED = frozenset({b"knative-serving-revision", b"knative-serving-namespace"})
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
PROXY_REQUEST_ACTIVATOR = b"activator"
ROUTE_TAG = b"knative-serving-tag"
DEFAULT_ROUTE = b"knative-serving-default-route"

# --- answers to probes (sections 3.2, 4.1) ---------------------------------------------------
PROBE_QUEUE = b"queue"
PROBE_NETWORK = b"probe"
PROBE_WEIR = b"weir"
BODY_QUEUE = b"queue"
BODY_WEIR = b"weir"
BODY_UNEXPECTED_PROBE = b"unexpected probe header value: %s\n"
BODY_PROBE_WITHOUT_HASH = b'a probe request must contain a non-empty "K-Network-Hash" header\n'
BODY_SHUTTING_DOWN = b"shutting down\n"
DIRECT_OFFER = b"weir-direct"
"""Response header of Weir's own: `port=8014; timeout=300; start=0; idle=0`."""

# --- errors (section 3.12) -------------------------------------------------------------------
BODY_QUEUE_FULL = b"pending request queue full\n"
BODY_REQUEST_TIMEOUT = b"request timeout"
HTTP_TO_TLS = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
"""The whole answer to plain HTTP on the TLS port; the end of the connection ends its body."""
BODY_NOT_FOUND = b"404 page not found\n"
BODY_METHOD_NOT_ALLOWED = b"Method Not Allowed\n"
TEXT_PLAIN = b"text/plain; charset=utf-8"

# --- the other ports (sections 1.5, 5.1, 6) --------------------------------------------------
DRAIN_PATH = b"/wait-for-drain"
METRICS_PATH = b"/metrics"
PROTOBUF = b"application/protobuf"
"""Without parameters: the autoscaler compares strings."""
PROMETHEUS_TEXT = b"text/plain; version=0.0.4; charset=utf-8; escaping=underscores"

# --- why a request did not end like others (Weir's own words, for metrics and logs) ------------
FAILURE_DIAL = "dial"
"""The user container could not be reached."""
FAILURE_LOST = "lost"
"""The user container closed too early, or what it said was no HTTP."""
FAILURE_TIMEOUT = "timeout"
FAILURE_CLIENT = "client"
"""The client left."""
FAILURE_REFUSED = "refused"
"""The queue was full."""

# --- numbers ---------------------------------------------------------------------------------
QUEUE_DEPTH_FACTOR = 10
"""Waiting requests per running one when containerConcurrency is limited (section 3.6)."""
IDLE_UPSTREAM_CONNECTIONS = 1000
IDLE_UPSTREAM_SECONDS = 90.0
MAX_HEAD_BYTES = (1 << 20) + 4096
READ_HEAD_SECONDS = 60.0
READ_METRICS_HEAD_SECONDS = 5.0
READ_PROFILING_HEAD_SECONDS = 15.0
"""The same on 9091, and on 8008 (section 1.5)."""
DRAINED_BODY_BYTES = 256 << 10
"""How much of an unread request body is thrown away to keep a connection (section 3.11)."""
CONTINUE_SECONDS = 1.0
"""How long the user container has for its own 100 Continue (section 3.8)."""
DIAL_FIRST_TIMEOUT_SECONDS = 0.05
DIAL_TIMEOUT_GROWTH = 1.4
DIAL_RETRIES = 15
DIAL_PAUSE_SECONDS = (0.03, 0.06)
AGGRESSIVE_PROBE_PERIOD_SECONDS = 0.05
AGGRESSIVE_PROBE_TIMEOUT_SECONDS = 0.1
AGGRESSIVE_PROBE_LIMIT_SECONDS = 10.0
PROBE_REDIRECTS = 10
DEFAULT_TIMEOUT_SECONDS = 300.0
STAT_PERIOD_SECONDS = 1.0
QUIET_SECONDS = 30.0
"""Without a new request for so long, a pod that terminates has drained (section 6)."""
RESTART_SECONDS = 1.0
"""A drain hook without a SIGTERM for so long: only the user container restarts (section 6)."""
UPGRADED_SECONDS = 60.0
"""How long upgraded connections may go on after the drain (section 6)."""
FLUSH_SECONDS = 10.0
CERTIFICATE_SECONDS = 60.0
"""How often the TLS port looks for another certificate (section 3.9)."""
CERTIFICATE_RELOADED = "Certificate and/or key have changed on disk and were reloaded."
SHUTDOWN_MARGIN_SECONDS = 5.0
"""What a held drain leaves the user container of the grace period (Weir's own)."""


@dataclass(frozen=True, slots=True)
class HttpGet:
    """An httpGet readiness probe after the controller's normalisation (section 1.2).

    `detect_http2`: the container may speak HTTP/2 only, so that is tried first (section 4.3).
    """

    path: str = "/"
    headers: tuple[tuple[str, str], ...] = ()
    scheme: str = "http"
    detect_http2: bool = False


@dataclass(frozen=True, slots=True)
class GrpcCheck:
    """A grpc readiness probe: grpc.health.v1.Health/Check of `service`, "" for the whole server."""

    service: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """A readiness probe: a TCP connect, or with `http` a GET, or with `grpc` a health check.

    `period` 0 is Knative's aggressive mode (section 4.3); `timeout` is per try, in seconds, and
    only used when `period` is not 0.
    """

    port: int
    host: str = "127.0.0.1"
    http: HttpGet | None = None
    grpc: GrpcCheck | None = None
    period: float = 0.0
    timeout: float = 1.0
    success_threshold: int = 1


@dataclass(frozen=True, slots=True)
class RevisionSettings:
    """What the controller tells a sidecar about its revision (section 1.1).

    The three timeouts are seconds, 0 is off. `container_concurrency` 0 is no limit. All of the
    `probes` must pass; none means that the user container counts as ready. `http2`: its port is
    named h2c, so it speaks HTTP/2.
    """

    user_port: int
    pod: str = "pod"
    namespace: str = "default"
    revision: str = "revision"
    service: str = ""
    configuration: str = ""
    user_host: str = "127.0.0.1"
    http2: bool = False
    container_concurrency: int = 0
    timeout: float = DEFAULT_TIMEOUT_SECONDS
    response_start_timeout: float = 0.0
    idle_timeout: float = 0.0
    probes: tuple[Probe, ...] = ()
