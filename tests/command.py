"""The `weir` that tests start: the one of the sources, or the compiled one."""

import os
import sys
from pathlib import Path

COMPILED = Path(__file__).parents[1] / "dist" / "compiled"
"""Where `make compiled` puts it."""


def weir(command: str) -> list[str]:
    """The command line; with WEIR_COMPILED in the environment it is the compiled one's."""
    started = [str(Path(sys.executable).with_name("weir")), command]
    if "WEIR_COMPILED" in os.environ:
        return ["/usr/bin/env", f"PYTHONPATH={COMPILED}", *started]
    return started
