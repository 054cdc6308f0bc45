"""What a sidecar is told by its environment, read as the queue-proxy reads it (contract section 1).

Owns the names of the variables, Go's rules for their values and the words of the complaint about a
bad one. `read_environment` is pure; what follows from a setting is its user's business, and so is
every variable that an OpenTelemetry SDK reads for itself (OTEL_EXPORTER_OTLP_* and its like).

The settings are named tuples: to make a frozen dataclass takes six times as long, and the start of
a sidecar under a small CPU limit is counted in milliseconds.

Settings of two generations are understood: with OBSERVABILITY_CONFIG those of v1.19 and later,
without it the separate variables of the releases before (contract section 1.4).
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from weir.proxy import gojson
from weir.proxy.contract import DATA_PORT_H2C, METRICS_PORT, RevisionSettings
from weir.proxy.gojson import FieldError, Fields
from weir.proxy.probe_settings import parse_probes
from weir.proxy.tls_settings import TlsSettings, tls_settings

CERTIFICATES = "/var/lib/knative/certs"
"""Where the secret of system-internal TLS is mounted (contract section 2.8)."""

_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
# an integer as Go writes them in source, the sign apart
_INTEGER = re.compile(
    r"([+-]?)(?:0[xX](?P<hex>(?:_?[0-9a-fA-F])+)|0[bB](?P<bin>(?:_?[01])+)"
    r"|0[oO]?(?P<oct>(?:_?[0-7])+)|(?P<dec>0|[1-9](?:_?[0-9])*))"
)
_BASES = {"hex": 16, "bin": 2, "oct": 8, "dec": 10}

_LOGGED = {
    "requestMethod": '"{{.Request.Method}}"',
    "requestUrl": '"{{js .Request.RequestURI}}"',
    "requestSize": '"{{.Request.ContentLength}}"',
    "status": "{{.Response.Code}}",
    "responseSize": '"{{.Response.Size}}"',
    "userAgent": '"{{js .Request.UserAgent}}"',
    "remoteIp": '"{{js .Request.RemoteAddr}}"',
    "serverIp": '"{{.Revision.PodIP}}"',
    "referer": '"{{js .Request.Referer}}"',
    "latency": '"{{.Response.Latency}}s"',
    "protocol": '"{{.Request.Proto}}"',
}
DEFAULT_REQUEST_LOG_TEMPLATE = (
    '{"httpRequest": {'
    + ", ".join(f'"{name}": {value}' for name, value in _LOGGED.items())
    + '}, "traceId": "{{.TraceID}}"}'
)
"""Of v1.21 and later, for a configuration that brings none (contract section 3.13)."""

METRICS_PROTOCOLS = ("none", "prometheus", "grpc", "http/protobuf")
TRACING_PROTOCOLS = ("none", "stdout", "grpc", "http/protobuf")


class EnvironmentFault(Exception):
    """A variable is missing or can't be used. `str()` is the one line to print before exit 1."""


class Logging(NamedTuple):
    """The sidecar's own log (contract section 3.14): zap's JSON configuration and level, raw.

    Neither is fatal when it is no good: the queue-proxy then logs as if it had none.
    """

    config: str = ""
    level: str = ""


class RequestMetrics(NamedTuple):
    """`protocol` is none, prometheus, grpc or http/protobuf; before v1.19 what was given.

    `endpoint` is a URL, or for prometheus the host:port to listen on. `interval` is seconds, 0 the
    exporter's own default. `domain` is METRICS_DOMAIN, which only OpenCensus had a use for.
    """

    protocol: str = "none"
    endpoint: str = ""
    interval: float = 0.0
    domain: str = ""


class Tracing(NamedTuple):
    """`protocol` is none, stdout, grpc or http/protobuf; before v1.19 none or zipkin.

    `debug` samples everything, as TRACING_CONFIG_DEBUG did.
    """

    protocol: str = "none"
    endpoint: str = ""
    sampling_rate: float = 0.0
    debug: bool = False


class RequestLog(NamedTuple):
    """Lines on stdout by a Go template (contract section 3.13); `probes` logs probes as well."""

    enabled: bool = False
    template: str = ""
    probes: bool = False


class PrometheusServer(NamedTuple):
    """Where the image itself wants the Prometheus listener; empty is not said."""

    host: str = ""
    port: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_auth: str = ""
    tls_client_ca_file: str = ""
    tls: TlsSettings = TlsSettings()

    def secured(self) -> bool:
        """Is TLS asked for? Raises ValueError for half of it."""
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("of METRICS_PROMETHEUS_TLS_CERT and _TLS_KEY only one is set")
        asked = self.tls_client_auth or "none"
        if asked not in ("none", "optional", "require"):
            known = "none, optional, require"
            raise ValueError(f"METRICS_PROMETHEUS_TLS_CLIENT_AUTH: {asked!r} is none of {known}")
        if not self.tls_cert and (asked != "none" or self.tls_client_ca_file):
            raise ValueError("METRICS_PROMETHEUS_TLS_CLIENT_* without METRICS_PROMETHEUS_TLS_CERT")
        if asked != "none" and not self.tls_client_ca_file:
            raise ValueError(
                f"METRICS_PROMETHEUS_TLS_CLIENT_AUTH is {asked}, and no"
                " METRICS_PROMETHEUS_TLS_CLIENT_CA_FILE is set"
            )
        return bool(self.tls_cert)


class Observability(NamedTuple):
    """`names`: the metric names of v1.19 and later (OpenTelemetry), or those before.

    `runtime_interval` is seconds. `service_name` and `pod_name` are the resource's (contract 7.1).
    """

    names: Literal["current", "opencensus"] = "opencensus"
    request_metrics: RequestMetrics = RequestMetrics()
    tracing: Tracing = Tracing()
    request_log: RequestLog = RequestLog()
    profiling: bool = False
    profiling_port: int = 8008
    runtime_interval: float = 15.0
    prometheus: PrometheusServer = PrometheusServer()
    service_name: str = ""
    pod_name: str = ""

    def metrics_address(self) -> tuple[str, int]:
        """Host (empty for all addresses) and port of the Prometheus listener (contract 1.3, 1.5).

        Raises ValueError.
        """
        endpoint = self.request_metrics.endpoint or f"{self.prometheus.host}:"
        host, colon, port = endpoint.rpartition(":")
        port = port or self.prometheus.port or str(METRICS_PORT)
        if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"the metrics endpoint {endpoint!r} is not host:port")
        return host.removeprefix("[").removesuffix("]"), int(port)


class SidecarSettings(NamedTuple):
    """Everything a sidecar is told. `host_ip`, `system_namespace` and `root_ca` may be empty."""

    revision: RevisionSettings
    data_port: int
    tls_port: int
    pod_ip: str
    full_duplex: bool = False
    http2_auto_detection: bool = False
    multi_container_probes: bool = False
    logging: Logging = Logging()
    observability: Observability = Observability()
    tls: TlsSettings = TlsSettings()
    system_namespace: str = ""
    host_ip: str = ""
    root_ca: str = ""


def read_environment(env: Mapping[str, str]) -> SidecarSettings:
    """The settings that `env` holds. Raises EnvironmentFault for the first variable at fault.

    The order is the queue-proxy's, so that of several faults the same one is named.
    """
    read = _Reader(env)
    concurrency = read.whole("CONTAINER_CONCURRENCY", required=True)
    data_port = read.port("QUEUE_SERVING_PORT")
    tls_port = read.port("QUEUE_SERVING_TLS_PORT")
    user_port = read.port("USER_PORT")
    timeout = read.whole("REVISION_TIMEOUT_SECONDS", required=True)
    response_start = read.whole("REVISION_RESPONSE_START_TIMEOUT_SECONDS")
    idle = read.whole("REVISION_IDLE_TIMEOUT_SECONDS")
    probe = read.text("SERVING_READINESS_PROBE")
    full_duplex = read.boolean("ENABLE_HTTP_FULL_DUPLEX")
    detection = read.boolean("ENABLE_HTTP2_AUTO_DETECTION")
    several = read.boolean("ENABLE_MULTI_CONTAINER_PROBES")
    logging = Logging(
        read.text("SERVING_LOGGING_CONFIG", required=True),
        read.text("SERVING_LOGGING_LEVEL", required=True),
    )
    before = _observability_before_v1_19(read)
    namespace = read.text("SERVING_NAMESPACE", required=True)
    service = read.text("SERVING_SERVICE")
    configuration = read.text("SERVING_CONFIGURATION", required=True)
    revision = read.text("SERVING_REVISION", required=True)
    pod = read.text("SERVING_POD", required=True)
    pod_ip = read.text("SERVING_POD_IP", required=True)
    pod_name = read.text("POD_NAME") or read.text("HOSTNAME")
    named = [read.text("OTEL_SERVICE_NAME"), service, configuration, revision, pod_name]
    common: dict[str, Any] = {
        "profiling_port": read.port("PROFILING_PORT", 8008),
        "prometheus": _prometheus_server(read),
        "service_name": next(filter(None, named), ""),
        "pod_name": pod_name,
    }
    config = env.get("OBSERVABILITY_CONFIG")
    observability = before if config is None else _observability(config)
    try:
        probes = parse_probes(probe, user_port, several=several, detect_http2=detection)
    except FieldError as error:
        raise EnvironmentFault(f"SERVING_READINESS_PROBE: {error}") from None
    return SidecarSettings(
        revision=RevisionSettings(
            user_port=user_port,
            pod=pod,
            namespace=namespace,
            revision=revision,
            service=service,
            configuration=configuration,
            http2=data_port == DATA_PORT_H2C,
            container_concurrency=concurrency,
            timeout=float(timeout),
            response_start_timeout=float(response_start),
            idle_timeout=float(idle),
            probes=probes,
        ),
        data_port=data_port,
        tls_port=tls_port,
        pod_ip=pod_ip,
        full_duplex=full_duplex,
        http2_auto_detection=detection,
        multi_container_probes=several,
        logging=logging,
        observability=Observability(**observability, **common),
        tls=read.tls("QUEUE_PROXY"),
        system_namespace=read.text("SYSTEM_NAMESPACE"),
        host_ip=read.text("HOST_IP"),
        root_ca=read.text("ROOT_CA"),
    )


class _Reader:
    """Single variables by Go's rules: an int or bool that is present must not be empty."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env

    def text(self, name: str, *, required: bool = False) -> str:
        value = self._env.get(name)
        if value is None:
            if required:
                raise EnvironmentFault(f"required key {name} missing value")
            return ""
        return value

    def integer(self, name: str, *, required: bool = False) -> int:
        value = self.text(name, required=required)
        if not value and name not in self._env:
            return 0
        match = _INTEGER.fullmatch(value)
        if match is not None and match.lastgroup is not None:
            sign = -1 if match[1] == "-" else 1
            kind = match.lastgroup
            number = sign * int(match[kind].replace("_", ""), _BASES[kind])
            if -(1 << 63) <= number < 1 << 63:
                return number
        raise EnvironmentFault(f"{name}: {value!r} is not an integer")

    def whole(self, name: str, *, required: bool = False) -> int:
        number = self.integer(name, required=required)
        if number < 0:
            raise EnvironmentFault(f"{name}: {number} is negative; 0 or more is allowed")
        return number

    def port(self, name: str, default: int = 0) -> int:
        """Required, unless there is a default."""
        value = self.text(name, required=not default)
        if not value and default:
            return default
        if not re.fullmatch(r"[0-9]{1,5}", value) or not 0 < int(value) < 65536:
            raise EnvironmentFault(f"{name}: {value!r} is not a port; 1 to 65535 is allowed")
        return int(value)

    def boolean(self, name: str) -> bool:
        value = self._env.get(name)
        if value is None or value in _FALSE:
            return False
        if value in _TRUE:
            return True
        allowed = "1 t T TRUE true True 0 f F FALSE false False"
        raise EnvironmentFault(f"{name}: {value!r} is not a boolean; allowed: {allowed}")

    def fraction(self, name: str) -> float:
        value = self._env.get(name)
        if value is None:
            return 0.0
        try:
            number = float(value)
        except ValueError:
            raise EnvironmentFault(f"{name}: {value!r} is not a number") from None
        if value != value.strip() or not 0.0 <= number <= 1.0:
            raise EnvironmentFault(f"{name}: {value!r} is not between 0 and 1")
        return number

    def choices(self, name: str, known: Mapping[str, str]) -> tuple[str, ...]:
        """A list with commas, each of it known by its name; blanks and gaps don't matter."""
        chosen = [item.strip() for item in self.text(name).split(",") if item.strip()]
        for item in chosen:
            if item not in known:
                raise EnvironmentFault(f"{name}: {item!r} is unknown; allowed: {', '.join(known)}")
        return tuple(dict.fromkeys(known[item] for item in chosen))

    def tls(self, prefix: str) -> TlsSettings:
        try:
            return tls_settings(self.text, self.choices, prefix)
        except ValueError as error:
            raise EnvironmentFault(str(error)) from None


def _observability_before_v1_19(read: _Reader) -> dict[str, Any]:
    """The separate variables; no backend given is no metrics, as in those releases."""
    profiling = read.boolean("ENABLE_PROFILING")
    template = read.text("SERVING_REQUEST_LOG_TEMPLATE")
    enabled = read.boolean("SERVING_ENABLE_REQUEST_LOG")
    probes = read.boolean("SERVING_ENABLE_PROBE_REQUEST_LOG")
    metrics = RequestMetrics(
        protocol=read.text("SERVING_REQUEST_METRICS_BACKEND") or "none",
        interval=float(read.whole("SERVING_REQUEST_METRICS_REPORTING_PERIOD_SECONDS")),
        endpoint=read.text("METRICS_COLLECTOR_ADDRESS"),
        domain=read.text("METRICS_DOMAIN"),
    )
    tracing = Tracing(
        debug=read.boolean("TRACING_CONFIG_DEBUG"),
        protocol=read.text("TRACING_CONFIG_BACKEND") or "none",
        sampling_rate=read.fraction("TRACING_CONFIG_SAMPLE_RATE"),
        endpoint=read.text("TRACING_CONFIG_ZIPKIN_ENDPOINT"),
    )
    return {
        "names": "opencensus",
        "request_metrics": metrics,
        "tracing": tracing,
        "request_log": RequestLog(enabled, template, probes),
        "profiling": profiling,
    }


def _observability(text: str) -> dict[str, Any]:
    """OBSERVABILITY_CONFIG (contract section 1.3): defaults, overlaid; unknown keys are ignored."""
    try:
        config = Fields(gojson.parse(text or "{}"))
        metrics = config.object("requestMetrics")
        tracing = config.object("tracing")
        runtime = config.object("runtime")
        return {
            "names": "current",
            "request_metrics": RequestMetrics(
                metrics.one_of("protocol", METRICS_PROTOCOLS),
                metrics.text("endpoint"),
                metrics.nanoseconds("exportInterval", 0.0),
            ),
            "tracing": Tracing(
                tracing.one_of("protocol", TRACING_PROTOCOLS),
                tracing.text("endpoint"),
                tracing.fraction("samplingRate"),
            ),
            "request_log": RequestLog(
                config.boolean("enableRequestLog"),
                config.text("requestLogTemplate", DEFAULT_REQUEST_LOG_TEMPLATE),
                config.boolean("enableProbeRequestLog"),
            ),
            "profiling": runtime.one_of("profiling", ("disabled", "enabled")) == "enabled",
            "runtime_interval": runtime.nanoseconds("exportInterval", 15.0),
        }
    except FieldError as error:
        raise EnvironmentFault(f"OBSERVABILITY_CONFIG: {error}") from None


def _prometheus_server(read: _Reader) -> PrometheusServer:
    names = ("HOST", "PORT", "TLS_CERT", "TLS_KEY", "TLS_CLIENT_AUTH", "TLS_CLIENT_CA_FILE")
    host, port, cert, key, auth, roots = (read.text(f"METRICS_PROMETHEUS_{name}") for name in names)
    tls = read.tls("METRICS_PROMETHEUS")
    return PrometheusServer(host, port, cert, key, auth, roots, tls)
