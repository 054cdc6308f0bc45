"""A ring buffer of the kernel's as a doorbell: programs say which pod something happened in.

Owns the ring's shared pages, from which numbers of eight bytes are read. Nothing may depend on
their being heard: of two processes that listen each hears a part, and what nobody hears for long
is lost. Whoever listens must find out by other means, only later.
"""

from __future__ import annotations

import mmap
import struct

_PAGE = mmap.PAGESIZE
_RECORD = 16  # a header of eight bytes: length and flags
_BUSY, _LENGTH = 1 << 31, (1 << 30) - 1


class Doorbell:
    """Readable (`fileno`) when it has rung. The descriptor is the map's owner's."""

    def __init__(self, fd: int, size: int) -> None:
        """`size` in bytes, of the map. Raises OSError."""
        self._fd = fd
        self._size = size
        self._ours = mmap.mmap(fd, _PAGE)
        try:  # the position of the kernel, then the ring twice in a row: no record is cut
            self._kernels = mmap.mmap(fd, _PAGE + 2 * size, prot=mmap.PROT_READ, offset=_PAGE)
        except OSError:
            self._ours.close()
            raise

    def fileno(self) -> int:
        return self._fd

    def heard(self) -> set[int]:
        """What was said since the last time."""
        (at,) = struct.unpack_from("<Q", self._ours)
        (end,) = struct.unpack_from("<Q", self._kernels)
        found: set[int] = set()
        while at < end:
            where = _PAGE + at % self._size
            length, _, number = struct.unpack_from("<IIQ", self._kernels, where)
            if length & _BUSY:
                break
            if length & _LENGTH == _RECORD - 8:
                found.add(number)
            at += _RECORD
        struct.pack_into("<Q", self._ours, 0, at)
        return found

    def close(self) -> None:
        self._ours.close()
        self._kernels.close()
