"""One boot of a kernel under qemu: its first files, its command line, and its end.

The guest has this machine's files below a file system in memory: it can read all of them and change
none. Only `out` is shared for writing. It has no network. Emulated unless told otherwise: a
hypervisor's own guest may have a /dev/kvm that boots nothing.
"""

from __future__ import annotations

import ctypes
import lzma
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.machine.packages import Failed, Kernel

REPOSITORY = Path(__file__).parents[2]
_INIT = Path(__file__).with_name("init.c")
_NEEDED = ("virtio_pci", "9pnet_virtio", "9p", "overlay")  # before there are any other files
_PR_SET_PDEATHSIG = 1


def boot(
    kernel: Kernel,
    command: Iterable[str | Path],
    out: Path,
    seconds: float,
    accel: str,
    parameters: str = "",
) -> None:
    """Run `command` as process 1 in the repository's folder, until the guest ends. What it said is
    in `out`/console. Raises Failed when there is no qemu, or no end within `seconds`."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise Failed("needs qemu-system-x86_64: ./deps.sh python3 .venv machine (as root)")
    # emulated time passes by what was done, so that no limit of a test ends on a busy machine;
    # with a second processor Linux 6.1 waits for it for ever then
    emulated = ("-cpu", "max", "-icount", "shift=0", "-smp", "1")
    processor = emulated if accel == "tcg" else ("-cpu", "host", "-smp", "2")
    with tempfile.TemporaryDirectory() as scratch:
        initrd = Path(scratch) / "initrd"
        initrd.write_bytes(_initrd(kernel, Path(scratch)))
        append = f"console=ttyS0 loglevel=4 panic=-1 oops=panic {parameters} -- {REPOSITORY}"
        process = subprocess.Popen(
            [
                *(qemu, "-accel", accel, *processor),
                *("-m", "2G", "-nic", "none", "-no-reboot"),
                *("-display", "none", "-monitor", "none", "-serial", "stdio"),
                *("-kernel", kernel.image, "-initrd", initrd),
                *("-append", " ".join(map(str, (append, *command)))),
                *_share("host", Path("/"), "readonly=on,multidevs=remap"),
                *_share("modules", kernel.modules, "readonly=on"),
                *_share("out", out, "readonly=off"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=(out / "console").open("wb"),
            stderr=subprocess.STDOUT,
            preexec_fn=_politely,  # noqa: PLW1509
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"no end after {seconds:.0f} s, see {out}/console") from error
        finally:
            process.kill()
            process.wait()


def _share(name: str, path: Path, options: str) -> tuple[str, str]:
    return "-virtfs", f"local,path={path},mount_tag={name},security_model=none,{options}"


def _politely() -> None:
    """Behind everything else on this machine, and not longer than who started it."""
    os.nice(10)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _initrd(kernel: Kernel, scratch: Path) -> bytes:
    init = scratch / "init"
    compiler = shutil.which("musl-gcc") or shutil.which("gcc")
    if compiler is None:
        raise Failed("needs musl-gcc or gcc: make deps (as root)")
    subprocess.run([compiler, "-static", "-s", "-Os", "-o", init, _INIT], check=True)
    files = {"init": init.read_bytes(), "modules": None}
    for number, module in enumerate(_modules(kernel)):
        data = module.read_bytes()
        files[f"modules/{number}"] = lzma.decompress(data) if module.suffix == ".xz" else data
    return _cpio(files)


def _modules(kernel: Kernel) -> list[Path]:
    """In an order in which each finds what it needs."""
    folder = kernel.modules / kernel.release
    needs: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        module, _, others = line.partition(":")
        needs[module] = others.split()
    built_in = (folder / "modules.builtin").read_text()
    wanted: list[str] = []
    for name in _NEEDED:
        if f"/{name}.ko\n" in built_in:
            continue
        found = next((each for each in needs if Path(each).name.split(".")[0] == name), None)
        if found is None:
            raise Failed(f"Linux {kernel.release} has no module {name}")
        wanted += [each for each in (*reversed(needs[found]), found) if each not in wanted]
    return [folder / module for module in wanted]


def _cpio(files: dict[str, bytes | None]) -> bytes:
    """An archive as the kernel takes it ("newc"); a file without content is a folder."""
    archive = bytearray()
    for number, (name, data) in enumerate({**files, "TRAILER!!!": b""}.items(), 1):
        mode = 0o40755 if data is None else 0o100755
        size, name_size = len(data or b""), len(name) + 1
        fields = (number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        archive += name.encode() + b"\0"
        archive += bytes(-len(archive) % 4) + (data or b"")
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
