"""A bpffs of a test's own, and a loader in a process of its own that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weir.proxy.kernel import PodTarget

LOADER = """
import os, sys, signal
from pathlib import Path
from weir.proxy.kernel import Kernel, PodTarget

root, verb = Path(sys.argv[1]), sys.argv[2]
targets = [PodTarget(name, Path(net), Path(cgroup), tuple(addresses.split(",")), 8080, 8014)
           for name, net, cgroup, addresses in (each.split("|") for each in sys.argv[3:])]
print("begin", flush=True)
while True:
    kernel = Kernel.load(root=root)
    attached = [kernel.attach(target) for target in targets]
    for pod in attached:
        pod.adopt_listeners()
        pod.open_direct()
    print("attached", flush=True)
    if verb == "stay":
        signal.pause()
    for pod in attached:
        pod.detach()
    kernel.close()
    print("detached", flush=True)
"""


@contextmanager
def mounted(at: Path) -> Iterator[Path]:
    """A directory for pins below a fresh bpffs, which goes with everything in it."""
    subprocess.run(["mount", "-t", "bpf", "bpf", str(at)], check=True)
    try:
        yield at / "weir"
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


class Loader:
    """`verb`: `stay` once attached, or attach and detach without end (`churn`)."""

    def __init__(self, root: Path, verb: str, *targets: PodTarget) -> None:
        told = [f"{t.name}|{t.netns}|{t.cgroup}|{','.join(t.addresses)}" for t in targets]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", LOADER, str(root), verb, *told],
            stdout=subprocess.PIPE,
            cwd=os.sep,
        )
        self.said("begin")

    def said(self, what: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.decode().strip() == what:
                return
        raise AssertionError(f"the loader ended before it {what}")

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
