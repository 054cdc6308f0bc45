"""What is compared: each module is one part of the contract, importing it registers it."""

from tests.contract.scenarios import (
    drain,
    failures,
    headers,
    load,
    malformed,
    probes,
    process,
    responses,
    timers,
    upgrades,
)

__all__ = [
    "drain",
    "failures",
    "headers",
    "load",
    "malformed",
    "probes",
    "process",
    "responses",
    "timers",
    "upgrades",
]
