"""Kernels of Debian's, unpacked into a cache and never installed.

Owns the suites that are looked through, an apt of its own for them (its lists and its cache: the
machine's are not touched) and what of a package is kept. Knows nothing of booting.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weir/kernels"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# small ones that have a kernel each: 5.10, 6.1, 6.12 and what was newest since
SUITES = (
    ("debian-security", "bullseye-security"),
    ("debian-security", "bookworm-security"),
    ("debian", "bookworm-backports"),
    ("debian", "trixie-backports"),
)
_IMAGE = re.compile(r"linux-image-(\d+\.\d+)\.\d[\w.+]*(-[\w.]*\d)?-amd64")
# modules, but not the many drivers of hardware that no virtual machine has
_KEPT = re.compile(r"lib/modules/[^/]+/(?!kernel/drivers/(?!virtio/|net/[^/]+$))")


class Failed(Exception):
    """What could not be had, and what to do."""


@dataclass(frozen=True)
class Kernel:
    """`version` is what was asked for ("6.1"), `release` what `uname -r` will say."""

    version: str
    release: str
    image: Path
    modules: Path  # what has to be found at /lib/modules


def kernel(version: str) -> Kernel:
    """Debian's newest of "6.1", or of all ("newest"). One that was fetched is used again, until
    its folder is removed. Raises Failed."""
    if version == "newest":
        _update()
        version = max(_packages(), key=_numbers)
    folder = CACHE / version
    if not folder.exists():
        _fetch(version, folder)
    return _unpacked(version, folder)


def _fetch(version: str, folder: Path) -> None:
    packages = _packages()
    if version not in packages:
        _update()
        packages = _packages()
    if version not in packages:
        known = ", ".join(sorted(packages, key=_numbers)) or "none"
        raise Failed(f"Debian has no Linux {version} now; it has: {known}")
    package = packages[version]
    release = package.removeprefix("linux-image-")
    depends = _apt("apt-cache", "depends", package).split()
    # newer ones are in parts, all of them named by the release
    parts = {package, *(name for name in depends if name.endswith(release))}
    archives = CACHE / "apt/cache/archives"
    for left in archives.glob("*.deb"):
        left.unlink()
    _apt("apt-get", "--quiet=2", "download", *sorted(parts), cwd=archives)
    half = CACHE / f"{version}.part"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    for archive in archives.glob("*.deb"):
        _unpack(archive, half)
        archive.unlink()
    made = _unpacked(version, half)
    _run("depmod", "-b", str(made.modules.parents[1]), made.release)
    half.rename(folder)


def _unpacked(version: str, folder: Path) -> Kernel:
    modules = folder / "lib/modules"
    [release] = (each.name for each in modules.iterdir())
    return Kernel(version, release, folder / "vmlinuz", modules)


def _unpack(archive: Path, into: Path) -> None:
    """The kernel itself as "vmlinuz", and "lib/modules", from wherever a Debian has them."""
    with (
        subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE
        ) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            name = member.name.removeprefix("./").removeprefix("usr/")
            if name.rpartition("/")[2].partition("-")[0] == "vmlinuz":
                member.name = "vmlinuz"
            elif _KEPT.match(name):
                member.name = name
            else:
                continue
            tar.extract(member, into, filter="data")
    if process.returncode:
        raise Failed(f"{archive} can't be unpacked")


def _packages() -> dict[str, str]:
    """The newest package of each version, by what apt knows now."""
    found: dict[str, str] = {}
    names = _apt("apt-cache", "search", "--names-only", "^linux-image-[0-9].*-amd64$")
    for line in names.splitlines():
        name = line.split(" ")[0]
        match = _IMAGE.fullmatch(name)
        if match and _numbers(name) > _numbers(found.get(match[1], "")):
            found[match[1]] = name
    return found


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _update() -> None:
    _apt("apt-get", "--quiet=2", "update")


def _apt(*command: str, cwd: Path | None = None) -> str:
    own = CACHE / "apt"
    sources = own / "sources.list"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (own / folder).mkdir(parents=True, exist_ok=True)
    mirrors = _mirrors()
    sources.write_text(
        "".join(
            f"deb [arch=amd64 signed-by={KEYRING}] {mirrors[part]} {suite} main\n"
            for part, suite in SUITES
        )
    )
    options = {
        "Dir::Etc::SourceList": str(sources),
        "Dir::Etc::SourceParts": "-",
        "Dir::Etc::Preferences": "-",
        "Dir::Etc::PreferencesParts": "-",
        "Dir::State": str(own / "state"),
        "Dir::State::status": os.devnull,  # nothing is installed, so nothing depends on anything
        "Dir::Cache": str(own / "cache"),
        "Acquire::Languages": "none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "APT::Sandbox::User": "root",  # apt's own user may not look into a home
    }
    told = [argument for name, value in options.items() for argument in ("-o", f"{name}={value}")]
    program, *rest = command
    return _run(program, *told, *rest, cwd=cwd)


@cache
def _mirrors() -> dict[str, str]:
    """Where this machine's own apt has "debian" and "debian-security" from."""
    told = ("indextargets", "--no-release-info", "--format", "$(REPO_URI)")
    addresses = _run("apt-get", *told, "Created-By: Packages").split()
    found = {address.rstrip("/").rpartition("/")[2]: address for address in addresses}
    missing = {part for part, _ in SUITES} - found.keys()
    if missing:
        raise Failed(f"apt has no source that ends with /{' or /'.join(sorted(missing))}")
    return found


def _run(*command: str, cwd: Path | None = None) -> str:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    program = shutil.which(command[0], path=path)
    if program is None:
        raise Failed(f"needs {command[0]}: ./deps.sh python3 .venv machine (as root)")
    done = subprocess.run([program, *command[1:]], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{command[0]}: {done.stderr.strip() or 'failed'}")
    return done.stdout
