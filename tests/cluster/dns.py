"""The cluster's DNS: IPv4 addresses of Services, from a table, over UDP.

Owns the wire format of an answer (RFC 1035). Pods may ask for nothing but cluster names: every
other name does not exist.
"""

import asyncio
import struct
from typing import cast

_A, _ANY = 1, 255
_RESPONSE, _RECURSES, _NO_SUCH_NAME = 0x8400, 0x0180, 3
_TTL = 1
"""Seconds. A Service deleted and made again gets another address."""


class Server(asyncio.DatagramProtocol):
    """Answers from `addresses`, which its owner keeps up to date: lower-case name → dotted IPv4."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, peer: tuple[str | int, int]) -> None:
        try:
            answer = reply(data, self.addresses)
        except (struct.error, IndexError, UnicodeDecodeError):
            return  # not a question
        assert self._transport is not None
        self._transport.sendto(answer, peer)


def reply(query: bytes, addresses: dict[str, str]) -> bytes:
    """The answer to a query of one question."""
    number, flags = struct.unpack_from("!HH", query)
    labels, at = [], 12
    while size := query[at]:
        labels.append(query[at + 1 : at + 1 + size].decode("ascii").lower())
        at += 1 + size
    (kind,) = struct.unpack_from("!H", query, at + 1)
    question = query[12 : at + 5]
    address = addresses.get(".".join(labels))
    records = b""
    if address is not None and kind in (_A, _ANY):
        numbers = bytes(int(part) for part in address.split("."))
        # 0xC00C: the name in the question
        records = struct.pack("!HHHIH", 0xC00C, _A, 1, _TTL, len(numbers)) + numbers
    code = _NO_SUCH_NAME if address is None else 0
    flags = _RESPONSE | (flags & _RECURSES) | _RECURSES & 0x80 | code
    return struct.pack("!6H", number, flags, 1, bool(records), 0, 0) + question + records
