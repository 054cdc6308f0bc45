"""The files of Weir's image, taken from this machine's Python and from the locked wheels.

Owns which parts of Python go along. There is no base image: the interpreter, the part of its
library that a server may need, the shared libraries they are linked with, and Weir with its
dependencies under /usr/lib/weir. No shell, no package manager.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from image.locked import REPOSITORY, requirements

SITE = "/usr/lib/weir"
COMMAND = "/usr/bin/weir"

_UNUSED = {
    *("test", "tests", "idlelib", "lib2to3", "ensurepip", "venv", "distutils", "tkinter"),
    *("turtledemo", "turtle.py", "pydoc_data", "pydoc.py", "unittest", "doctest.py", "sqlite3"),
    *("dbm", "curses", "xmlrpc", "wsgiref", "site-packages", "dist-packages", "__pycache__"),
    *("msilib", "cgi.py", "pdb.py", "smtpd.py", "mailbox.py", "nntplib.py", "imaplib.py"),
    *("antigravity.py", "this.py", "idle_test", "EXTERNALLY-MANAGED", "sitecustomize.py"),
}
_UNUSED_MODULES = re.compile(
    r"_(codecs_|ctypes_test|curses|dbm|gdbm|lsprof|lzma|bz2|sqlite3|test|tkinter|xx|crypt)"
    r"|audioop|nis|ossaudiodev|readline|xx"
)
"""Of lib-dynload; what is not here does not bring its shared libraries either."""
_NOT_INSTALLED = ("*.pyx", "*.pxd", "*.c", "*.h", "*.pyi", "bin")

_LAUNCHER = """\
#!{python} -ISB
import sys

sys.path.append("{site}")
from weir.cli import main

sys.exit(main())
"""
# -I: nothing of the environment or the working directory decides what is imported;
# -S: no site, which nothing here needs, saves its time at every start; -B: the root is read-only


class Runtime:
    """A Python of this machine that is put into the image."""

    def __init__(self, python: str) -> None:
        self.python = str(Path(python).resolve())
        facts = subprocess.run(
            [self.python, "-c", _FACTS], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        self.library, self.version, self.authorities = Path(facts[0]), facts[1], facts[2]
        if tuple(map(int, self.version.split("."))) < (3, 11):
            raise SystemExit(f"{python} is {self.version}; Weir needs Python 3.11 or newer")

    def files(self, stage: Path) -> dict[str, Path | bytes]:
        """The interpreter, its library and theirs, compiled, by path in the image."""
        copy = stage / str(self.library).lstrip("/")
        shutil.copytree(self.library, copy, ignore=self._unused, symlinks=False)
        self._compile(stage)
        binaries = [Path(self.python), *copy.rglob("*.so")]
        files: dict[str, Path | bytes] = {self.python: Path(self.python)}
        files |= shared_libraries(binaries)
        if Path(self.authorities).exists():
            files[self.authorities] = Path(self.authorities).resolve()
        return files | _tree(stage)

    def weir(self, stage: Path) -> dict[str, Path | bytes]:
        """Weir and what it depends on, compiled, by path in the image."""
        site = stage / SITE.lstrip("/")
        with tempfile.TemporaryDirectory() as folder:
            # the request path is compiled by this Python, so for its version only
            same = self.version == ".".join(map(str, sys.version_info[:2]))
            _run("hatchling", "build", "-t", "wheel", "-d", folder, WEIR_COMPILE=str(int(same)))
            (wheel,) = Path(folder).glob("*.whl")
            locked = Path(folder) / "requirements.txt"
            locked.write_text(requirements())
            target = ("--target", str(site), "--python-version", self.version)
            pip = (
                *("pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"),
                *("--no-compile", "--only-binary=:all:", *target),
            )
            _run(*pip, "--require-hashes", "-r", str(locked))
            _run(*pip, str(wheel))
        for pattern in _NOT_INSTALLED:
            for path in site.rglob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        binaries = list(site.rglob("*.so"))
        if strip := shutil.which("strip"):  # without it they are only bigger
            subprocess.run([strip, "--strip-unneeded", *map(str, binaries)], check=True)
        self._compile(stage)
        launcher = _LAUNCHER.format(python=self.python, site=SITE).encode()
        return {**shared_libraries(binaries), **_tree(stage), COMMAND: launcher}

    def _unused(self, folder: str, names: list[str]) -> set[str]:
        unused = {name for name in names if name in _UNUSED or name.startswith("config-")}
        if folder.endswith("lib-dynload"):
            unused |= {name for name in names if _UNUSED_MODULES.match(name)}
        return unused

    def _compile(self, stage: Path) -> None:
        # unchecked: the sources cannot change, so they are not even looked at
        subprocess.run(
            [
                *(self.python, "-m", "compileall", "-q"),
                *("--invalidation-mode", "unchecked-hash"),
                *("-s", str(stage), "-p", "/", str(stage)),
            ],
            check=True,
        )


_FACTS = """
import ssl, sys, sysconfig
print(sysconfig.get_path("stdlib"))
print("%d.%d" % sys.version_info[:2])
print(ssl.get_default_verify_paths().openssl_cafile)
"""


def shared_libraries(binaries: list[Path]) -> dict[str, Path | bytes]:
    """What `binaries` are linked with, and the loader, at the paths where the loader looks."""
    found: dict[str, Path | bytes] = {}
    for binary in binaries:
        # of a file that is not linked with anything it says so, and fails
        out = subprocess.run(
            ["ldd", str(binary)], check=False, capture_output=True, text=True
        ).stdout
        if "not found" in out:
            raise SystemExit(f"{binary} is linked with a library this machine lacks:\n{out}")
        for path in re.findall(r"(/\S+) \(0x", out):
            found[path] = Path(path).resolve()
    return found


def _tree(stage: Path) -> dict[str, Path | bytes]:
    return {f"/{path.relative_to(stage)}": path for path in stage.rglob("*") if path.is_file()}


def _run(module: str, *arguments: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **environment},
        check=False,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"{module} {arguments[0]} failed:\n{result.stdout}{result.stderr}")
