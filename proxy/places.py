"""The table in which connections keep their state as long as there is a place (bpf/maps.h).

Owns how user space sees it: mapped into memory for a moment, since of an entry that the programs
use one word alone is to be written. Refuses to know what a state says.
"""

from __future__ import annotations

import mmap
from ctypes import c_uint64

from weir.bpf.btf import Btf, Struct

_CLAIMED = (1 << 64) - 1  # in bpf/track.h: being made ready for the one that comes


class Places:
    """Of one layout."""

    def __init__(self, fd: int, btf: Btf) -> None:
        place = btf.maps["places"].value
        assert isinstance(place, Struct)
        state = place.fields[-1]
        assert isinstance(state.layout, Struct)
        offsets = {field.name: state.offset + field.offset for field in state.layout.fields}
        self._fd, self._step = fd, place.size
        self._size = btf.map_settings("places")["max_entries"] * place.size
        self._owner, self._netns = offsets["owner"], offsets["netns"]
        self._state = slice(state.offset, state.offset + state.layout.size)

    def states(self) -> dict[int, bytes]:
        """By the cookies of the sockets. Raises OSError."""
        with mmap.mmap(self._fd, self._size) as table:
            copies = [table[at : at + self._step] for at in range(0, self._size, self._step)]
        found = {_word(copy, self._owner): copy[self._state] for copy in copies}
        return {cookie: state for cookie, state in found.items() if cookie not in (0, _CLAIMED)}

    def clear(self, netns: int) -> None:
        """Free those of a pod, by its cookie, when no program of it runs any more."""
        with mmap.mmap(self._fd, self._size) as table:
            for at in range(0, self._size, self._step):
                owned = _word(table, at + self._owner) not in (0, _CLAIMED)
                if owned and _word(table, at + self._netns) == netns:  # in this order
                    c_uint64.from_buffer(table, at + self._owner).value = 0


def _word(data: bytes | mmap.mmap, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")
