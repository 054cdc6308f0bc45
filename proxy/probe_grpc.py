"""One grpc probe: grpc.health.v1.Health/Check over plaintext HTTP/2 (contract section 4.3).

Owns the call and its two protobuf messages, which are small enough to be written by hand. When to
try and how long it may take is the schedule's business (`weir.proxy.probes`).
"""

from __future__ import annotations

from weir.proxy import contract, probe_http2
from weir.proxy.contract import GrpcCheck, Probe
from weir.proxy.probe_http import DIAL_SECONDS, ProbeFailed
from weir.proxy.probe_http2 import Response
from weir.proxy.wire.dial import Dial, connect_once

_UNIMPLEMENTED = 12
_STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
_SERVING = 1


class GrpcHealthCheck:
    """`run` asks once. `limit` is the time a try may take, which the server is told."""

    def __init__(self, probe: Probe, check: GrpcCheck, dial: Dial, limit: float) -> None:
        self._host, self._port = probe.host, probe.port
        self._dial = dial
        self._message = _request(check.service)
        self._fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", f"{probe.host}:{probe.port}"),
            (":path", "/grpc.health.v1.Health/Check"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            ("grpc-timeout", f"{limit * 1000:.0f}m"),
            ("user-agent", contract.PROBE_AGENT.decode()),
        ]

    async def run(self) -> None:
        """Returns when the service is serving. Raises ProbeFailed, OSError or TransportError."""
        sock = await connect_once(self._dial, self._host, self._port, DIAL_SECONDS)
        response = await probe_http2.call(sock, self._fields, self._message, whole=True)
        if response.status != 200:
            raise ProbeFailed(f"health rpc probe failed: HTTP status {response.status}")
        _judge_status(response)
        status = _serving_status(response.body)
        if status != _SERVING:
            name = _STATUSES[status] if status < len(_STATUSES) else status
            raise ProbeFailed(f"service unhealthy (responded with {name})")


def _request(service: str) -> bytes:
    """The message HealthCheckRequest{service = 1} with gRPC's prefix."""
    name = service.encode()
    message = b"\x0a" + _varint(len(name)) + name if name else b""
    return b"\0" + len(message).to_bytes(4, "big") + message


def _varint(value: int) -> bytes:
    octets = []
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*octets, value))


def _judge_status(response: Response) -> None:
    """gRPC's own status, which is in the trailers, or in the headers when there is no body."""
    fields = response.trailers or response.headers
    code = fields.get(b"grpc-status", b"")
    if code == b"0":
        return
    text = fields.get(b"grpc-message", b"").decode("latin-1")
    if not code.isdigit() or len(code) > 3:
        raise ProbeFailed("health rpc probe failed: the answer is no gRPC")
    if int(code) == _UNIMPLEMENTED:
        raise ProbeFailed(
            f"this server does not implement grpc.health.v1.Health: {text or 'unimplemented'}"
        )
    raise ProbeFailed(f"health rpc probe failed: code {int(code)}: {text}")


def _serving_status(body: bytes) -> int:
    """`status`, field 1 of the HealthCheckResponse; one that is not sent is 0."""
    if len(body) < 5 or body[0] or int.from_bytes(body[1:5], "big") != len(body) - 5:
        raise ProbeFailed("health rpc probe failed: the message is cut or compressed")
    message = body[5:]
    status = at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        if key & 7 == 0:
            value, at = _read_varint(message, at)
            if key == 0x08:
                status = value
        elif key & 7 == 2:  # a field of a later version
            length, at = _read_varint(message, at)
            at += length
        else:
            raise ProbeFailed("health rpc probe failed: the message is no HealthCheckResponse")
    return status


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        octet = message[at]
        at += 1
        value |= (octet & 0x7F) << shift
        shift += 7
        if octet < 0x80:
            return value, at
    raise ProbeFailed("health rpc probe failed: the message is cut")
