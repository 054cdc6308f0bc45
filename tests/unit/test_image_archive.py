"""A docker-archive is what its readers expect, and the same bytes for the same files."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

from image import archive, locked


def _image(path: Path) -> Path:
    program = path / "program"
    program.write_bytes(b"#!/bin/true\n")
    program.chmod(0o755)
    layer = archive.layer({**archive.base_files(), "/usr/bin/program": program})
    out = path / "image.tar"
    process = archive.Process(("/usr/bin/program",), ("sidecar",), {"A": "b"})
    archive.write(out, "dev.local/program:1", [layer], process)
    return out


def _members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        return {name: file.read() for name, file in files.items() if file is not None}


def test_its_manifest_names_layers_whose_digests_the_configuration_has(tmp_path: Path) -> None:
    members = _members(_image(tmp_path))
    (manifest,) = json.loads(members["manifest.json"])
    config = json.loads(members[manifest["Config"]])
    assert manifest["RepoTags"] == ["dev.local/program:1"]
    assert config["rootfs"]["diff_ids"] == [
        f"sha256:{hashlib.sha256(members[layer]).hexdigest()}" for layer in manifest["Layers"]
    ]


def test_its_user_is_a_number_that_is_not_roots(tmp_path: Path) -> None:
    members = _members(_image(tmp_path))
    (manifest,) = json.loads(members["manifest.json"])
    process = json.loads(members[manifest["Config"]])["config"]
    assert int(process["User"]) > 0
    assert (process["Entrypoint"], process["Cmd"]) == (["/usr/bin/program"], ["sidecar"])
    assert "A=b" in process["Env"]


def test_files_are_roots_and_have_no_time_and_folders_come_before_them(tmp_path: Path) -> None:
    members = _members(_image(tmp_path))
    (layer,) = json.loads(members["manifest.json"])[0]["Layers"]
    with tarfile.open(fileobj=io.BytesIO(members[layer])) as tar:
        found = {member.name: member for member in tar}
    assert {(m.uid, m.gid, m.mtime) for m in found.values()} == {(0, 0, 0)}
    assert found["usr/bin/program"].mode == 0o755
    assert found["tmp"].mode == 0o1777
    names = list(found)
    assert names.index("usr") < names.index("usr/bin") < names.index("usr/bin/program")


def test_the_same_files_make_the_same_archive(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    assert _image(tmp_path / "one").read_bytes() == _image(tmp_path / "two").read_bytes()


def test_what_is_locked_for_the_image_is_what_runs_and_nothing_of_the_tests() -> None:
    lines = [line for line in locked.requirements().splitlines() if "==" in line]
    names = {line.partition("==")[0] for line in lines}
    assert {"uvloop", "httptools", "aiomqtt", "paho-mqtt"} <= names
    assert not {"pytest", "mypy", "amqtt", "aiohttp"} & names
    assert locked.requirements().count("--hash=sha256:") >= len(lines)
