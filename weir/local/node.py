"""What `weir doctor` finds out about this machine as a node for the agent, by trying.

Owns the checks of the kernel's features, capabilities, file systems, loaders and of programs that
are in the way, and their wording. None of them changes anything that stays. Whether all of it
works together is tried in weir/local/doctor.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from weir.bpf import bcc
from weir.bpf.libbpf import LibbpfMissing, library
from weir.local.finding import Finding
from weir.proxy.cgroups import cgroup2_mount

PINS = Path("/sys/fs/bpf")
OURS = "steer"
"""The name of Weir's own sk_lookup program."""
CAPABILITIES = {
    "SYS_ADMIN": (21, "no pod's network namespace can be entered"),
    "NET_ADMIN": (12, "everything is relayed"),
    "SYS_PTRACE": (19, "pods are not borrowed from their hold"),
    "DAC_READ_SEARCH": (2, "pods are not borrowed from their hold"),
    "SETUID": (7, "no relay worker starts"),
    "SETGID": (6, "no relay worker starts"),
    "KILL": (5, "a wedged worker ends the agent"),
}
"""Bit, and what is without it (docs/agent.md)."""
FEATURES = (  # what it is for, libbpf's probe, enum bpf_prog_type or enum bpf_map_type
    ("sk_lookup programs", "libbpf_probe_bpf_prog_type", 30),
    ("cgroup_skb programs", "libbpf_probe_bpf_prog_type", 8),
    ("cgroup/getpeername programs", "libbpf_probe_bpf_prog_type", 18),
    ("sockops programs", "libbpf_probe_bpf_prog_type", 13),
    ("tc programs", "libbpf_probe_bpf_prog_type", 3),
    ("hash maps", "libbpf_probe_bpf_map_type", 1),
    ("sockhash maps", "libbpf_probe_bpf_map_type", 18),
    ("sk_storage maps", "libbpf_probe_bpf_map_type", 24),
)
_SK_LOOKUP = 36  # enum bpf_attach_type
_MOST = 64  # programs that one namespace can have
_PROGRAM_NAME, _NAME_SIZE = 64, 16  # struct bpf_prog_info


def kernel_features() -> Finding:
    """A smallest program or map of each kind is loaded, and thrown away."""
    name = "kernel features"
    try:
        lib = library()
    except LibbpfMissing:
        return Finding(name, None, "can't be tried without libbpf")
    missing, untried = [], []
    for what, probe, kind in FEATURES:
        result = getattr(lib, probe)(kind, None)
        if result == 0:
            missing.append(what)
        elif result < 0:
            untried.append(f"{what} ({os.strerror(-result)})")
    if missing:
        config = "CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF, CONFIG_NET_CLS_ACT, CONFIG_INET"
        return Finding(name, False, f"not in this kernel: {', '.join(missing)}",
                       f"use a kernel with {config}")  # fmt: skip
    if untried:
        return Finding(name, None, f"can't be tried: {', '.join(untried)}", "run as root")
    return Finding(name, True, ", ".join(what for what, _, _ in FEATURES))


def libbpf() -> Finding:
    try:
        lib = library()
    except (LibbpfMissing, AttributeError) as error:  # an old one lacks a function
        return Finding("libbpf", False, str(error), "apt-get install libbpf1")
    version = f"{lib.libbpf_major_version()}.{lib.libbpf_minor_version()}"
    return Finding("libbpf", True, f"libbpf.so.1 of version {version}")


def bcc_loader() -> Finding:
    """The whole compilation."""
    try:
        bcc.compile_here()
    except (bcc.BccMissing, OSError) as error:
        return Finding("bcc loader", None, f"`weir agent --loader bcc` can't be used: {error}",
                       "apt-get install python3-bpfcc linux-libc-dev")  # fmt: skip
    return Finding("bcc loader", True, "compiles the programs")


def capabilities(status: Path = Path("/proc/self/status")) -> Finding:
    lines = (line.split() for line in status.read_text().splitlines())
    effective = next(int(words[1], 16) for words in lines if words[:1] == ["CapEff:"])
    missing = [name for name, (bit, _) in CAPABILITIES.items() if not effective >> bit & 1]
    if not missing:
        return Finding("capabilities", True, f"all {len(CAPABILITIES)} that the agent needs")
    detail = "; ".join(f"no CAP_{name}: {CAPABILITIES[name][1]}" for name in missing)
    fix = f"run as root; in a container add {', '.join(missing)} to its capabilities"
    serious = bool({"SYS_ADMIN", "NET_ADMIN"} & set(missing))
    return Finding("capabilities", False if serious else None, detail, fix)


def cgroup2(mounts: Path = Path("/proc/mounts")) -> Finding:
    name, mount = "cgroup v2", cgroup2_mount(mounts)
    if mount is None:
        return Finding(
            name, False, "not mounted",
            "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
        )  # fmt: skip
    refused = _try_directory(mount)
    if refused == errno.EROFS:
        return Finding(name, False, f"{mount} is read-only", f"mount -o remount,rw {mount}")
    where = f"mounted at {mount}"
    if mount != Path("/sys/fs/cgroup"):
        where += " (not /sys/fs/cgroup: pods' cgroups are given below this)"
    if refused:
        return Finding(name, None, f"{where}; can't make a cgroup there: {os.strerror(refused)}",
                       "run as root; in a container mount the node's /sys/fs/cgroup")  # fmt: skip
    return Finding(name, True, where)


def bpffs(mounts: Path = Path("/proc/mounts")) -> Finding:
    """Only what outlives an agent needs it: links of a local run live as long as the run."""
    name, less = "bpffs", "direct paths end with the agent"
    words = (line.split() for line in mounts.read_text().splitlines())
    found = [Path(line[1].encode().decode("unicode_escape")) for line in words if line[2] == "bpf"]
    if not found:
        return Finding(name, None, f"not mounted: {less}", f"mount -t bpf bpf {PINS}")
    place = PINS if PINS in found else found[0]
    refused = _try_directory(place)
    if refused:
        fix = f"run as root; mount -o remount,rw {place}"
        return Finding(name, None, f"{place}: {os.strerror(refused)}: {less}", fix)
    more = "" if place == PINS else f"; give the agent --pins {place}/weir"
    return Finding(name, True, f"mounted at {place}{more}")


def conflicts(proc: Path = Path("/proc")) -> Finding:
    """In every namespace of a process: who else decides where connections go."""
    name, kind = "other sk_lookup programs", "sk_lookup programs"
    try:
        query = library().bpf_prog_query
    except LibbpfMissing:
        return Finding(name, None, f"can't look for {kind} without libbpf")
    seen: set[int] = set()
    others: list[str] = []
    refused = 0
    for process in sorted(
        (p for p in proc.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
    ):
        try:
            number = (process / "ns/net").stat().st_ino
            if number in seen:
                continue
            found = _attached(process / "ns/net", query)
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        except OSError:
            refused += 1
            continue
        seen.add(number)
        others += [f"{who} in the namespace of pid {process.name}" for who in found]
    if others:
        return Finding(name, None, "; ".join(others),
                       "see `bpftool link list` for whose they are; in a pod's namespace such a "
                       "program must leave the direct port (8014) alone")  # fmt: skip
    if not seen:
        return Finding(name, None, "can't look into any process's namespace", "run as root")
    less = f"; {refused} processes can't be looked into" if refused else ""
    return Finding(name, True, f"none in {len(seen)} network namespaces{less}")


def _attached(namespace: Path, query: Callable[..., int]) -> list[str]:
    ids, count = (ctypes.c_uint32 * _MOST)(), ctypes.c_uint32(_MOST)
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        result = query(fd, _SK_LOOKUP, 0, None, ids, ctypes.byref(count))
    finally:
        os.close(fd)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    named = ((number, _program_name(number)) for number in ids[: count.value])
    return [f"{name} (id {number})" for number, name in named if name != OURS]


def _program_name(number: int) -> str:
    lib = library()
    fd = lib.bpf_prog_get_fd_by_id(ctypes.c_uint32(number))
    if fd < 0:
        return "unknown"
    try:
        size = ctypes.c_uint32(_PROGRAM_NAME + _NAME_SIZE)
        data = ctypes.create_string_buffer(size.value)
        if lib.bpf_obj_get_info_by_fd(fd, data, ctypes.byref(size)) < 0:
            return "unknown"
        return data.raw[_PROGRAM_NAME:].split(b"\0")[0].decode(errors="replace") or "unnamed"
    finally:
        os.close(fd)


def _try_directory(parent: Path) -> int:
    """Make one and remove it; 0 or the errno."""
    place = parent / f"weir-doctor-{os.getpid()}"
    try:
        place.mkdir()
        place.rmdir()
    except OSError as error:
        return error.errno or errno.EIO
    return 0
