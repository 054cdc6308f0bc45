"""What each loader of the eBPF programs costs at the agent's start: time and memory.

A process of its own loads and says what it took; the compiler that bcc brings runs in a child of
it, whose largest size is told apart.
"""

import json
import statistics
import subprocess
import sys
from typing import get_args

from weir.proxy.kernel import Loader

ROUNDS = 5
_LOAD = """
import json, resource, sys, time
from pathlib import Path
from weir.proxy.kernel import Kernel

def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

before, began = private(), time.monotonic()
kernel = Kernel.load(loader=sys.argv[1])
took = time.monotonic() - began
child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"ms to load": took * 1e3, "MB private": private() / 1024,
                  "MB by loading": (private() - before) / 1024, "MB largest child": child / 1024}))
kernel.close()
"""


def measure(seconds: float) -> dict[str, float]:
    """Medians of a few loads; `seconds` is not used. Raises RuntimeError if one can't load here."""
    found: dict[str, float] = {}
    for loader in get_args(Loader):
        runs = []
        for _ in range(ROUNDS):
            done = subprocess.run(
                [sys.executable, "-P", "-c", _LOAD, loader],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            runs.append(json.loads(done.stdout))
        for name in runs[0]:
            found[f"{loader} | {name}"] = statistics.median(run[name] for run in runs)
    return found
