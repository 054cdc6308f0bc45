"""Become a command of `weir run`: end with it, and inside a pod if one is given.

A process of its own because joining a cgroup and a network namespace, and asking for a signal
when the parent dies, must happen in the command's process before it starts.
"""

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1


def command(
    argv: Sequence[str], netns: Path | None = None, cgroup: Path | None = None
) -> list[str]:
    """`argv`, to be started by this process: it ends with us, and runs inside the pod."""
    pod = ["--netns", str(netns)] if netns is not None else []
    pod += ["--cgroup", str(cgroup)] if cgroup is not None else []
    own = (sys.executable, "-P", "-m", "weir.local.enter", "--parent", str(os.getpid()))
    return [*own, *pod, "--", *argv]


def main(argv: list[str]) -> int:
    """Exits 127 when the command doesn't exist, 126 when it can't be started."""
    parser = argparse.ArgumentParser(prog="weir-enter")
    parser.add_argument(
        "--parent", type=int, required=True, help="pid of the weir run we belong to"
    )
    parser.add_argument("--netns", type=Path)
    parser.add_argument("--cgroup", type=Path)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args(argv)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != args.parent:  # it died before we asked
        return 1
    if args.cgroup is not None:
        (args.cgroup / "cgroup.procs").write_text(str(os.getpid()))
    if args.netns is not None:
        descriptor = os.open(args.netns, os.O_RDONLY)
        if libc.setns(descriptor, CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, f"setns {args.netns}: {os.strerror(code)}")
        os.close(descriptor)
    try:
        os.execvp(args.command[0], args.command)
    except OSError as e:
        print(f"weir: can't start {args.command[0]!r}: {e.strerror}", file=sys.stderr)
        return 127 if isinstance(e, FileNotFoundError) else 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
