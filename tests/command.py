"""The `weir` that tests and benchmarks start: the one of the sources, or the compiled one."""

import os
import sys
from pathlib import Path

COMPILED = Path(__file__).parents[1] / "dist" / "compiled"
"""Where `make compiled` puts it."""


def weir(command: str, *, compiled: bool | None = None) -> list[str]:
    """The command line; WEIR_COMPILED in the environment decides what the caller does not."""
    started = [str(Path(sys.executable).with_name("weir")), command]
    if "WEIR_COMPILED" in os.environ if compiled is None else compiled:
        return ["/usr/bin/env", f"PYTHONPATH={COMPILED}", *started]
    return started
