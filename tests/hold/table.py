"""What hold/lease.h says, read from the file itself, so that nothing is written down twice."""

from __future__ import annotations

import re
from pathlib import Path

HEADER = Path(__file__).parents[2] / "hold" / "lease.h"
_text = HEADER.read_text()

Row = tuple[str, tuple[str, ...]]
"""The next state, and the actions in the order in which they are carried out."""


def _items(name: str, item: str) -> list[str]:
    body = re.search(rf"#define {name}\({item}\)((?:.*\\\n)*.*)\n", _text)
    assert body is not None, name
    return re.findall(rf"{item}\((\w+)\)", body[1])


STATES = _items("LEASE_STATES", "STATE")
EVENTS = _items("LEASE_EVENTS", "EVENT")
ACTIONS = _items("LEASE_ACTIONS", "ACTION")
WORDS = dict(re.findall(r'#define (WORD_\w+)\s+"([^"]+)"', _text))
NUMBERS = {k: int(v) for k, v in re.findall(r"#define (\w+)\s+(\d+)(?:\s|$)", _text)}
TABLE: dict[tuple[str, str], Row] = {
    (state, event): (after, tuple(sorted(actions.split(" | "), key=ACTIONS.index)))
    for state, event, after, actions in re.findall(
        r"ROW\((\w+), +(\w+), +(\w+), +([\w |]+)\)", _text
    )
}
