"""What is compared: each module is one part of the contract, importing it registers it."""

from tests.contract.scenarios import (
    drain,
    failures,
    h2c_upgrade,
    headers,
    http2,
    http2_fields,
    load,
    logs,
    malformed,
    probes,
    process,
    responses,
    timers,
    tls,
    upgrades,
)

__all__ = [
    "drain",
    "failures",
    "h2c_upgrade",
    "headers",
    "http2",
    "http2_fields",
    "load",
    "logs",
    "malformed",
    "probes",
    "process",
    "responses",
    "timers",
    "tls",
    "upgrades",
]
