"""SELinux between the agent and a pod: what docs/agent.md says that it must allow is enough.

Not collected by itself: it is for a guest of tests/machine, which it leaves enforcing a policy of
its own (`python -m tests.machine 6.12 --append security=selinux -- tests/machine/selinux.py`).
That knows the classes which lie between agent and pod and three types: `pod_t`, `agent_t` with the
permissions of the manual towards it, and `base_t` for all the rest. Other classes are not checked.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.local.conftest import ROOT
from tests.local.test_confined import found
from tests.machine.security import ANOTHER, serves

SELINUX = Path("/sys/fs/selinux")
COMPILER = shutil.which("checkpolicy")
pytestmark = [
    pytest.mark.skipif(not Path("/run/out").is_dir(), reason="is for a guest of tests/machine"),
    pytest.mark.skipif(not SELINUX.is_dir(), reason="needs a kernel with security=selinux"),
    pytest.mark.skipif(COMPILER is None, reason="needs checkpolicy"),
]
_FILE = (
    "ioctl read write create getattr setattr lock relabelfrom relabelto append map unlink link "
    "rename execute quotaon mounton audit_access open execmod watch watch_mount watch_sb "
    "watch_with_perm watch_reads"
)
_SOCKET = (
    "ioctl read write create getattr setattr lock relabelfrom relabelto append map bind connect "
    "listen accept getopt setopt shutdown recvfrom sendto name_bind"
)
CLASSES = {
    "file": f"{_FILE} execute_no_trans entrypoint",
    "dir": f"{_FILE} add_name remove_name reparent search rmdir",
    "lnk_file": _FILE,
    "fd": "use",
    "process": (
        "fork transition sigchld sigkill sigstop signull signal ptrace getsched setsched "
        "getsession getpgid setpgid getcap setcap share getattr setexec setfscreate noatsecure "
        "siginh setrlimit rlimitinh dyntransition setcurrent execmem execstack execheap "
        "setkeycreate setsockcreate getrlimit"
    ),
    "tcp_socket": f"{_SOCKET} node_bind name_connect",
    "unix_stream_socket": f"{_SOCKET} connectto",
    "netlink_tcpdiag_socket": f"{_SOCKET} nlmsg_read nlmsg_write",
    "bpf": "map_create map_read map_write prog_load prog_run",
}
# in the kernel's order, which gives them their numbers (initial_sid_to_string.h)
_INITIAL = (
    "kernel security unlabeled fs file file_labels init any_socket port netif netmsg node "
    "igmp_packet icmp_socket tcp_socket sysctl_modprobe sysctl sysctl_fs sysctl_kernel sysctl_net "
    "sysctl_net_unix sysctl_vm sysctl_dev kmod policy scmp_packet devnull"
)
TYPES = ("pod_t", "agent_t", "less_t")
OF_THE_POD = {"fd": "use", "unix_stream_socket": "read write"}
"""What a pod's type needs towards the agent's: the lease is a socket of the agent's."""


def of_the_manual() -> dict[str, set[str]]:
    """By class, what the agent's type needs towards the pod's."""
    table = (ROOT / "docs/agent.md").read_text().split("### Security modules")[1]
    wanted: dict[str, set[str]] = {}
    for row in table.splitlines():
        columns = row.split("|")
        if len(columns) < 5 or "of itself" in columns[4]:
            continue
        for words in re.findall("`([^`]*)`", columns[4]):
            name, _, permissions = words.replace("{", "").replace("}", "").partition(" ")
            if name in CLASSES:
                wanted.setdefault(name, set()).update(permissions.split())
    return wanted


def policy(wanted: dict[str, set[str]]) -> str:
    lines = [f"class {name}" for name in CLASSES]
    lines += [f"sid {name}" for name in _INITIAL.split()]
    lines += [f"class {name} {{ {permissions} }}" for name, permissions in CLASSES.items()]
    lines += [f"type {name};" for name in ("base_t", *TYPES)]
    lines += ["role system_r;", f"role system_r types {{ base_t {' '.join(TYPES)} }};"]
    for name in CLASSES:
        for each in TYPES:
            lines += [
                f"allow {source} {target} : {name} *;"
                for source, target in ((each, "base_t"), ("base_t", each), (each, "self"))
            ]
        lines.append(f"allow base_t self : {name} *;")
    for name, permissions in wanted.items():
        lines.append(f"allow agent_t pod_t : {name} {{ {' '.join(sorted(permissions))} }};")
        less = permissions - {"ptrace"}
        if less:
            lines.append(f"allow less_t pod_t : {name} {{ {' '.join(sorted(less))} }};")
    for name, words in OF_THE_POD.items():
        lines.append(f"allow pod_t {{ agent_t less_t }} : {name} {{ {words} }};")
    lines.append("user u roles { system_r };")
    lines += [f"sid {name} u:system_r:base_t" for name in _INITIAL.split()]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module", autouse=True)
def enforced(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("policy")
    (folder / "policy.conf").write_text(policy(of_the_manual()))
    compiled = folder / "policy"
    command = [COMPILER, "-U", "allow", "-c", "30", "-o", compiled, folder / "policy.conf"]
    subprocess.run(list(map(str, command)), check=True)
    if not (SELINUX / "load").exists():
        subprocess.run(["mount", "-t", "selinuxfs", "none", SELINUX], check=True)
    with (SELINUX / "load").open("wb", buffering=0) as load:
        load.write(compiled.read_bytes())
    (SELINUX / "enforce").write_text("1")


def confined(kind: str) -> tuple[str, ...]:
    """Prefix of a command that it is to confine."""
    return ("sh", "-c", f'printf u:system_r:{kind} > /proc/self/attr/exec; exec "$@"', "sh")


def test_the_permissions_of_the_manual_are_enough(tmp_path: Path) -> None:
    assert serves(tmp_path, (*confined("pod_t"), *ANOTHER), confined("agent_t")) == ""


def test_without_ptrace_the_pod_is_not_borrowed_and_the_status_says_why(tmp_path: Path) -> None:
    lease = serves(tmp_path, (*confined("pod_t"), *ANOTHER), confined("less_t"))
    assert "borrowing hold's door: Operation not permitted" in lease
    assert "SELinux" in lease


def test_doctor_names_the_type() -> None:
    ok, detail, fix = found("selinux", *confined("agent_t"))
    assert (ok, detail) == ("None", "this process is confined as agent_t")
    assert "spc_t" in fix
