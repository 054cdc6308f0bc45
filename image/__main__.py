"""`python -m image OUT.tar`: build Weir's images from this machine, as docker-archives.

Two variants: of the first the sidecar runs in a pod, at once; of the second, `--hold`, weir-hold,
which lends the pod's ports to a node agent and becomes the sidecar when there is none. They share
all layers but the one that has weir-hold.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from image import archive
from image.locked import REPOSITORY
from image.rootfs import COMMAND, Runtime

HOLD = "/usr/bin/weir-hold"
HOLD_BINARY = REPOSITORY / "hold" / "weir-hold"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m image", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.tar")
    parser.add_argument("--hold", type=Path, metavar="OUT.tar", help="write that variant as well")
    parser.add_argument("--hold-name", default="dev.local/weir-hold:dev")
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
    # Knative gives neither command nor arguments: what runs in a pod is the image's own choice
    sidecar = (COMMAND, "sidecar")
    _write(args.out, args.name, layers, archive.Process(sidecar[:1], sidecar[1:]), runtime)
    if args.hold is not None:
        layers.append(archive.layer({HOLD: _built(HOLD_BINARY)}))
        _write(args.hold, args.hold_name, layers, archive.Process((HOLD,), sidecar), runtime)
    return 0


def _write(
    out: Path, name: str, layers: list[bytes], process: archive.Process, runtime: Runtime
) -> None:
    archive.write(out, name, layers, process)
    sizes = " + ".join(f"{len(data) / 1e6:.1f}" for data in layers)
    print(f"{out}: {name}, Python {runtime.version} + Weir = {sizes} MB")


def _built(program: Path) -> Path:
    if not program.exists():
        raise SystemExit(f"{program} is not built: run make hold")
    return program


if __name__ == "__main__":
    sys.exit(main())
