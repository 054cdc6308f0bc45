"""Container images as docker-archives, written without a daemon and the same bytes every time.

Owns the archive's format and what makes it reproducible: sorted names, no times, no owners. Refuses
to know what an image is for.
"""

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

NOBODY = 65532
"""The numeric user of an image: the kubelet refuses a name under `runAsNonRoot`."""

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Process:
    """What runs in a container of the image."""

    entrypoint: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    user: int = NOBODY


def layer(files: Mapping[str, Path | bytes]) -> bytes:
    """A layer of files by their absolute path in the image, from a file, a link or bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for folder in _folders(files):
            entry = tarfile.TarInfo(folder.lstrip("/"))
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "/tmp" else 0o755
            tar.addfile(entry)
        for path, content in sorted(files.items()):
            entry = tarfile.TarInfo(path.lstrip("/"))
            if isinstance(content, bytes):
                entry.mode, entry.size = 0o755 if content.startswith(b"#!") else 0o644, len(content)
                tar.addfile(entry, io.BytesIO(content))
            elif content.is_symlink():
                entry.type, entry.linkname = tarfile.SYMTYPE, str(content.readlink())
                tar.addfile(entry)
            else:
                status = content.stat()
                entry.mode = 0o755 if status.st_mode & 0o100 else 0o644
                entry.size = status.st_size
                with content.open("rb") as source:
                    tar.addfile(entry, source)
    return buffer.getvalue()


def base_files() -> dict[str, Path | bytes]:
    """What any image of one program needs to have a user."""
    return {
        "/etc/passwd": f"root:x:0:0::/:\nnonroot:x:{NOBODY}:{NOBODY}::/:\n".encode(),
        "/etc/group": f"root:x:0:\nnonroot:x:{NOBODY}:\n".encode(),
        "/etc/nsswitch.conf": b"hosts: files dns\n",
    }


def write(path: Path, name: str, layers: Iterable[bytes], process: Process) -> None:
    """Write a docker-archive that `docker load` and `ctr images import` take, called `name`."""
    blobs = [(f"{hashlib.sha256(data).hexdigest()}.tar", data) for data in layers]
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", **process.environment}
    config = json.dumps(
        {
            "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {
                "User": str(process.user),
                "Entrypoint": list(process.entrypoint),
                "Cmd": list(process.arguments) or None,
                "Env": [f"{key}={value}" for key, value in environment.items()],
                "WorkingDir": "/",
            },
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{name.removesuffix('.tar')}" for name, _ in blobs],
            },
            "history": [{"created_by": "weir"} for _ in blobs],
        },
        sort_keys=True,
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps(
        [{"Config": config_name, "RepoTags": [name], "Layers": [blob for blob, _ in blobs]}]
    ).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with tarfile.open(unfinished, "w", format=tarfile.GNU_FORMAT) as tar:
        for member, data in [*blobs, (config_name, config), ("manifest.json", manifest)]:
            entry = tarfile.TarInfo(member)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    unfinished.replace(path)


def _folders(files: Iterable[str]) -> list[str]:
    folders = {"/tmp"}
    for path in files:
        folders.update(str(parent) for parent in Path(path).parents)
    return sorted(folders - {"/"})
