"""A pod's hold, found among processes, and what it says of the pod (docs/decisions/022).

Owns what is read from that process: the queue-proxy's environment, its network namespace, its age;
and which pods are better left to their sidecar. Ringing is `proxy.lease`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from weir.proxy import certificates, lease, listeners, neighbours
from weir.proxy.certificates import Pair
from weir.proxy.environment import EnvironmentFault, SidecarSettings, read_environment
from weir.proxy.lease import NoHold
from weir.proxy.pod import PodSpec

MAX_ENVIRONMENT = 2 << 20
"""Bytes: what Linux allows with the usual stack limit (execve(2)). To have more takes intent."""
_RIGHTS = "(CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH?)"


class LeftToSidecar(NoHold):
    """There is nothing for us to borrow, nor will there be; `str()` says so."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"left to the sidecar: {reason}")


@dataclass(frozen=True)
class Hold:
    """A living hold, or the sidecar it became. `close` it: the descriptors keep its namespace.

    `process` is a pidfd, `age` the seconds since it was started.
    """

    process: int
    namespace: int
    environment: dict[str, str]
    settings: SidecarSettings
    age: float
    pid: int
    certificate: Pair | None
    """For the TLS port, which is open if there was one at hold's start."""

    @property
    def netns(self) -> Path:
        return Path(f"/proc/self/fd/{self.namespace}")

    @property
    def addresses(self) -> tuple[str, ...]:
        try:
            return (str(ip_address(self.settings.pod_ip)),)
        except ValueError:
            return ()

    def renewed(self) -> Pair | None:
        """Another certificate than that, if there is one by now."""
        try:
            found = certificates.of_container(self.pid)
        except (OSError, ValueError):
            return None
        return found if found != self.certificate and lease.alive(self.process) else None

    def close(self) -> None:
        os.close(self.process)
        os.close(self.namespace)


def find(spec: PodSpec) -> Hold:
    """Raises NoHold: there is none, or none to borrow from, and why."""
    pids = list(_candidates(spec))
    for pid in pids:
        process = lease.find([pid])
        if process is None:
            continue
        try:
            return _read(pid, process)
        except OSError as error:
            os.close(process)
            hint = f" {_RIGHTS}" if isinstance(error, PermissionError) else ""
            raise NoHold(f"hold (pid {pid}) can't be looked into: {error.strerror}{hint}") from None
        except BaseException:
            os.close(process)
            raise
    sandbox = neighbours.sandbox(pids)
    if sandbox:
        raise LeftToSidecar(f"the pod runs in {sandbox}")
    where = f"pid {spec.hold}" if spec.hold else str(spec.hold_cgroup)
    hint = ""
    if 0 in pids:  # so the kernel calls those that have no number here
        hint = "; its processes are in another PID namespace (hostPID?)"
    elif any(not _readable(pid) for pid in pids):
        hint = f"; some processes can't be looked into {_RIGHTS}"
    raise NoHold(f"no weir-hold found ({where}){hint}")


def _candidates(spec: PodSpec) -> Iterator[int]:
    if spec.hold:
        yield spec.hold
    elif spec.hold_cgroup is not None:
        yield from listeners.pids_of(spec.hold_cgroup)


def _readable(pid: int) -> bool:
    try:
        Path(f"/proc/{pid}/environ").read_bytes()
    except PermissionError:
        return False
    except OSError:  # it is gone
        return True
    return True


def _read(pid: int, process: int) -> Hold:
    folder = Path(f"/proc/{pid}")
    with (folder / "environ").open("rb") as file:
        raw = file.read(MAX_ENVIRONMENT + 1)
    if len(raw) > MAX_ENVIRONMENT:
        raise LeftToSidecar(f"its environment has more than {MAX_ENVIRONMENT} bytes")
    texts = os.fsdecode(raw).split("\0")
    environment = _Asked(dict(text.split("=", 1) for text in texts if "=" in text))
    try:
        settings = read_environment(environment)
    except EnvironmentFault as error:
        raise LeftToSidecar(f"its environment: {error}") from None
    reason = _better_with_the_sidecar(settings)
    if reason:
        raise LeftToSidecar(reason)
    try:
        certificate = certificates.of_container(pid)
    except ValueError as error:
        raise LeftToSidecar(str(error)) from None
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - _started(folder)
    namespace = os.open(folder / "ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if os.fstat(namespace).st_ino == os.stat("/proc/self/ns/net").st_ino:  # noqa: PTH116
        os.close(namespace)
        raise LeftToSidecar("it is in the node's network (hostNetwork)")
    if not lease.alive(process):  # so what was read may be another's
        os.close(namespace)
        raise NoHold("hold ended just now")
    asked = environment.asked
    return Hold(process, namespace, asked, settings, max(age, 0.0), pid, certificate)


class _Asked(Mapping[str, str]):
    """Variables, and those of them that were `asked` for. What else there is may be much, such as
    the addresses of all Services of the namespace."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._all = variables
        self.asked: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        value = self.asked[name] = self._all[name]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


def _better_with_the_sidecar(settings: SidecarSettings) -> str:
    """What a worker can't do for a pod: write into its log, read its files, speak for it."""
    asked = settings.observability
    if asked.request_log.enabled and asked.request_log.template:
        return "a request log is asked for, which goes to the container's own output"
    if asked.tracing.protocol != "none":
        return f"traces are asked for ({asked.tracing.protocol})"
    if asked.request_metrics.protocol not in ("none", "prometheus"):
        return f"metrics are to be pushed ({asked.request_metrics.protocol})"
    if asked.profiling:
        return "profiling is asked for"
    if asked.prometheus.tls_cert:  # without it the other names are refused
        return "metrics are asked for with TLS, from files of the container"
    return ""


def _started(folder: Path) -> float:
    """Seconds after the machine's start."""
    ticks = (folder / "stat").read_text().rpartition(")")[2].split()[19]
    return int(ticks) / os.sysconf("SC_CLK_TCK")
