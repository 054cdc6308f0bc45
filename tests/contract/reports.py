"""What a sidecar tells about its requests: the autoscaler's `Stat` on 9090, Prometheus on 9091.

Decoded by hand and in full view, so that no library of the sidecar's own vouches for it (contract
sections 5.1 and 7.2).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

_FIELDS = {
    2: "average_concurrent_requests",
    3: "average_proxied_concurrent_requests",
    4: "request_count",
    5: "proxied_request_count",
    6: "process_uptime",
}
_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass
class Stat:
    """`numbers` are only those that were sent: proto3 leaves zeros out."""

    pod_name: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.numbers.get(name, 0.0)


def decode_stat(data: bytes) -> Stat:
    """Raises ValueError for anything but the six fields of the contract."""
    stat = Stat()
    at = 0
    while at < len(data):
        tag = data[at]
        number, wire = tag >> 3, tag & 7
        at += 1
        if number == 1 and wire == 2:
            size = data[at]
            if size > 127:
                raise ValueError(f"a pod name of more than 127 bytes in {data.hex()}")
            stat.pod_name = data[at + 1 : at + 1 + size].decode()
            at += 1 + size
        elif number in _FIELDS and wire == 1:
            (stat.numbers[_FIELDS[number]],) = struct.unpack_from("<d", data, at)
            at += 8
        else:
            raise ValueError(f"field {number} of type {wire} in {data.hex()}")
    return stat


@dataclass
class Exposition:
    """`samples` by name and sorted labels; `types` by family."""

    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]
    types: dict[str, str]


def parse_exposition(text: str) -> Exposition:
    """Prometheus' text format, as far as it is sent. Raises ValueError for a line that is none."""
    exposition = Exposition({}, {})
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            exposition.types[family] = kind
        elif line and not line.startswith("#"):
            match = _SAMPLE.fullmatch(line)
            if match is None:
                raise ValueError(f"no sample: {line!r}")
            labels = tuple(sorted(_LABEL.findall(match["labels"] or "")))
            exposition.samples[match["name"], labels] = float(match["value"])
    return exposition


def counts(exposition: Exposition, prefix: str, usual: Mapping[str, str]) -> dict[str, str]:
    """How many, by what else than the `usual` labels, which are only mentioned if they differ."""
    return {
        f"9091 {name}{_unusual(labels, usual)}": f"{value:g}"
        for (name, labels), value in exposition.samples.items()
        if name.startswith(prefix) and "_latencies_" not in name
    }


def shapes(exposition: Exposition, prefix: str, usual: Mapping[str, str]) -> dict[str, str]:
    """Types, label names, and of histograms the bounds, and that they counted as many."""
    facts: dict[str, str] = {}
    bounds: dict[str, list[str]] = {}
    for (name, labels), value in exposition.samples.items():
        if not name.startswith(prefix):
            continue
        facts[f"labels of {name}"] = " ".join(key for key, _ in labels)
        if name.endswith("_bucket"):
            bounds.setdefault(name, []).append(dict(labels)["le"])
        elif not name.endswith("_sum"):
            facts[f"{name}{_unusual(labels, usual)}"] = f"{value:g}"
    for name, several in bounds.items():
        facts[f"bounds of {name}"] = " ".join(dict.fromkeys(several))
    for family, kind in exposition.types.items():
        if family.startswith(prefix):
            facts[f"type of {family}"] = kind
    return facts


def _unusual(labels: tuple[tuple[str, str], ...], usual: Mapping[str, str]) -> str:
    has = dict(labels)
    names = sorted({*has, *usual})
    text = ",".join(
        f"{name}={has.get(name, '?')}" for name in names if has.get(name) != usual.get(name)
    )
    return f"{{{text}}}"
