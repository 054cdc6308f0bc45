"""Typed access to a BPF map: keys and values as the C side declares them.

A value is what its layout decodes to: an int, a tuple for an array, a dict for a struct.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from typing import Any

from weir.bpf.btf import MapTypes, Struct
from weir.bpf.libbpf import BpfError, library

_ANY, _NOEXIST, _LOCK = 0, 1, 4


class Map:
    """A map of a loaded object. The object owns the descriptor."""

    def __init__(self, name: str, fd: int, types: MapTypes) -> None:
        self._name, self._fd, self._types = name, fd, types
        self._lib = library()
        self._parts: dict[tuple[str, ...], Struct] = {}

    def get(self, key: Any, *names: str, locked: bool = False) -> Any | None:
        """None when there is no such key; of a struct only the fields `names`, if there are any.
        `locked`: under the value's spin lock, so that the fields agree with each other."""
        buffer = ctypes.create_string_buffer(self._types.value.size)
        encoded = key if isinstance(key, bytes) else self._types.key.encode(key)
        result = self._lib.bpf_map_lookup_elem_flags(
            self._fd, encoded, buffer, _LOCK if locked else _ANY
        )
        if result == -errno.ENOENT:
            return None
        self._check(result, "get", key)
        if not names:
            return self._types.value.decode(buffer.raw)
        if names not in self._parts:
            assert isinstance(self._types.value, Struct)
            self._parts[names] = self._types.value.part(*names)
        return self._parts[names].decode(buffer.raw)

    def encoded(self, key: Any) -> bytes:
        """What `get` takes as well: of a key that is asked for all the time."""
        return self._types.key.encode(key)

    def put(self, key: Any, value: Any) -> None:
        self._check(self._update(key, value, _ANY), "put", key)

    def add(self, key: Any, value: Any) -> bool:
        """Put, unless the key is there already: False then."""
        result = self._update(key, value, _NOEXIST)
        if result == -errno.EEXIST:
            return False
        self._check(result, "add", key)
        return True

    def delete(self, key: Any) -> None:
        """A key that isn't there is fine."""
        result = self._lib.bpf_map_delete_elem(self._fd, self._types.key.encode(key))
        if result not in (-errno.ENOENT, -errno.EINVAL):
            self._check(result, "delete", key)

    def keys(self) -> Iterator[Any]:
        """Every key. One that comes or goes meanwhile may be missed or met."""
        current: bytes | None = None
        following = ctypes.create_string_buffer(self._types.key.size)
        while self._lib.bpf_map_get_next_key(self._fd, current, following) == 0:
            current = following.raw
            yield self._types.key.decode(current)

    def items(self) -> Iterator[tuple[Any, Any]]:
        for key in self.keys():
            value = self.get(key)
            if value is not None:
                yield key, value

    def _update(self, key: Any, value: Any, flags: int) -> int:
        types = self._types
        result: int = self._lib.bpf_map_update_elem(
            self._fd, types.key.encode(key), types.value.encode(value), flags
        )
        return result

    def _check(self, result: int, what: str, key: Any) -> None:
        if result < 0:
            raise BpfError(-result, f"map {self._name}: {what} {key}")
