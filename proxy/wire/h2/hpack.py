"""Header compression (RFC 7541), as a relay wants it.

The Decoder follows the table that its peer fills. What we send ourselves refers to the static table
only and adds nothing to a table, so it depends on no state: a block that was encoded once may be
sent again on any connection, and fields may be appended to it as bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from weir.proxy.wire.aside import put_aside
from weir.proxy.wire.h2 import huffman

Field = tuple[bytes, bytes]

TABLE_BYTES = 4096
"""The largest dynamic table we let a peer use: the protocol's default."""
EMPTY_TABLE = b"\x20"
"""The instruction that our own table, unused as it is, has no size; a peer may insist on one."""
_OVERHEAD = 32  # what an entry counts beyond its bytes
_REMEMBERED_BYTES = 4096
"""Of the fields of a block that is remembered: a few bytes of it as it came may stand for much."""
_ALL_REMEMBERED_BYTES = 16 * _REMEMBERED_BYTES
"""Of all such blocks of one peer; each counts so much more than its fields:"""
_BLOCK_BYTES = 512
_REMEMBERED_STRINGS = 512
_STRING_BYTES = 512
"""Memory of a remembered string, about; the longest ones take 800."""
_COPIES = 6
"""So many times what its fields count is the memory that a block takes, at most."""
MOST_FIELDS = 2000
"""In one block. Each is several objects, so a megabyte of tiny ones would be ten of memory."""

_STATIC_TEXT = """\
:authority
:method GET
:method POST
:path /
:path /index.html
:scheme http
:scheme https
:status 200
:status 204
:status 206
:status 304
:status 400
:status 404
:status 500
accept-charset
accept-encoding gzip, deflate
accept-language
accept-ranges
accept
access-control-allow-origin
age
allow
authorization
cache-control
content-disposition
content-encoding
content-language
content-length
content-location
content-range
content-type
cookie
date
etag
expect
expires
from
host
if-match
if-modified-since
if-none-match
if-range
if-unmodified-since
last-modified
link
location
max-forwards
proxy-authenticate
proxy-authorization
range
referer
refresh
retry-after
server
set-cookie
strict-transport-security
transfer-encoding
user-agent
vary
via
www-authenticate
"""


def _static() -> list[Field]:
    lines = (line.encode().partition(b" ") for line in _STATIC_TEXT.splitlines())
    return [(name, value) for name, _, value in lines]


STATIC: list[Field] = [(b"", b""), *_static()]
"""By index, from 1."""
_INDEX = {field: bytes([0x80 | i]) for i, field in reversed([*enumerate(STATIC)][1:])}
_NAMES = {name: i for i, (name, _) in reversed([*enumerate(STATIC)][1:])}
_NEVER_INDEXED = frozenset({b"authorization", b"proxy-authorization", b"cookie", b"set-cookie"})


class HpackError(Exception):
    """The block can't be decoded, so neither can any later one: the connection has to end."""


class TooLarge(Exception):
    """The fields are larger than what is accepted; the table is as it should be."""


class _Strings(dict[bytes, bytes]):
    """Decoded Huffman strings: header values repeat."""

    def __missing__(self, data: bytes) -> bytes:
        try:
            text = huffman.decode(data)
        except huffman.HuffmanError as error:
            raise HpackError(str(error)) from None
        if len(data) <= 256:
            if len(self) >= _REMEMBERED_STRINGS:
                self.clear()
            self[data] = text
        return text


class Block:
    """The fields of a header block, with room for what its reader made of them."""

    __slots__ = ("fields", "made")

    def __init__(self, fields: tuple[Field, ...]) -> None:
        self.fields = fields
        self.made: Any = None


class Decoder:
    """Header blocks of one peer, in the order they came. `limit` bounds the bytes of all fields."""

    __slots__ = (
        "_added",
        "_blocks",
        "_counted",
        "_entries",
        "_limit",
        "_literal_blocks",
        "_looked_up",
        "_remembered",
        "_room",
        "_size",
        "_strings",
        "fresh",
    )

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._room = TABLE_BYTES
        self._size = 0
        self._entries: deque[Field] = deque()
        self._strings = _Strings()
        # known blocks: those that the table as it is gives a meaning, and those that mean the same
        # with any table, with what they add to it (some servers write all fields like that)
        self._blocks: dict[bytes, Block] = {}
        self._literal_blocks: dict[bytes, tuple[Block, list[Field]]] = {}
        self._remembered = 0  # bytes of the fields of both
        self.fresh = 0
        """Bytes of the fields that were not known: what it cost. To be reset by who asks."""
        # of the block that is being decoded
        self._added: list[Field] = []
        self._counted = 0
        self._looked_up = False

    def weigh(self) -> int:
        """Bytes of memory, about, of what is remembered."""
        return self._size + _COPIES * self._remembered + _STRING_BYTES * len(self._strings)

    def decode(self, block: bytes) -> Block:
        """The same object for the same bytes, as long as they mean the same.

        Raises HpackError, or TooLarge.
        """
        known = self._blocks.get(block)
        if known is not None:
            return known
        literal = self._literal_blocks.get(block)
        if literal is not None:
            for field in literal[1]:
                self._add(field)
            return literal[0]
        self._added = []
        self._looked_up = False
        decoded = Block(tuple(self._fields(block)))
        if self._counted > _REMEMBERED_BYTES:
            put_aside(_COPIES * self._counted)  # until the request is over
            self._added = []
        elif not self._looked_up or not self._added:
            self._remember(block, decoded)
        return decoded

    def _remember(self, block: bytes, decoded: Block) -> None:
        size = _BLOCK_BYTES + self._counted
        self._remembered += size
        if self._remembered > _ALL_REMEMBERED_BYTES:
            self._blocks.clear()
            self._literal_blocks.clear()
            self._remembered = size
        put_aside(size)
        if self._looked_up:
            self._blocks[block] = decoded
        else:
            self._literal_blocks[block] = (decoded, self._added)

    def _fields(self, block: bytes) -> list[Field]:
        fields: list[Field] = []
        at, end, size, left = 0, len(block), 0, MOST_FIELDS
        try:
            while at < end:
                first = block[at]
                if first & 0x80:
                    index, at = self._integer(block, at, 7)
                    field = self._entry(index)
                elif first & 0x40:
                    field, at = self._literal(block, at, 6)
                    self._added.append(field)
                    self._add(field)
                elif first & 0x20:
                    if fields:
                        raise HpackError("the table changes its size within a block")
                    room, at = self._integer(block, at, 5)
                    self._resize(room)
                    continue
                else:
                    field, at = self._literal(block, at, 4)
                size += len(field[0]) + len(field[1]) + _OVERHEAD
                left -= 1
                if left < -MOST_FIELDS:
                    raise HpackError("far too many fields")
                if size <= self._limit and left >= 0:  # beyond it only the table matters
                    fields.append(field)
        except IndexError:
            raise HpackError("the block ends too early") from None
        self.fresh = size
        if size > self._limit or left < 0:
            self._added = []
            raise TooLarge
        self._counted = size
        return fields

    def _literal(self, block: bytes, at: int, bits: int) -> tuple[Field, int]:
        index, at = self._integer(block, at, bits)
        if index:
            name = self._entry(index)[0]
        else:
            name, at = self._string(block, at)
        value, at = self._string(block, at)
        return (name, value), at

    def _string(self, block: bytes, at: int) -> tuple[bytes, int]:
        coded = block[at] & 0x80
        size, at = self._integer(block, at, 7)
        end = at + size
        if end > len(block):
            raise HpackError("a string ends behind its block")
        data = block[at:end]
        return (self._strings[data] if coded else data), end

    @staticmethod
    def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
        most = (1 << bits) - 1
        value = block[at] & most
        at += 1
        if value < most:
            return value, at
        shift = 0
        while True:
            byte = block[at]
            at += 1
            value += (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value, at
            if shift > 28:
                raise HpackError("an integer is too large")

    def _entry(self, index: int) -> Field:
        if 0 < index < len(STATIC):
            return STATIC[index]
        self._looked_up = True
        try:
            return self._entries[index - len(STATIC)] if index else self._entries[1 << 30]
        except IndexError:
            raise HpackError(f"no entry {index} in the table") from None

    def _add(self, field: Field) -> None:
        if self._blocks:
            self._blocks.clear()
        size = len(field[0]) + len(field[1]) + _OVERHEAD
        self._evict(self._room - size)
        if size <= self._room:
            self._entries.appendleft(field)
            self._size += size

    def _resize(self, room: int) -> None:
        if room > TABLE_BYTES:
            raise HpackError("the table is made larger than allowed")
        self._looked_up = True  # such a block is not to be remembered
        self._added = [(b"", b"")]
        if room != self._room:
            self._blocks.clear()
            self._room = room
            self._evict(room)

    def _evict(self, keep: int) -> None:
        while self._entries and self._size > keep:
            name, value = self._entries.pop()
            self._size -= len(name) + len(value) + _OVERHEAD


def encode(fields: Iterable[Field]) -> bytes:
    """A block that refers to no dynamic table. Names must be in lower case."""
    pieces = []
    for field in fields:
        known = _INDEX.get(field)
        pieces.append(known if known is not None else _without_indexing(*field))
    return b"".join(pieces)


def _without_indexing(name: bytes, value: bytes) -> bytes:
    """Secrets are marked so that nobody further on puts them into a table either."""
    kind = 0x10 if name in _NEVER_INDEXED else 0
    index = _NAMES.get(name)
    size = len(value)
    length = bytes([size]) if size < 127 else _integer(size, 7, 0)
    if index is None:
        return bytes([kind]) + _integer(len(name), 7, 0) + name + length + value
    return _integer(index, 4, kind) + length + value


def _integer(value: int, bits: int, first: int) -> bytes:
    most = (1 << bits) - 1
    if value < most:
        return bytes([first | value])
    data = bytearray([first | most])
    value -= most
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)
