"""What keeps this process from what the agent does to pods: security modules, filters, namespaces.

Owns those checks of `weir doctor`. First what is read (why it may fail), then what is tried on a
process and a network namespace of our own, and on every hold of this node. Nothing stays.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weir.local.finding import Finding
from weir.proxy import lease, listeners, netns, sysctl
from weir.proxy.cgroups import cgroup2_mount
from weir.proxy.workers import WORKER_UID

_ATTR = Path("/proc/self/attr")
_CLONE_NEWNET = 0x40000000
_UNCONFINED = ("spc_t", "unconfined_t", "unconfined_service_t", "initrc_t", "kernel_t")
"""SELinux types that may do what the agent does, in the targeted policy."""
_FIRST_USERS = "user:[4026531837]"
"""The machine's own user namespace has this number (PROC_USER_INIT_INO in linux/proc_ns.h)."""
_MANUAL = "docs/agent.md (Security modules)"


def yama(scope: Path = Path("/proc/sys/kernel/yama/ptrace_scope")) -> Finding:
    value = _said(scope)
    if not value:
        return Finding("Yama", True, "not in this kernel")
    if value != "3":
        return Finding("Yama", True, f"ptrace_scope is {value}: no obstacle with CAP_SYS_PTRACE")
    return Finding("Yama", None, "ptrace_scope is 3: pods are not borrowed from their hold",
                   "kernel.yama.ptrace_scope=2 in /etc/sysctl.d, and a reboot: 3 can't be taken "
                   "back")  # fmt: skip


def apparmor(
    enabled: Path = Path("/sys/module/apparmor/parameters/enabled"), attr: Path = _ATTR
) -> Finding:
    if _said(enabled) != "Y":
        return Finding("AppArmor", True, "not in use")
    label = _said(attr / "apparmor/current") or _said(attr / "current")
    profile, _, mode = label.partition(" ")
    if label == "unconfined" or mode in ("(complain)", "(unconfined)"):
        return Finding("AppArmor", True, f"this process is not confined ({label})")
    return Finding("AppArmor", None, f"this process is confined by {profile or 'what it hides'}; "
                   "a runtime's default profile forbids sysctls, pins and tracing other profiles",
                   "appArmorProfile: {type: Unconfined} in the container's securityContext, or a "
                   f"profile with the rules in {_MANUAL}")  # fmt: skip


def selinux(enforce: Path = Path("/sys/fs/selinux/enforce"), attr: Path = _ATTR) -> Finding:
    parts = _said(attr / "current").split(":")  # user:role:type:level
    if len(parts) < 3 or not parts[1].endswith("_r"):  # a role's name, by convention
        return Finding("SELinux", True, "not in use")
    kind = parts[2]
    if kind in _UNCONFINED:
        return Finding("SELinux", True, f"this process may do it all ({kind})")
    if _said(enforce) == "0":
        return Finding("SELinux", True, f"only permissive (this process is {kind})")
    return Finding("SELinux", None, f"this process is confined as {kind}",
                   "seLinuxOptions: {type: spc_t} in the container's securityContext, or a type "
                   f"with the permissions in {_MANUAL}")  # fmt: skip


def lockdown(file: Path = Path("/sys/kernel/security/lockdown")) -> Finding:
    mode = _said(file).partition("[")[2].partition("]")[0]
    if mode in ("", "none"):
        return Finding("lockdown", True, "off" if mode else "not in this kernel, or hidden")
    return Finding("lockdown", True, f"{mode}: no obstacle, the programs read no kernel memory")


def seccomp(status: Path = Path("/proc/self/status")) -> Finding:
    modes = {"0": "no filter", "1": "strict", "2": "a filter; what it lets pass is tried below"}
    found = [line.split()[1] for line in _said(status).splitlines() if line.startswith("Seccomp:")]
    return Finding("seccomp", True, modes.get(found[0], found[0]) if found else "can't tell")


def namespaces(users: Path = Path("/proc/self/ns/user"), cgroups: Path | None = None) -> Finding:
    """`cgroups` defaults to where cgroup v2 is mounted."""
    name = "namespaces"
    if str(users.readlink()) != _FIRST_USERS:
        return Finding(name, False, "in a user namespace of its own, where rights mean little",
                       "hostUsers: true in the pod's spec")  # fmt: skip
    where = cgroups or cgroup2_mount()
    hidden = sum(1 for pid in listeners.pids_of(where) if pid == 0) if where is not None else 0
    if hidden:
        return Finding(name, None, f"{hidden} processes in the node's cgroups are out of sight: "
                       "pods are not borrowed from their hold",
                       "hostPID: true in the pod's spec")  # fmt: skip
    return Finding(name, True, "the users of the machine, the processes of its cgroups")


def entering() -> Finding:
    """A fresh network namespace, and the sysctl that a pod gets."""
    name = "entering pods"
    with_it = "; look at capabilities, AppArmor, SELinux and seccomp above"
    try:
        netns.run_in("/proc/self/ns/net", _fresh)
    except FileNotFoundError:
        return Finding(name, None, "no net.ipv4.tcp_migrate_req: pods are not borrowed",
                       "use Linux 5.14 or newer")  # fmt: skip
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        return Finding(name, False, f"{what}{error.strerror}", f"run as root{with_it}")
    return Finding(name, True, "a network namespace was entered, and its sysctls can be set")


def _fresh() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"a network namespace can't be made: {os.strerror(code)}")
    made = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # another thread: one that is in it already would prove nothing
        netns.run_in(f"/proc/self/fd/{made}", lambda: sysctl.put("net/ipv4/tcp_migrate_req", "1"))
    finally:
        os.close(made)


def borrowing(proc: Path = Path("/proc")) -> Finding:
    """From a process of another user, and from each hold of this node."""
    name = "borrowing"
    try:
        with _process_of_another_user() as (pid, fd):
            _borrow(Path("/proc"), pid, fd)
        holds = 0
        for pid in _holds(proc):
            try:
                _borrow(proc, pid, lease.BELL)
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
            holds += 1
    except OSError as error:
        return Finding(name, None, f"{error.strerror}: pods are not borrowed from their hold",
                       "run as root; look at capabilities, Yama, AppArmor, SELinux and seccomp "
                       "above")  # fmt: skip
    more = f", and from {holds} weir-hold on this node" if holds else ""
    return Finding(name, True, f"from a process of another user{more}")


@contextmanager
def _process_of_another_user() -> Iterator[tuple[int, int]]:
    """Its pid, and the number of a socket that it has."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            process = subprocess.Popen(
                ["cat"],
                stdin=theirs.fileno(),
                user=WORKER_UID,
                group=WORKER_UID,
                extra_groups=[],
                cwd="/",
            )
        except OSError as error:
            why = f"no process of another user can be started ({error.strerror})"
            raise OSError(error.errno, why) from error
        try:
            yield process.pid, 0
        finally:
            process.kill()
            process.wait()


def _borrow(proc: Path, pid: int, fd: int) -> None:
    """What `weir agent` does before it rings. Raises OSError saying what it was that failed."""
    what = "its environment"
    try:
        (proc / str(pid) / "environ").read_bytes()
        what = "its network namespace"
        os.close(os.open(proc / str(pid) / "ns/net", os.O_RDONLY | os.O_CLOEXEC))
        what = "its descriptor"
        process = os.pidfd_open(pid)
        try:
            os.close(listeners.take(process, fd))
        finally:
            os.close(process)
    except OSError as error:
        why = f"{what} can't be had (pid {pid}: {error.strerror})"
        raise OSError(error.errno, why) from error


def _holds(proc: Path) -> Iterator[int]:
    for entry in proc.iterdir():
        if entry.name.isdigit() and _said(entry / "comm") == lease.COMM:
            yield int(entry.name)


def _said(file: Path) -> str:
    """What is in it; empty without it, and if nothing is to be read: so it is in containers."""
    try:
        return file.read_text().strip().rstrip("\0")
    except OSError:
        return ""
