"""`python -m tests.cluster up|images|down|kubectl …`: the test cluster by hand."""

import os
import signal
import sys

from tests.cluster import cluster, keys
from tests.cluster.images import own_archives
from tests.cluster.places import BIN

USAGE = "usage: python -m tests.cluster up | images | down | status | kubectl ARGUMENT..."


def main(arguments: list[str]) -> int:
    # the interrupt also where a script started this in the background, which ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        match arguments:
            case ["up"]:
                cluster.up()
            case ["down"]:
                cluster.down()
            case ["images"]:
                for archive in own_archives():
                    cluster.load(archive)
            case ["status"]:
                print("up" if cluster.is_up() else "down")
                return 0 if cluster.is_up() else 1
            case ["kubectl", *rest]:
                program = str(BIN / "kubectl")
                os.execv(program, [program, "--kubeconfig", str(keys.ADMIN), *rest])
            case _:
                print(USAGE, file=sys.stderr)
                return 2
    except cluster.Failed as failure:
        print(f"cluster: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
