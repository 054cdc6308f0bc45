"""What a pod offers to those who may call it directly: the value of the header `Weir-Direct`.

Owns its text, both ways. Who offers is proxy/served.py, who takes it is proxy/direct.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from weir.proxy.policy.deadlines import Timeouts


@dataclass(frozen=True, slots=True)
class Offer:
    """What `Weir-Direct` says: the port, and the timers the caller has to keep, in seconds."""

    port: int
    timeouts: Timeouts

    @classmethod
    def parse(cls, value: str) -> Offer:
        """`port=8014; timeout=300; start=0; idle=0`. Unknown fields are ignored.

        Raises ValueError that names the field.
        """
        fields: dict[str, float] = {}
        for part in value.split(";"):
            name, equals, number = part.strip().partition("=")
            if not equals:
                raise ValueError(f"Weir-Direct: {part.strip()!r} is not name=value")
            if name in ("port", "timeout", "start", "idle"):
                try:
                    fields[name] = float(number)
                except ValueError:
                    raise ValueError(f"Weir-Direct: {name}={number!r} is not a number") from None
        port = fields.get("port", 0.0)
        if not (port.is_integer() and 0 < port < 65536):
            raise ValueError(f"Weir-Direct: no usable port in {value!r}")
        seconds = [fields.get(name, 0.0) for name in ("timeout", "start", "idle")]
        if not all(0 <= value < 1e9 for value in seconds):
            raise ValueError(f"Weir-Direct: a timer out of range in {value!r}")
        return cls(int(port), Timeouts(*seconds))

    def __str__(self) -> str:
        t = self.timeouts
        return (
            f"port={self.port}; timeout={t.request:g}; start={t.response_start:g}; idle={t.idle:g}"
        )
