"""Struct layouts and map types, read from the BTF in a compiled object.

The C headers are the only definition of what the programs and Python share; nothing here knows
any particular struct. Little-endian ELF64 only, which is all that clang makes of `-target bpf`
on the machines we support. Format: Documentation/bpf/btf.rst of the kernel.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _FWD = range(1, 8)
_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _FUNC, _FUNC_PROTO, _VAR, _DATASEC = range(8, 16)
_FLOAT, _DECL_TAG, _TYPE_TAG, _ENUM64 = range(16, 20)
_TRANSPARENT = (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG)
#: bytes that follow the 12 of `struct btf_type`: fixed, and for each of its `vlen` members
_TAIL = {
    _INT: (4, 0),
    _ARRAY: (12, 0),
    _STRUCT: (0, 12),
    _UNION: (0, 12),
    _ENUM: (0, 8),
    _FUNC_PROTO: (0, 8),
    _VAR: (4, 0),
    _DATASEC: (0, 12),
    _DECL_TAG: (4, 0),
    _ENUM64: (0, 12),
}


class BtfError(Exception):
    """The object has no usable BTF; says which object and what is missing in it."""


@dataclass(frozen=True)
class Integer:
    """A scalar of `size` bytes; enums and pointers are read as one, too."""

    size: int
    signed: bool = False

    def decode(self, data: bytes) -> int:
        return int.from_bytes(data, "little", signed=self.signed)

    def encode(self, value: int) -> bytes:
        return value.to_bytes(self.size, "little", signed=self.signed)


@dataclass(frozen=True)
class Array:
    """`count` elements; decoded to a tuple. Shorter values are encoded with zeros behind."""

    element: Layout
    count: int

    @property
    def size(self) -> int:
        return self.element.size * self.count

    def decode(self, data: bytes) -> tuple[Any, ...]:
        step = self.element.size
        if isinstance(self.element, Integer) and step == 8 and not self.element.signed:
            return struct.unpack(f"<{self.count}Q", data)
        return tuple(self.element.decode(data[i : i + step]) for i in range(0, len(data), step))

    def encode(self, value: tuple[Any, ...]) -> bytes:
        return b"".join(self.element.encode(each) for each in value).ljust(self.size, b"\0")


@dataclass(frozen=True)
class Field:
    name: str
    offset: int
    layout: Layout


@dataclass(frozen=True)
class Struct:
    """Decoded to a dict by field name. Fields that `encode` isn't given are zero."""

    name: str
    size: int
    fields: tuple[Field, ...]

    def decode(self, data: bytes) -> dict[str, Any]:
        return {
            field.name: field.layout.decode(data[field.offset : field.offset + field.layout.size])
            for field in self.fields
        }

    def part(self, *names: str) -> Struct:
        """As if it had these fields alone: what is decoded often is chosen once."""
        chosen = tuple(field for field in self.fields if field.name in names)
        return Struct(self.name, self.size, chosen)

    def encode(self, value: dict[str, Any]) -> bytes:
        data = bytearray(self.size)
        rest = dict(value)
        for field in self.fields:
            if field.name in rest:
                part = field.layout.encode(rest.pop(field.name))
                data[field.offset : field.offset + len(part)] = part
        if rest:
            raise KeyError(f"struct {self.name} has no field {', '.join(sorted(rest))}")
        return bytes(data)


Layout = Integer | Array | Struct


@dataclass(frozen=True)
class MapTypes:
    key: Layout
    value: Layout


@dataclass(frozen=True)
class _Type:
    name: str
    kind: int
    size_or_type: int
    tail: bytes

    def members(self) -> Iterator[tuple[int, int, int]]:
        """(name, type, bit offset) of a struct's fields, (type, offset, size) of a section's."""
        return struct.iter_unpack("<III", self.tail)


class Btf:
    """All types of one object."""

    def __init__(self, section: bytes, origin: str) -> None:
        magic, _version, _flags, header, types_at, types_size, strings_at, strings_size = (
            struct.unpack_from("<HBBIIIII", section)
        )
        if magic != 0xEB9F:
            raise BtfError(f"{origin}: the BTF section is damaged or big-endian")
        self._origin = origin
        self._strings = section[header + strings_at :][:strings_size]
        self._types = list(self._read_types(section[header + types_at :][:types_size]))

    @classmethod
    def of_object(cls, path: Path) -> Btf:
        """Raises BtfError; OSError when the file can't be read."""
        return cls(elf_section(path, ".BTF"), str(path))

    def struct(self, name: str) -> Struct:
        for number, each in enumerate(self._types):
            if each.kind == _STRUCT and each.name == name:
                layout = self._layout(number)
                assert isinstance(layout, Struct)
                return layout
        raise BtfError(f"{self._origin}: no struct {name} in its BTF")

    def enum(self, name: str) -> dict[str, int]:
        for each in self._types:
            if each.kind == _ENUM and each.name == name:
                pairs = struct.iter_unpack("<Ii", each.tail)
                return {self._string(at): value for at, value in pairs}
        raise BtfError(f"{self._origin}: no enum {name} in its BTF")

    @cached_property
    def maps(self) -> dict[str, MapTypes]:
        """Key and value types of every map that has some, from its definition: struct NAME_map."""
        return {
            name: MapTypes(self._layout(key), self._layout(value))
            for name, said in self._definitions.items()
            if "key" in said
            for key, value in (self.map_types(name),)
        }

    def map_types(self, name: str) -> tuple[int, int]:
        """The numbers of a map's key and value types."""
        members = self._definitions[name]
        return (
            self._types[members["key"]].size_or_type,
            self._types[members["value"]].size_or_type,
        )

    def map_settings(self, name: str) -> dict[str, int]:
        """What __uint() said of a map: a pointer to an array so long."""
        return {
            member: int.from_bytes(array.tail[8:12], "little")
            for member, pointer in self._definitions[name].items()
            for array in (self._types[self._types[pointer].size_or_type],)
            if member not in ("key", "value") and array.kind == _ARRAY
        }

    def fingerprint(self) -> str:
        """Eight hexadecimal digits that two objects share if one may use the other's maps:
        names, settings, key and value types of all maps, and enum layout's version."""
        told: list[object] = [self.enum("layout")]
        for name in sorted(self._definitions):
            told += [name, sorted(self.map_settings(name).items()), self.maps.get(name)]
        # no hashlib, which brings all of OpenSSL into the process
        return f"{zlib.crc32(repr(told).encode()):08x}"

    def function(self, name: str) -> int:
        """The number of a function."""
        for number, each in enumerate(self._types):
            if each.kind == _FUNC and each.name == name:
                return number
        raise BtfError(f"{self._origin}: no function {name} in its BTF")

    @cached_property
    def _definitions(self) -> dict[str, dict[str, int]]:
        """By map, what is said of it: {member: type number}."""
        return {
            each.name.removesuffix("_map"): {
                self._string(at): member for at, member, _ in each.members()
            }
            for each in self._types
            if each.kind == _STRUCT and each.name.endswith("_map")
        }

    def _layout(self, number: int) -> Layout:
        each = self._types[number]
        if each.kind in _TRANSPARENT:
            return self._layout(each.size_or_type)
        if each.kind == _INT:
            return Integer(each.size_or_type, signed=bool(each.tail[3] & 1))
        if each.kind in (_ENUM, _ENUM64):
            return Integer(each.size_or_type)
        if each.kind == _PTR:
            return Integer(8)
        if each.kind == _ARRAY:
            element, _index, count = struct.unpack("<III", each.tail)
            return Array(self._layout(element), count)
        if each.kind in (_STRUCT, _UNION):
            fields = tuple(
                Field(self._string(at), bits // 8, self._layout(member))
                for at, member, bits in each.members()
            )
            return Struct(each.name, each.size_or_type, fields)
        raise BtfError(f"{self._origin}: type {each.name or number} (kind {each.kind}) has no size")

    def _read_types(self, data: bytes) -> Iterator[_Type]:
        yield _Type("void", 0, 0, b"")
        at = 0
        while at < len(data):
            name, info, size_or_type = struct.unpack_from("<III", data, at)
            kind, members = info >> 24 & 0x1F, info & 0xFFFF
            fixed, each = _TAIL.get(kind, (0, 0))
            end = at + 12 + fixed + each * members
            yield _Type(self._string(name), kind, size_or_type, data[at + 12 : end])
            at = end

    def _string(self, at: int) -> str:
        return self._strings[at : self._strings.index(b"\0", at)].decode()


def elf_section(path: Path, wanted: str) -> bytes:
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise BtfError(f"{path}: not a little-endian 64-bit ELF object")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_number = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + size * i) for i in range(count)]
    names_at = headers[names_number][4]
    for name, _type, _flags, _address, offset, length in headers:
        start = names_at + name
        if data[start : data.index(b"\0", start)].decode() == wanted:
            return data[offset : offset + length]
    raise BtfError(f"{path}: no {wanted} section; compile it with -g")
