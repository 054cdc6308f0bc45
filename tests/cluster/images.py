"""The images that run in the test cluster, besides Weir's own.

Each is one static program; a docker-archive is written again only when its program changed.
"""

from pathlib import Path

from image import archive
from tests.cluster.build import SERVING_COMMANDS, TEST_IMAGES
from tests.cluster.node import PAUSE_IMAGE
from tests.cluster.places import BIN, IMAGES, upstream_image


def upstream_archives() -> list[Path]:
    """Docker-archives of the pause program and of what was built from Knative's modules."""
    names = {name: upstream_image(name) for name in (*SERVING_COMMANDS, *TEST_IMAGES)}
    return [_one_program("pause", PAUSE_IMAGE), *(_one_program(*pair) for pair in names.items())]


def _one_program(program: str, name: str) -> Path:
    out, source = IMAGES / f"{program}.tar", BIN / program
    if not out.exists() or out.stat().st_mtime < source.stat().st_mtime:
        layer = archive.layer({**archive.base_files(), f"/{program}": source})
        archive.write(out, name, [layer], archive.Process((f"/{program}",)))
    return out
