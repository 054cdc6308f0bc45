"""The cluster's life: up, down, and whether it is there.

Owns what is on the machine while it runs: one process tree in namespaces of its own, one veth pair,
the kubelet's cgroups and the folder RUN. `down` finds all of it from RUN and from their names, so
it also works after an `up` that was killed, and after a reboot.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.cluster import build, keys, manifests
from tests.cluster.images import upstream_archives
from tests.cluster.node import CONTAINERD_SOCKET
from tests.cluster.places import (
    BIN,
    CGROUP,
    HOST_ADDRESS,
    HOST_LINK,
    INGRESS_CLASS,
    LOGS,
    NODE_ADDRESS,
    NODE_LINK,
    POD_RANGE,
    PUBLIC_DOMAIN,
    REPOSITORY,
    ROOT,
    RUN,
    SERVICE_RANGE,
)

_NODE_PROCESS = RUN / "node.pid"
"""Process 1 of the node as the machine sees it, and its start time: numbers are used again."""


_COMPLETE = RUN / "complete"
"""There once `up` has done everything: one that was killed leaves a node without Knative."""


class Failed(Exception):
    """The cluster did not come up; the message says what did not, and where to read on."""


def up() -> None:
    """Build what is missing and start the cluster, or leave the running one alone.

    Raises Failed; then, and when interrupted, nothing is left running.
    """
    if is_up():
        say("is up already")
        return
    _preconditions()
    down()
    build.serving()
    build.kubernetes()
    manifests.write()
    archives = upstream_archives()
    say("built")
    try:
        _start()
        say("the API server is ready")
        for archive in archives:
            load(archive)
        say("images are loaded")
        _wait("the node is Ready", lambda: " Ready" in kubectl("get", "nodes", "--no-headers"))
        _install_knative()
        _COMPLETE.touch()
        say("Knative Serving is available")
    except BaseException:
        down()
        raise


def down() -> None:
    """Stop the cluster and remove everything but what was built and the logs."""
    pid = _node_pid()
    if pid is not None:
        say("stopping")
        os.kill(pid, signal.SIGKILL)  # and the kernel kills the rest of its PID namespace
        _gone(pid)
    subprocess.run(["ip", "link", "delete", HOST_LINK], capture_output=True)
    for hierarchy in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")):
        _remove_cgroup(hierarchy / CGROUP)
    shutil.rmtree(RUN, ignore_errors=True)
    if RUN.exists():
        shutil.rmtree(RUN)  # once more, to say what could not be removed


def is_up() -> bool:
    return _COMPLETE.exists() and _node_pid() is not None and _answers("/readyz")


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    """Run kubectl as the administrator. Raises Failed with what it printed."""
    result = subprocess.run(
        [str(BIN / "kubectl"), "--kubeconfig", str(keys.ADMIN), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise Failed(f"kubectl {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


def configure(name: str, settings: dict[str, str]) -> None:
    """Change keys of one of Knative's ConfigMaps."""
    patch = json.dumps({"data": settings})
    kubectl("patch", f"configmap/{name}", "-n", "knative-serving", "--type=merge", "-p", patch)


def enter() -> list[str]:
    """A command's beginning with which it runs on the node, in all of its namespaces."""
    pid = _node_pid()
    if pid is None:
        raise Failed("the cluster is not up")
    return ["nsenter", f"--target={pid}", "--mount", "--pid", "--net", "--ipc", "--uts"]


def load(archive: Path) -> None:
    """Make the image in a docker-archive known to the node."""
    result = subprocess.run(
        [
            *("ctr", "--address", str(CONTAINERD_SOCKET), "--namespace", "k8s.io"),
            *("images", "import", str(archive)),
        ],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise Failed(f"{archive} could not be loaded: {result.stderr.strip()}")


def say(what: str) -> None:
    print(f"cluster: {time.monotonic() - _STARTED:6.1f} s  {what}", flush=True)


_STARTED = time.monotonic()


def _preconditions() -> None:
    if os.geteuid() != 0:
        raise Failed("the cluster needs root: namespaces, cgroups and mounts")
    needed = ("containerd", "ctr", "runc", "etcd", "iptables", "ip", "unshare", "openssl", "go")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = [name for name in needed if not shutil.which(name, path=path)]
    if lacking or not Path("/usr/lib/cni/bridge").exists():
        lacking += [] if Path("/usr/lib/cni/bridge").exists() else ["CNI plugins"]
        raise Failed(f"missing: {', '.join(lacking)}: run tests/cluster/deps.sh")
    if any(
        str(ROOT.resolve()).startswith(hidden) for hidden in ("/run/", "/var/lib/", "/var/log/")
    ):
        raise Failed(f"{ROOT} cannot be used: the node has /run, /var/lib and /var/log of its own")
    if _node_pid() is None and any(
        (path / CGROUP / "besteffort").exists() and _populated(path / CGROUP)
        for path in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/"))
    ):
        raise Failed("another kubelet runs on this machine; they would share a cgroup")


def _start() -> None:
    for folder in (RUN, LOGS):
        folder.mkdir(parents=True, exist_ok=True)
    for old in LOGS.glob("*.log"):
        old.unlink()
    keys.make()
    with (LOGS / "node.log").open("wb") as log:
        parent = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork"),
                *("--mount-proc", "--kill-child", "--propagation", "private"),
                *(sys.executable, "-m", "tests.cluster.node"),
            ],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    _wait("the node's first process is there", lambda: bool(children.read_text().strip()))
    pid = int(children.read_text())
    _NODE_PROCESS.write_text(f"{pid} {_start_time(pid)}")
    _network(pid)
    _wait("the API server is ready", lambda: _answers("/readyz"), alive=True)


def _network(pid: int) -> None:
    """A link between the machine and the node, and the ways to pods and Services over it."""

    def ip(*arguments: str, inside: bool = False) -> None:
        enter = ["nsenter", "--net", f"--target={pid}"] if inside else []
        subprocess.run([*enter, "ip", *arguments], check=True)

    ip("link", "add", HOST_LINK, "type", "veth", "peer", "name", NODE_LINK, "netns", str(pid))
    ip("address", "add", f"{HOST_ADDRESS}/30", "dev", HOST_LINK)
    ip("link", "set", HOST_LINK, "up")
    ip("link", "set", "lo", "up", inside=True)
    ip("address", "add", f"{NODE_ADDRESS}/30", "dev", NODE_LINK, inside=True)
    ip("link", "set", NODE_LINK, "up", inside=True)
    ip("route", "add", "default", "via", HOST_ADDRESS, inside=True)
    for target in (POD_RANGE, SERVICE_RANGE):
        ip("route", "add", target, "via", NODE_ADDRESS)


def _install_knative() -> None:
    kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=60s")
    kubectl("apply", "-f", str(manifests.BASE), "-f", str(manifests.SETTINGS))
    kubectl("apply", "-f", str(manifests.DEFINITIONS))
    kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    configure("config-network", {"ingress-class": INGRESS_CLASS})
    configure("config-domain", {PUBLIC_DOMAIN: ""})
    kubectl("apply", "-f", str(manifests.PROGRAMS))
    kubectl(
        *("wait", "-n", "knative-serving", "--for=condition=Available", "deployment", "--all"),
        "--timeout=120s",
    )


def _wait(what: str, true: Callable[[], bool], alive: bool = False, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if alive and _node_pid() is None:
            raise Failed(f"the node ended before {what}:\n{(LOGS / 'node.log').read_text()}")
        if time.monotonic() > deadline:
            raise Failed(f"it did not come about in {seconds:.0f} s that {what}: read {LOGS}")
        time.sleep(0.2)


def _answers(path: str) -> bool:
    with contextlib.suppress(Failed, OSError):
        kubectl("get", "--raw", path, "--request-timeout=3s")
        return True
    return False


def _node_pid() -> int | None:
    try:
        pid, started = _NODE_PROCESS.read_text().split()
        return int(pid) if _start_time(int(pid)) == started else None
    except (OSError, ValueError):
        return None


def _start_time(pid: int) -> str:
    # the command's name may hold blanks: count behind it (proc(5), field 22)
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _gone(pid: int) -> None:
    started = time.monotonic()
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > started + 30:
            raise Failed(f"process {pid} of the node does not go away")
        time.sleep(0.05)


def _populated(cgroup: Path) -> bool:
    return any(file.read_text().strip() for file in cgroup.rglob("cgroup.procs"))


def _remove_cgroup(cgroup: Path) -> None:
    if not cgroup.is_dir():
        return
    for folder in _deepest_first(cgroup):
        deadline = time.monotonic() + 10
        while True:
            try:
                folder.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:  # its last process is still being reaped
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def _deepest_first(folder: Path) -> Iterator[Path]:
    for child in folder.iterdir():
        if child.is_dir():
            yield from _deepest_first(child)
    yield folder
