"""The part of requirements.lock that Weir needs where it runs: `python -m image.locked`.

The lock also holds what developing it takes. Prints requirements with their hashes, for pip.
"""

import re
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def requirements(repository: Path = REPOSITORY) -> str:
    """The project's dependencies and theirs, without extras and groups, as they are locked."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    blocks, wanted_by = _lock((repository / "requirements.lock").read_text())
    needed = {_name(line) for line in project["dependencies"]}
    while more := {name for name in blocks if wanted_by[name] & needed} - needed:
        needed |= more
    missing = needed - blocks.keys()
    if missing:
        raise SystemExit(f"not in requirements.lock: {', '.join(sorted(missing))}: run make lock")
    return "".join(blocks[name] for name in sorted(needed))


def _lock(text: str) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Each package's lines, and who wants it (the comments that uv writes)."""
    blocks: dict[str, str] = {}
    wanted_by: dict[str, set[str]] = {}
    for block in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE):
        if "==" not in block.partition("\n")[0]:
            continue  # the heading
        name = _name(block)
        lines = block.splitlines(keepends=True)
        comments = [line.strip(" #\n") for line in lines if line.strip().startswith("#")]
        wanted_by[name] = {_name(line.removeprefix("via").strip()) for line in comments if line}
        blocks[name] = "".join(line for line in lines if not line.strip().startswith("#"))
    return blocks, wanted_by


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


if __name__ == "__main__":
    sys.stdout.write(requirements())
