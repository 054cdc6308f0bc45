"""A pod as the agent is told of it, and the static source of pods: a JSON file.

Owns the description and its validation. Kubernetes discovery will be another source of the same
`PodSpec`; what happens to a pod is the agent's business.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weir.proxy import contract


class PodFileError(Exception):
    """A pods file that can't be used; the message names the file, the pod and the field."""


@dataclass(frozen=True)
class PodSpec:
    """One pod. `netns` and `cgroup` are None for a plain process: it is relayed, never steered.

    `listen` is the address the relay's data port is opened on (inside the pod's netns, if it has
    one); `data_port` 0 takes a free one, and the agent's status tells which.

    A pod with a hold (`hold` is its pid, or `hold_cgroup` where it is to be found) is only named:
    settings, ports and network namespace are read from that process when it is there.
    """

    name: str
    settings: contract.RevisionSettings
    netns: Path | None = None
    cgroup: Path | None = None
    addresses: tuple[str, ...] = ()
    listen: str = "::"
    data_port: int = contract.DATA_PORT
    direct_port: int = contract.DIRECT_PORT
    interface: str = "eth0"
    hold: int = 0
    hold_cgroup: Path | None = None

    @property
    def borrowed(self) -> bool:
        return bool(self.hold) or self.hold_cgroup is not None


_REQUIRED = object()
# field in the file -> (type, default)
_FIELDS: dict[str, tuple[type, Any]] = {
    "name": (str, _REQUIRED),
    "userPort": (int, _REQUIRED),
    "netns": (str, ""),
    "cgroup": (str, ""),
    "addresses": (list, ()),
    "listen": (str, "::"),
    "dataPort": (int, contract.DATA_PORT),
    "directPort": (int, contract.DIRECT_PORT),
    "interface": (str, "eth0"),
    "namespace": (str, "default"),
    "revision": (str, ""),
    "containerConcurrency": (int, 0),
    "timeoutSeconds": (int, 300),
    "responseStartTimeoutSeconds": (int, 0),
    "idleTimeoutSeconds": (int, 0),
    "readinessPath": (str, ""),
}
# the same for a pod with a hold, which says the rest itself
_BORROWED: dict[str, tuple[type, Any]] = {
    "name": (str, _REQUIRED),
    "hold": (int, 0),
    "holdCgroup": (str, ""),
    "cgroup": (str, ""),
    "addresses": (list, ()),
    "directPort": (int, contract.DIRECT_PORT),
    "interface": (str, "eth0"),
}


def load_pods(path: Path) -> list[PodSpec]:
    """The pods of a file `{"pods": [{"name": ..., "userPort": ...}, ...]}`.

    Raises PodFileError, which says which file, pod and field and what is expected.
    """
    try:
        document = json.loads(path.read_text())
    except OSError as e:
        raise PodFileError(f"{path}: {e.strerror}") from None
    except ValueError as e:
        raise PodFileError(f"{path}: not JSON: {e}") from None
    pods = document.get("pods") if isinstance(document, dict) else None
    if not isinstance(pods, list) or not pods:
        raise PodFileError(f'{path}: expected {{"pods": [...]}} with at least one pod')
    specs = [_pod(path, i, pod) for i, pod in enumerate(pods)]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise PodFileError(f"{path}: two pods are named {name!r}; names must differ")
    return specs


def _pod(path: Path, index: int, pod: object) -> PodSpec:
    if not isinstance(pod, Mapping):
        raise PodFileError(f"{path}: pods[{index}]: expected an object")
    where = f"{path}: pod {pod.get('name', f'number {index}')!r}"
    borrowed = "hold" in pod or "holdCgroup" in pod
    fields = _BORROWED if borrowed else _FIELDS
    for unknown in pod.keys() - fields.keys():
        of = " of a pod with a hold, which says the rest itself" if borrowed else ""
        raise PodFileError(f"{where}: unknown field {unknown!r}{of}; known: {', '.join(fields)}")
    field: dict[str, Any] = {}
    for name, (kind, default) in fields.items():
        value = pod.get(name, default)
        if value is _REQUIRED:
            raise PodFileError(f"{where}: {name} is missing")
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
            raise PodFileError(f"{where}: {name}: expected {kind.__name__}, got {value!r}")
        field[name] = value
    for name in ("userPort", "directPort"):
        if name in field and not 0 < field[name] < 65536:
            raise PodFileError(f"{where}: {name}: {field[name]} is not a port (1-65535)")
    if borrowed:
        return _borrowed(where, field)
    if field["containerConcurrency"] < 0:
        raise PodFileError(f"{where}: containerConcurrency: must be 0 (no limit) or more")
    if bool(field["netns"]) != bool(field["cgroup"]):
        raise PodFileError(
            f"{where}: netns and cgroup go together: give both, or neither (relay only)"
        )
    return PodSpec(
        name=field["name"],
        settings=contract.RevisionSettings(
            pod=field["name"],
            namespace=field["namespace"],
            revision=field["revision"] or field["name"],
            user_port=field["userPort"],
            container_concurrency=field["containerConcurrency"],
            timeout=float(field["timeoutSeconds"]),
            response_start_timeout=float(field["responseStartTimeoutSeconds"]),
            idle_timeout=float(field["idleTimeoutSeconds"]),
            probes=(
                contract.Probe(
                    port=field["userPort"],
                    http=contract.HttpGet(field["readinessPath"])
                    if field["readinessPath"]
                    else None,
                ),
            ),
        ),
        netns=Path(field["netns"]) if field["netns"] else None,
        cgroup=Path(field["cgroup"]) if field["cgroup"] else None,
        addresses=tuple(field["addresses"]),
        listen=field["listen"],
        data_port=field["dataPort"],
        direct_port=field["directPort"],
        interface=field["interface"],
    )


def _borrowed(where: str, field: dict[str, Any]) -> PodSpec:
    if (field["hold"] > 0) == bool(field["holdCgroup"]):
        raise PodFileError(f"{where}: give hold (a pid) or holdCgroup (a folder), one of them")
    return PodSpec(
        name=field["name"],
        settings=contract.RevisionSettings(user_port=0, pod=field["name"]),  # until it is found
        cgroup=Path(field["cgroup"]) if field["cgroup"] else None,
        addresses=tuple(field["addresses"]),
        direct_port=field["directPort"],
        interface=field["interface"],
        hold=field["hold"],
        hold_cgroup=Path(field["holdCgroup"]) if field["holdCgroup"] else None,
    )
