"""`weir doctor`: what this machine can do, found out by trying, and the fix for what is missing.

Owns the list of checks, and those of a local run; those of a node are in weir/local/node.py and
weir/local/confined.py. Each check is a function that returns one `Finding`; none of them changes
anything that stays.
"""

import http.client
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from weir.local import confined, enter, node
from weir.local.broker import mosquitto
from weir.local.finding import Finding
from weir.local.pod import LocalPod, LocalPodError
from weir.proxy.contract import DIRECT_PORT
from weir.proxy.kernel import (
    MINIMUM_KERNEL,
    AttachedPod,
    Kernel,
    KernelUnavailable,
    PodTarget,
    kernel_version,
)

USER_PORT = 8080


def doctor(as_json: bool) -> int:
    """Print all findings; 1 if one of them keeps the direct path from working, else 0."""
    findings = [check() for check in CHECKS]
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=2))
    else:
        _print(findings)
    return 1 if any(f.ok is False for f in findings) else 0


def _print(findings: list[Finding]) -> None:
    console = Console(highlight=False)
    marks = {True: ("ok", "green"), None: ("note", "yellow"), False: ("MISSING", "red")}
    for finding in findings:
        mark, colour = marks[finding.ok]
        console.print(Text(f"{mark:>8} ", style=colour) + Text(f"{finding.name}: {finding.detail}"))
        if finding.fix:
            console.print(Text(f"{'':>9}fix: {finding.fix}"))
    if any(f.ok is False for f in findings):
        console.print("\nWithout the missing parts Weir works through the relay, only slower.")


def _root() -> Finding:
    if os.geteuid() == 0:
        return Finding("root", True, "running as root")
    return Finding(
        "root", False, f"running as uid {os.geteuid()}; pods and eBPF need root",
        "run `sudo weir ...`; without it functions are plain processes behind the relay",
    )  # fmt: skip


def _kernel_version() -> Finding:
    release, oldest = platform.release(), ".".join(map(str, MINIMUM_KERNEL))
    if kernel_version() >= MINIMUM_KERNEL:
        return Finding("kernel", True, f"Linux {release}")
    return Finding("kernel", False, f"Linux {release} is too old", f"use Linux {oldest} or newer")


def _jit() -> Finding:
    try:
        enabled = Path("/proc/sys/net/core/bpf_jit_enable").read_text().strip()
    except OSError:
        return Finding("bpf jit", None, "can't tell")
    if enabled != "0":
        return Finding("bpf jit", True, "on")
    return Finding("bpf jit", None, "off: programs run several times slower",
                   "sysctl -w net.core.bpf_jit_enable=1")  # fmt: skip


def _command(name: str, package: str, why: str, needed: bool) -> Callable[[], Finding]:
    def check() -> Finding:
        path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if path:
            return Finding(name, True, path)
        return Finding(name, False if needed else None, f"not found; {why}",
                       f"apt-get install {package}")  # fmt: skip

    return check


def _broker() -> Finding:
    path = mosquitto()
    if path:
        return Finding("MQTT broker", True, f"mosquitto at {path}")
    if importlib.util.find_spec("amqtt") is not None:
        return Finding("MQTT broker", None, "amqtt (Python; MQTT 3.1.1 only, slow)",
                       "apt-get install mosquitto")  # fmt: skip
    return Finding("MQTT broker", None, "none for `weir run` to start; --broker works",
                   "apt-get install mosquitto")  # fmt: skip


def _load() -> Finding:
    try:
        Kernel.load().close()
    except KernelUnavailable as e:
        return Finding("eBPF programs", False, str(e))
    return Finding("eBPF programs", True, "load and pass the verifier")


def _direct_path() -> Finding:
    """One real connection through the direct port of a throw-away pod, counted in the kernel."""
    name = "direct path"
    try:
        pod = LocalPod.make()
    except LocalPodError as e:
        return Finding(name, False, str(e))
    try:
        kernel = Kernel.load()
        try:
            attached = kernel.attach(
                PodTarget("doctor", pod.netns, pod.cgroup, (pod.address,), USER_PORT, DIRECT_PORT)
            )
            return Finding(name, True, _try(pod, attached))
        finally:
            kernel.close()
    except (KernelUnavailable, OSError, http.client.HTTPException) as e:
        return Finding(name, False, f"a steered connection failed: {e}",
                       "please report this with the output of `weir doctor --json`")  # fmt: skip
    finally:
        pod.close()


def _try(pod: LocalPod, attached: AttachedPod) -> str:
    with subprocess.Popen(
        enter.command(
            [
                *(sys.executable, "-P", "-u", "-m", "http.server", str(USER_PORT)),
                *("--bind", "127.0.0.1", "--directory", "/var/empty"),
            ],
            pod.netns,
            pod.cgroup,
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()  # "Serving HTTP on ...": it listens now
            attached.open_direct()
            connection = http.client.HTTPConnection(pod.address, DIRECT_PORT, timeout=5)
            connection.request("HEAD", "/nothing")
            status = connection.getresponse().status
            counted = attached.counters().started
            connection.close()
        finally:
            server.kill()
    if counted != 1:
        raise OSError(f"the kernel counted {counted} requests instead of 1")
    return (
        f"a connection was steered to 127.0.0.1:{USER_PORT} (HTTP {status}) and its request counted"
    )


CHECKS: tuple[Callable[[], Finding], ...] = (
    _root,
    _kernel_version,
    node.capabilities,
    confined.yama,
    confined.apparmor,
    confined.selinux,
    confined.lockdown,
    confined.seccomp,
    confined.namespaces,
    confined.entering,
    confined.borrowing,
    node.libbpf,
    node.kernel_features,
    node.cgroup2,
    node.bpffs,
    _jit,
    _command("ip", "iproute2", "pods of `weir run` need it", True),
    _broker,
    _load,
    node.bcc_loader,
    node.conflicts,
    _direct_path,
)
