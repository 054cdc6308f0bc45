"""What a container may have in the place of its certificate, and that nothing leads out of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pods import until
from weir.proxy import certificates
from weir.proxy.environment import CERTIFICATES

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for chroot")


class Container:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / CERTIFICATES.lstrip("/")
        self.folder.mkdir(parents=True)
        code = "import os, sys, time; os.chroot(sys.argv[1]); time.sleep(600)"
        self.process = subprocess.Popen([sys.executable, "-c", code, str(root)])
        entered = Path(f"/proc/{self.process.pid}/root")
        until(lambda: entered.readlink() == root, "it is inside")

    def pair(self) -> certificates.Pair | None:
        return certificates.of_container(self.process.pid)


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    made = Container(tmp_path / "root")
    yield made
    made.process.kill()
    made.process.wait()


def test_a_pair_is_read_through_the_links_that_kubernetes_makes(container: Container) -> None:
    data = container.folder / "..data"
    data.mkdir()
    for name in ("tls.crt", "tls.key"):
        (data / name).write_text(f"of {name}")
        (container.folder / name).symlink_to(f"..data/{name}")
    assert container.pair() == ("of tls.crt", "of tls.key")


def test_without_a_pair_there_is_none(container: Container) -> None:
    assert container.pair() is None
    (container.folder / "tls.crt").write_text("alone")
    assert container.pair() is None


@pytest.mark.parametrize("way", ["/etc/hostname", "../../../../../../../../../etc/hostname"])
def test_a_link_out_of_the_container_ends_inside_it(container: Container, way: str) -> None:
    for name in ("tls.crt", "tls.key"):
        (container.folder / name).symlink_to(way)
    assert container.pair() is None
    (container.root / "etc").mkdir()
    (container.root / "etc" / "hostname").write_text("inside")
    assert container.pair() == ("inside", "inside")


def test_a_link_through_proc_is_not_followed(container: Container) -> None:
    (container.root / "proc").mkdir()
    subprocess.run(["mount", "--bind", "/proc", str(container.root / "proc")], check=True)
    try:
        for name in ("tls.crt", "tls.key"):
            (container.folder / name).symlink_to("/proc/self/root/etc/hostname")
        with pytest.raises(OSError, match="symbolic links"):
            container.pair()
    finally:
        subprocess.run(["umount", str(container.root / "proc")], check=True)


def test_what_is_no_file_or_too_big_is_refused_and_not_waited_for(container: Container) -> None:
    (container.folder / "tls.key").write_text("key")
    os.mkfifo(container.folder / "tls.crt")
    with pytest.raises(ValueError, match=r"tls\.crt"):
        container.pair()
    (container.folder / "tls.crt").unlink()
    (container.folder / "tls.crt").write_bytes(b"x" * (certificates.MAX_BYTES + 1))
    with pytest.raises(ValueError, match=r"tls\.crt"):
        container.pair()
    (container.folder / "tls.crt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="decode"):
        container.pair()
