"""Prometheus' text format 0.0.4 read strictly: what a scraper would refuse is an AssertionError."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

Key = tuple[str, frozenset[tuple[str, str]]]

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(?:,|(?=}))')
_ESCAPE = re.compile(r"\\(.)")
_PARTS = ("_bucket", "_sum", "_count")


@dataclass
class Page:
    """The samples of a page, by name and labels, and the types of its families."""

    samples: dict[Key, float] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def value(self, name: str, **labels: str) -> float:
        """Of the only sample with this name and these labels among its own."""
        (found,) = self.found(name, **labels)
        return self.samples[found]

    def found(self, name: str, **labels: str) -> list[Key]:
        return [key for key in self.samples if key[0] == name and key[1] >= labels.items()]

    def counters(self) -> dict[Key, float]:
        """All that must never go down."""
        return {
            key: value
            for key, value in self.samples.items()
            if self.kinds[family_of(key[0], self.kinds)] in ("counter", "histogram")
        }


def family_of(name: str, kinds: dict[str, str]) -> str:
    for part in _PARTS:
        if kinds.get(name.removesuffix(part)) == "histogram":
            return name.removesuffix(part)
    return name


def read(text: str) -> Page:
    page = Page()
    current = ""
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            continue
        if line.startswith("# TYPE "):
            _, _, current, kind = line.split(" ")
            assert current not in page.kinds, f"{current} comes twice"
            page.kinds[current] = kind
            continue
        match = _NAME.match(line)
        assert match is not None, line
        name, rest = match[0], line[match.end() :]
        labels: list[tuple[str, str]] = []
        if rest.startswith("{"):
            rest, labels = _labels(rest[1:])
        assert rest.startswith(" "), line
        assert family_of(name, page.kinds) == current, f"{name} among those of {current}"
        key = (name, frozenset(labels))
        assert len(key[1]) == len(dict(labels)) == len(labels), f"a label twice: {line}"
        assert key not in page.samples, f"twice: {line}"
        page.samples[key] = float(rest)
    _check_histograms(page)
    return page


def _labels(rest: str) -> tuple[str, list[tuple[str, str]]]:
    labels: list[tuple[str, str]] = []
    while not rest.startswith("}"):
        match = _LABEL.match(rest)
        assert match is not None, rest
        labels.append((match[1], _ESCAPE.sub(lambda m: "\n" if m[1] == "n" else m[1], match[2])))
        rest = rest[match.end() :]
    return rest[1:], labels


def _check_histograms(page: Page) -> None:
    for name, kind in page.kinds.items():
        if kind != "histogram":
            continue
        series: dict[frozenset[tuple[str, str]], list[tuple[float, float]]] = {}
        for (sample, labels), value in page.samples.items():
            if sample == f"{name}_bucket":
                others = frozenset(pair for pair in labels if pair[0] != "le")
                series.setdefault(others, []).append((float(dict(labels)["le"]), value))
        for others, buckets in series.items():
            assert buckets == sorted(buckets), f"{name} is not cumulative"
            assert [count for _, count in buckets] == sorted(count for _, count in buckets)
            assert buckets[-1] == (float("inf"), page.samples[f"{name}_count", others])
            assert page.samples[f"{name}_sum", others] >= 0
