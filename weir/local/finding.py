"""One finding of `weir doctor`: a value. Knows no check."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`ok` None: works without, only less well. `fix` is what to type or change."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""
