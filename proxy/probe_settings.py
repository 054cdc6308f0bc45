"""SERVING_READINESS_PROBE: Kubernetes' JSON of a probe, or of one for each container.

Owns what the controller may send (contract section 1.2) and how each field is called when it can't
be used. Running a probe is the prober's business (`weir.proxy.probes`).
"""

from __future__ import annotations

from weir.proxy import gojson
from weir.proxy.contract import GrpcCheck, HttpGet, Probe
from weir.proxy.gojson import FieldError, Fields

_HANDLERS = ("httpGet", "tcpSocket", "grpc")


def parse_probes(
    text: str, user_port: int, *, several: bool = False, detect_http2: bool = False
) -> tuple[Probe, ...]:
    """The probes that must all pass; none for an empty text. Raises FieldError.

    `several`: the text holds an array. A null in it is a container without a probe, which counts
    as ready. A named port is the `user_port`, and so is one that isn't given.
    """
    if not text:
        return ()
    document = gojson.parse(text)
    if several:
        if document is not None and not isinstance(document, list):
            raise FieldError("document: expected an array of probes")
        named = [(f"[{i}]", probe) for i, probe in enumerate(document or [])]
    else:
        named = [("", document)]
    return tuple(
        _probe(Fields(value, path), user_port, detect_http2)
        for path, value in named
        if value is not None
    )


def _probe(fields: Fields, user_port: int, detect_http2: bool) -> Probe:
    """The scalars that the kubelet alone applies (initialDelaySeconds and so on) are only typed."""
    for name in ("initialDelaySeconds", "failureThreshold"):
        fields.integer(name)
    fields.integer("terminationGracePeriodSeconds", bits=64)
    period = fields.whole("periodSeconds")
    timeout = fields.whole("timeoutSeconds")
    threshold = fields.whole("successThreshold")
    http, tcp, grpc = (fields.optional(name) for name in _HANDLERS)
    handler = http or tcp or grpc
    if handler is None:
        where = f"{fields.path}: " if fields.path else ""
        raise FieldError(f"{where}no handler that can be run here; allowed: {', '.join(_HANDLERS)}")
    return Probe(
        port=_port(handler, user_port),
        host="127.0.0.1" if handler is grpc else handler.text("host") or "127.0.0.1",
        http=_http_get(http, detect_http2) if http else None,
        grpc=GrpcCheck(grpc.text("service")) if grpc and handler is grpc else None,
        period=float(period),
        timeout=float(timeout or 1),
        success_threshold=threshold or 1,
    )


def _http_get(fields: Fields, detect_http2: bool) -> HttpGet:
    scheme = fields.text("scheme") or "HTTP"
    if scheme.upper() not in ("HTTP", "HTTPS"):
        fields.fault("scheme", f"{scheme!r} is unknown; allowed: HTTP, HTTPS")
    headers = tuple((f.text("name"), f.text("value")) for f in fields.objects("httpHeaders"))
    for i, (name, value) in enumerate(headers):
        if not name or any(c in name + value for c in "\r\n\0"):
            fields.fault(f"httpHeaders[{i}]", "neither may be empty nor have a line break")
    return HttpGet(fields.text("path"), headers, scheme.lower(), detect_http2)


def _port(fields: Fields, user_port: int) -> int:
    """A number, digits, or a name."""
    port = fields.any("port")
    if isinstance(port, str) and port.isascii() and port.isdigit():
        port = int(port)
    elif port is None or port == 0 or (isinstance(port, str) and port):
        return user_port
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
        fields.fault("port", f"{port!r} is neither a port (1 to 65535) nor a port's name")
    return port
