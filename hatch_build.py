"""The wheel's build hook: with WEIR_COMPILE=1 the modules on the request path are compiled.

mypyc makes C of the typed Python as it is (docs/decisions/036); the sources stay in the wheel, for
tracebacks. Without WEIR_COMPILE the wheel is of Python only and does the same, slower.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPILED = (
    "weir/proxy/policy/*.py",
    "weir/proxy/wire/*.py",
    "weir/proxy/wire/h2/*.py",
    "weir/proxy/exchange*.py",
    "weir/proxy/relay.py",
    "weir/adaptor/podset.py",
    "weir/proxy/observe/instruments.py",
    "weir/proxy/observe/metrics.py",
    "weir/proxy/observe/outcome.py",
)
INTERPRETED = frozenset({"weir/proxy/wire/dial.py"})
"""Of those, the ones that mypyc can't take or that are not worth it."""


class CustomBuildHook(BuildHookInterface[Any]):
    """Adds the compiled modules to a wheel."""

    def dependencies(self) -> list[str]:
        return ["mypy[mypyc]>=1.13", *self.metadata.core.dependencies] if _wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or not _wanted():
            return
        self._stage = tempfile.TemporaryDirectory()
        stage = Path(self._stage.name)
        # mypyc names a module by its path, so the links are followed
        shutil.copytree(Path(self.root, "weir"), stage / "weir", ignore=_BUILT)
        shutil.copy(Path(self.root, "pyproject.toml"), stage / _OPTIONS)
        made = subprocess.run(
            [sys.executable, __file__],
            cwd=stage,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if made.returncode:
            raise SystemExit(f"compiling failed:\n{made.stdout[-4000:]}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        found = stage.rglob("*.so")
        build_data["force_include"] |= {
            str(path): str(path.relative_to(stage)) for path in found if "build" not in path.parts
        }

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_stage"):
            self._stage.cleanup()


_OPTIONS = "mypy.toml"  # another name than setuptools looks for
_BUILT = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")


def _wanted() -> bool:
    return os.environ.get("WEIR_COMPILE", "") not in ("", "0")


def _compile() -> None:
    """Compile in place what is in the working directory."""
    from mypyc.build import mypycify
    from setuptools import setup

    found = {str(path) for pattern in COMPILED for path in Path().glob(pattern)}
    modules = sorted(path for path in found - INTERPRETED if not path.endswith("__init__.py"))
    extensions = mypycify(
        ["--config-file", _OPTIONS, "--ignore-missing-imports", *modules],
        opt_level="3",
        debug_level="0",
        group_name="weir.compiled",
    )
    setup(
        name="weir-compiled",
        packages=[],
        ext_modules=extensions,
        script_args=["--quiet", "build_ext", "--inplace"],
    )


if __name__ == "__main__":
    _compile()
