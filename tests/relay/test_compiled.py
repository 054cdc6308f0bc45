"""The run of these tests against the compiled package is one (docs/decisions/036)."""

import importlib
import os

import pytest


@pytest.mark.skipif("WEIR_COMPILED" not in os.environ, reason="this run is of the sources")
@pytest.mark.parametrize(
    "module",
    [
        *("proxy.relay", "proxy.exchange1", "proxy.exchange2", "proxy.policy.breaker"),
        *("proxy.wire.head", "proxy.wire.server", "proxy.wire.h2.endpoint", "proxy.wire.h2.hpack"),
        "proxy.observe.metrics",
    ],
)
def test_what_is_tested_is_the_compiled_module(module: str) -> None:
    assert str(importlib.import_module(f"weir.{module}").__file__).endswith(".so")
