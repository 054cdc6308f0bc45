"""The protobuf message that the autoscaler scrapes (contract section 5.1), encoded.

Owns the bytes. Where the numbers come from is the meter's business.
"""

from __future__ import annotations

from struct import pack

from weir.proxy.contract import STAT_PERIOD_SECONDS
from weir.proxy.policy.meter import Report


def encode(pod: str, report: Report | None = None, uptime: float = 0.0) -> bytes:
    """A `Stat`; `report` None before the first period ended. `uptime` in seconds.

    proto3: fields that are zero are left out.
    """
    name = pod.encode()
    message = b"\x0a" + _varint(len(name)) + name if name else b""
    if report is None:
        return message
    values = (
        report.average,
        report.average_proxied,
        report.count / STAT_PERIOD_SECONDS,
        report.count_proxied / STAT_PERIOD_SECONDS,
        uptime,
    )
    for number, value in enumerate(values, 2):
        if value:
            message += pack("<Bd", number << 3 | 1, value)
    return message


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)
