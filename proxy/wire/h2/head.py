"""What a header block says: requests and responses of HTTP/2, judged and rewritten.

Owns which fields are allowed (RFC 9113, section 8), and what the other side gets to see of them
(contract sections 3.3 and 3.5). Blocks repeat, so what can be made of one is made once.
"""

from __future__ import annotations

import re

from weir.proxy import contract
from weir.proxy.policy.forwarded import appended, forwarded
from weir.proxy.wire.h2.hpack import Block, Field, encode
from weir.proxy.wire.head import RequestHead

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
"""Blanks around a value are let through as they came, as Go's HTTP/2 does."""
_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_PATH = re.compile(rb"/[\x21-\x7e\x80-\xff]*|\*")
_AUTHORITY = re.compile(rb"[A-Za-z0-9!$%&'()*+,\-.:;=\[\]_~]*")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_STATUS = re.compile(rb"[1-9][0-9]{2}")
_OF_CONNECTION = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
_OF_HTTP1 = contract.HOP_BY_HOP | {b"host", b"http2-settings", b"content-length"}
_REQUEST_PSEUDO = frozenset({b":method", b":scheme", b":path", b":authority"})
_NOT_FOR_USER = (
    (contract.HOP_BY_HOP - {b"te", b"trailer"})
    | contract.PRUNED
    | {
        b"host",
        contract.ORIGINAL_HOST,
        b"x-forwarded-for",
    }
)


class MalformedBlock(Exception):
    """The fields are no request, response or trailers. `str()` says why."""


def _checked(fields: tuple[Field, ...], allowed: frozenset[bytes]) -> dict[bytes, bytes]:
    """The pseudo-header fields. Raises MalformedBlock."""
    pseudo: dict[bytes, bytes] = {}
    regular = False
    for name, value in fields:
        if name.startswith(b":"):
            if regular or name in pseudo or name not in allowed:
                raise MalformedBlock(f"the pseudo-header field {name.decode('latin-1')}")
            pseudo[name] = value
        else:
            regular = True
            if not _NAME.fullmatch(name):
                raise MalformedBlock("the name of a field")
            if name in _OF_CONNECTION or (name == b"te" and value.lower() != b"trailers"):
                raise MalformedBlock(f"the field {name.decode()} of HTTP/1")
        if not _VALUE.fullmatch(value):
            raise MalformedBlock(f"the value of {name.decode('latin-1')}")
    return pseudo


def _length(fields: list[Field]) -> int | None:
    values = {value for name, value in fields if name == b"content-length"}
    if not values:
        return None
    value = values.pop()
    if values or not _LENGTH.fullmatch(value):
        raise MalformedBlock("content-length")
    return int(value)


def trailers(block: Block) -> bytes:
    """A block of trailers, for the other side. Raises MalformedBlock."""
    _checked(block.fields, frozenset())
    return encode(block.fields)


def of_http1(head: RequestHead) -> Block:
    """A whole HTTP/1.1 request, as a block that says the same."""
    fields = [
        (b":method", head.method),
        (b":scheme", b"http"),
        (b":path", head.target),
        (b":authority", head.seen.get(b"host", b"")),
    ]
    for name, value in head.fields():
        lower = name.lower()
        if lower not in _OF_HTTP1 or (lower == b"content-length" and head.length):
            fields.append((lower, value))
    return Block(tuple(fields))


class RequestFields:
    """What does not change from one request with the same block to the next, of one client."""

    __slots__ = ("authority", "fields", "for_user", "length", "method", "scheme", "seen", "target")

    def __init__(self, block: Block) -> None:
        """Raises MalformedBlock."""
        pseudo = _checked(block.fields, _REQUEST_PSEUDO)
        self.method = pseudo.get(b":method", b"")
        self.target = pseudo.get(b":path", b"")
        self.scheme = pseudo.get(b":scheme", b"")
        if not _METHOD.fullmatch(self.method):
            raise MalformedBlock(":method")
        if self.method == b"CONNECT":
            raise MalformedBlock("CONNECT is not served")
        if self.scheme not in (b"http", b"https") or not _PATH.fullmatch(self.target):
            raise MalformedBlock(":scheme or :path")
        if self.target == b"*" and self.method != b"OPTIONS":
            raise MalformedBlock(":path")
        self.fields = [field for field in block.fields if not field[0].startswith(b":")]
        self.length = _length(self.fields)
        self.seen: dict[bytes, bytes] = {}
        for name, value in self.fields:
            if name == b"x-forwarded-for" and name in self.seen:
                self.seen[name] += b", " + value
            else:
                self.seen.setdefault(name, value)
        self.authority = pseudo.get(b":authority") or self.seen.get(b"host", b"")
        if not _AUTHORITY.fullmatch(self.authority):
            raise MalformedBlock(":authority")
        self.seen[b"host"] = self.authority
        self.for_user: bytes | None = None


class StreamHead:
    """A request as it came in on a stream. `length` is None when no content-length was given."""

    __slots__ = ("_common", "_fields", "length", "method", "minor", "seen", "target")

    version = b"HTTP/2.0"

    def __init__(self, block: Block) -> None:
        """Raises MalformedBlock."""
        common = block.made
        if common is None:
            common = block.made = RequestFields(block)
        self._common: RequestFields = common
        self._fields: list[Field] | None = None
        self.seen = common.seen
        self.method = common.method
        self.target = common.target
        self.length: int | None = common.length
        self.minor = 1

    def fields(self) -> list[Field]:
        """All header fields as they came, in that order."""
        return self._common.fields if self._fields is None else self._fields

    def replace(self, fields: dict[bytes, bytes]) -> None:
        """Set fields for the user container, in place of those of the same (lower-case) names.

        An empty value removes the field. To be called before `for_user`.
        """
        kept = [field for field in self.fields() if field[0] not in fields]
        self._fields = kept + [(name, value) for name, value in fields.items() if value]

    def for_user(self, peer: bytes, authority: bytes) -> bytes:
        """The block for the user container (contract section 3.3).

        `peer` is the client's address, the same for all requests of a connection; `authority`
        stands in for a request that names none.
        """
        common = self._common
        if self._fields is not None:
            return self._rewritten(peer, authority)
        if common.for_user is None:
            common.for_user = self._rewritten(peer, authority)
        return common.for_user

    def _rewritten(self, peer: bytes, authority: bytes) -> bytes:
        common, seen = self._common, self.seen
        host = seen.get(contract.ORIGINAL_HOST) or common.authority or authority
        rewritten = [
            (b":method", common.method),
            (b":scheme", b"http"),  # TLS ends here
            (b":path", common.target),
            (b":authority", host),
        ]
        rewritten += [field for field in self.fields() if field[0] not in _NOT_FOR_USER]
        for_ = seen.get(b"x-forwarded-for")
        if not seen.get(b"forwarded"):
            rewritten = [field for field in rewritten if field[0] != b"forwarded"]
            value = forwarded(
                for_ or b"",
                seen.get(b"x-forwarded-host", b""),
                seen.get(b"x-forwarded-proto", b""),
            )
            if value:
                rewritten.append((b"forwarded", value))
        rewritten.append((b"x-forwarded-for", appended([for_], peer) if for_ else peer))
        return encode(rewritten)


class ResponseFields:
    """A response's head. `length` is None when it brings none; `block` is for the client."""

    __slots__ = ("block", "dated", "length", "status")

    def __init__(self, block: Block) -> None:
        """Raises MalformedBlock."""
        # a server that leaves fields of HTTP/1 in is forgiven: they stop here
        own = tuple(field for field in block.fields if field[0] not in _OF_CONNECTION)
        pseudo = _checked(own, frozenset({b":status"}))
        status = pseudo.get(b":status", b"")
        if not _STATUS.fullmatch(status) or status == b"101":
            raise MalformedBlock(":status")
        self.status = int(status)
        self.length = _length([field for field in own if not field[0].startswith(b":")])
        self.dated = any(name == b"date" for name, _ in own)
        self.block = encode(field for field in own if field[0] not in contract.HOP_BY_HOP)

    @classmethod
    def of(cls, block: Block) -> ResponseFields:
        if block.made is None:
            block.made = cls(block)
        made: ResponseFields = block.made
        return made
