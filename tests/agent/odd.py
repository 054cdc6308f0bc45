"""Pods that are made otherwise: containers with cgroups of their own, user namespaces, a node
within a node as kind has it. They are filled by tests.agent.borrowed.HeldPod."""

from __future__ import annotations

import functools
import http.client
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.agent.borrowed import HeldPod
from tests.pods import Pod, until
from weir.proxy.cgroups import cgroup2_mount

FIRST = 100_000
"""What uid 0 of a user namespace is outside of it."""
_PYTHON = "/usr/bin/python3"  # this interpreter may be where only root may go
_IN_NODE = 'umount "$0"; mount -t cgroup2 none "$0" && echo made && exec sleep infinity'


def filled(pod: Pod, *prefix: str, kind: type[HeldPod] = HeldPod) -> HeldPod:
    """That pod with a hold and an app, to be used by `with` as HeldPod is."""
    made = kind(*prefix)
    made.pod = pod
    return made


class Containers(Pod):
    """Each command runs in a cgroup of its own, two levels below the pod's."""

    def __init__(self, **families: bool) -> None:
        super().__init__(**families)
        self._number = itertools.count()

    def run(
        self, command: Sequence[str | Path], *, cgroup: Path | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        if cgroup is None:
            cgroup = self.cgroup / f"container{next(self._number)}" / "init"
            cgroup.mkdir(parents=True)
        return super().run(command, cgroup=cgroup, **popen)


def get(address: str, port: int) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, port, timeout=30)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def refuses(address: str, port: int) -> bool:
    try:
        get(address, port)
    except ConnectionRefusedError:
        return True
    return False


@functools.cache
def why_no_users() -> str | None:
    """None, or the reason why user namespaces can't be tried."""
    for tool in ("unshare", "nsenter", _PYTHON):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    made = subprocess.run(["unshare", "--user", "true"], capture_output=True, text=True)
    return f"needs user namespaces ({made.stderr.strip()})" if made.returncode else None


class OwnUsers(Containers):
    """Its processes are in a user namespace of their own, which owns the network namespace."""

    def _make_netns(self) -> None:
        self._keeper = subprocess.Popen(["unshare", "--user", "--net", "sleep", "infinity"])
        process, here = Path(f"/proc/{self._keeper.pid}"), Path("/proc/self/ns/user").readlink()
        until(lambda: (process / "ns/user").readlink() != here, "the namespaces are made")
        for file in ("uid_map", "gid_map"):
            (process / file).write_text(f"0 {FIRST} 65536\n")
        attach = ["ip", "netns", "attach", self.name, str(self._keeper.pid)]
        subprocess.run(attach, check=True)

    def run(
        self, command: Sequence[str | Path], *, cgroup: Path | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        program, *arguments = command
        program = _PYTHON if program == sys.executable else program
        enter = ["nsenter", f"--user=/proc/{self._keeper.pid}/ns/user", program, *arguments]
        popen.setdefault("cwd", "/")
        return super().run(enter, cgroup=cgroup, **popen)

    def _remove(self) -> None:
        super()._remove()
        self._keeper.kill()
        self._keeper.wait()


class Node:
    """What a kind node is: a PID, a mount and a cgroup namespace, and a cgroup that looks like the
    root inside of it. `with` it; whatever was started in it ends with it."""

    def __init__(self) -> None:
        mount = cgroup2_mount()
        assert mount is not None
        self.mount = mount
        self.cgroup = mount / f"weirt-{os.getpid()}-node" / "inner"

    def __enter__(self) -> Node:
        self.cgroup.mkdir(parents=True)
        enter = f'echo $$ > {self.cgroup}/cgroup.procs; exec "$@"'
        unshare = ("unshare", "--pid", "--fork", "--kill-child", "--cgroup", "--mount")
        self._made = subprocess.Popen(
            ["sh", "-c", enter, "sh", *unshare, "--mount-proc", "sh", "-c", _IN_NODE, self.mount],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._made.stdout is not None
        assert self._made.stdout.readline() == "made\n"
        children = Path(f"/proc/{self._made.pid}/task/{self._made.pid}/children")
        self._first = children.read_text().split()[0]
        return self

    def __exit__(self, *_: object) -> None:
        assert self._made.stdout is not None
        self._made.kill()  # unshare, and with it the first process of the namespace
        self._made.wait()
        self._made.stdout.close()
        for folder in (self.cgroup / "agent", self.cgroup, self.cgroup.parent):
            until(lambda folder=folder: _gone(folder), f"removal of {folder}")  # type: ignore[misc]

    @property
    def inside(self) -> list[str]:
        """Prefix of a command that runs in it as its containers do."""
        return ["nsenter", f"--target={self._first}", "--pid", "--mount", "--cgroup", "--"]

    @property
    def agent(self) -> list[str]:
        """The same for the agent, in a cgroup beside those of the pods."""
        folder = self.cgroup / "agent"
        folder.mkdir(exist_ok=True)
        return ["sh", "-c", f'echo $$ > {folder}/cgroup.procs; exec "$@"', "sh", *self.inside]

    def kill_agent(self) -> None:
        (self.cgroup / "agent" / "cgroup.kill").write_text("1")

    def seen(self, cgroup: Path) -> str:
        """The same folder as it is called inside."""
        return str(self.mount / cgroup.relative_to(self.cgroup))


class InNode(Containers):
    """A pod of such a node, below `kubelet/kubepods`."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node
        self.cgroup = node.cgroup / "kubelet" / "kubepods" / "burstable" / f"pod{self.name}"

    def run(
        self, command: Sequence[str | Path], *, cgroup: Path | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        return super().run([*self._node.inside, *command], cgroup=cgroup, **popen)

    def _remove(self) -> None:
        super()._remove()
        folder = self.cgroup.parent
        while folder != self._node.cgroup:
            if not _gone(folder):
                return  # another pod's
            folder = folder.parent


class HeldInNode(HeldPod):
    """The agent is told of it as it looks from inside."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.pod, self._node = InNode(node), node

    @property
    def described(self) -> dict[str, Any]:
        seen = self._node.seen(self.pod.cgroup)
        return super().described | {"holdCgroup": seen, "cgroup": seen}


def _gone(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # its processes are not gone yet, or it has other folders
        return False
    return True
