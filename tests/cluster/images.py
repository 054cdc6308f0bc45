"""The images that run in the test cluster: upstream's, Weir's, and the tests' user container."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from image import __main__ as weir_image
from image import archive
from image.rootfs import Runtime
from tests.cluster import user
from tests.cluster.build import SERVING_COMMANDS, TEST_IMAGES, program
from tests.cluster.node import PAUSE_IMAGE
from tests.cluster.places import BIN, HOLD_IMAGE, IMAGES, SIDECAR_IMAGE, USER_IMAGE, upstream_image

PYTHON = "/usr/bin/python3"


def upstream_archives() -> list[Path]:
    """Docker-archives of the pause program and of what was built from Knative's modules."""
    return [_one_program("pause", PAUSE_IMAGE), *archives((*SERVING_COMMANDS, *TEST_IMAGES))]


def archives(paths: Iterable[str]) -> list[Path]:
    """Docker-archives of programs of Knative's modules that were built.

    Each is one static program; one is written again only when its program changed.
    """
    names = [program(path) for path in paths]
    return [_one_program(name, upstream_image(name)) for name in names]


def own_archives() -> list[Path]:
    """Docker-archives of Weir, with hold and without, and of the user container, built anew."""
    weir, hold, user_container = (IMAGES / f"{name}.tar" for name in ("weir", "hold", "user"))
    names = ("--name", SIDECAR_IMAGE, "--hold", str(hold), "--hold-name", HOLD_IMAGE)
    weir_image.main([str(weir), *names, "--python", PYTHON])
    runtime = Runtime(PYTHON)
    with tempfile.TemporaryDirectory() as stage:
        files = {**archive.base_files(), **runtime.files(Path(stage))}
        files["/user.py"] = Path(user.__file__)
        layers = [archive.layer(files)]
    process = archive.Process((runtime.python, "-ISB", "/user.py"))
    archive.write(user_container, USER_IMAGE, layers, process)
    return [weir, hold, user_container]


def _one_program(program: str, name: str) -> Path:
    out, source = IMAGES / f"{program}.tar", BIN / program
    if not out.exists() or out.stat().st_mtime < source.stat().st_mtime:
        path = f"/ko-app/{program}"  # where upstream's builds have it, and its tests look for it
        layer = archive.layer({**archive.base_files(), path: source})
        archive.write(out, name, [layer], archive.Process((path,)))
    return out
