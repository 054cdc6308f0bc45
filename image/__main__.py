"""`python -m image OUT.tar`: build Weir's image from this machine, as a docker-archive."""

import argparse
import sys
import tempfile
from pathlib import Path

from image import archive
from image.rootfs import COMMAND, Runtime


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m image", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.tar")
    parser.add_argument("--name", default="dev.local/weir:dev", help="what the image is called")
    parser.add_argument(
        "--python",
        default="/usr/bin/python3",
        help="the Python to put into it (default %(default)s, the distribution's)",
    )
    args = parser.parse_args(arguments)
    runtime = Runtime(args.python)
    with tempfile.TemporaryDirectory() as library, tempfile.TemporaryDirectory() as site:
        base = {**archive.base_files(), **runtime.files(Path(library))}
        weir = runtime.weir(Path(site))
        more = {path: content for path, content in weir.items() if path not in base}
        layers = [archive.layer(base), archive.layer(more)]
    # Knative gives neither command nor arguments: what runs in a pod is the sidecar
    process = archive.Process((COMMAND,), ("sidecar",))
    archive.write(args.out, args.name, layers, process)
    sizes = " + ".join(f"{len(data) / 1e6:.1f}" for data in layers)
    print(f"{args.out}: {args.name}, Python {runtime.version} + Weir = {sizes} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
