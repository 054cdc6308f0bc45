"""How many bytes were put aside, in the whole process: what was read and can't go on yet.

Owns the count and who is asked when it has grown by a step. It knows neither limits nor whose bytes
they are. Only what waits is counted: what passes through costs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

LARGE_BYTES = 16 << 10
"""A head above this counts as put aside while its request is under way."""


class Aside:
    step: ClassVar[int] = 1 << 60
    left: ClassVar[int] = 1 << 60


def _nobody() -> None:
    pass


_look: list[Callable[[], None]] = [_nobody]


def look_every(step: int, look: Callable[[], None]) -> None:
    """From now on call `look` whenever so many bytes more have been put aside."""
    Aside.step = Aside.left = step
    _look[0] = look


def put_aside(size: int) -> None:
    Aside.left -= size
    if Aside.left < 0:
        Aside.left = Aside.step
        _look[0]()
