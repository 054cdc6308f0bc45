"""The real queue-proxy, built from the release that the Go module proxy serves.

Owns where the binary is and how it comes there: `queue/go.mod` pins knative.dev/serving, the
binary lies in the user's cache under a name made of everything it depends on. It is a witness of
how things were in Knative 1.15; the contract is what counts (docs/deviations.md).
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from tests.pods import go_command, why_no_go

RELEASE = "knative.dev/serving v0.42.2 (Knative 1.15)"
PACKAGE = "knative.dev/serving/cmd/queue"
_MODULE = Path(__file__).with_name("queue")


def why_no_queue_proxy() -> str | None:
    """None, or the reason why there is nothing to compare with. Does not build."""
    if _binary().exists():
        return None
    return why_no_go()


@functools.cache
def queue_proxy() -> Path:
    """The binary; the first call on a machine builds it, which takes about a minute.

    Raises RuntimeError with the compiler's words when it can't be built.
    """
    binary = _binary()
    if binary.exists():
        return binary
    go = go_command()
    if go is None:
        raise RuntimeError("no Go toolchain to build the queue-proxy with")
    binary.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=binary.parent) as folder:
        made = Path(folder) / "queue"
        build = subprocess.run(
            [go, "build", "-trimpath", "-o", made, PACKAGE],
            cwd=_MODULE,
            env={**os.environ, "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
        )
        if build.returncode:
            raise RuntimeError(f"go build {PACKAGE}: {build.stderr.strip()[-2000:]}")
        made.rename(binary)  # at once: another run may be building it as well
    return binary


def _binary() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    pins = b"".join((_MODULE / name).read_bytes() for name in ("go.mod", "go.sum"))
    return cache / "weir" / f"queue-proxy-{hashlib.sha256(pins).hexdigest()[:12]}"
