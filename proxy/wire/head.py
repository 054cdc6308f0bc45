"""Heads of HTTP/1 messages: read strictly, kept byte for byte, rewritten for the next hop.

We find where a head ends and what its first line says; llhttp (httptools) judges the header block
in between, so everything a request smuggler likes (obs-fold, bare CR or LF, blanks before a colon,
two lengths, a length beside a transfer coding) ends in `Malformed`. What llhttp accepted is safe
to search for lines. Header lines that nobody has to understand are never taken apart: they leave
with the spelling, order and spacing they came with.

Refuses to know sockets, bodies and which requests are probes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from weir.proxy import contract
from weir.proxy.policy.forwarded import appended, forwarded

HEAD_END: Final = b"\r\n\r\n"

_REQUEST_LINE = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])"
)
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_OTHER_VERSION = re.compile(rb"[A-Z]+ [\x21-\x7e]+ HTTP/(?!1\.[01])[0-9](?:\.[0-9])?")
_ABSOLUTE = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*://(?:[^/?#@]*@)?([^/?#]*)([^#]*)")
_HOST = re.compile(rb"[A-Za-z0-9!$%&'()*+,\-.:;=\[\]_~]*")

_REMEMBERED_BYTES = 1024
_REMEMBERED_HEADS = 64
_REMEMBERED_CLIENTS = 256
_REMEMBERED_LINE_BYTES = 128
_REMEMBERED_LINES = 256
_HOP = contract.HOP_BY_HOP
_REQUEST_NAMES = _HOP | {
    b"host",
    b"content-length",
    b"expect",
    b"user-agent",
    b"forwarded",
    b"x-forwarded-for",
    b"x-forwarded-proto",
    b"x-forwarded-host",
    b"http2-settings",
    contract.NETWORK_PROBE,
    contract.NETWORK_HASH,
    contract.KUBELET_PROBE,
    contract.PROXY_REQUEST,
    contract.ORIGINAL_HOST,
    contract.ROUTE_TAG,
    contract.DEFAULT_ROUTE,
    *contract.PRUNED,
}
_RESPONSE_NAMES = _HOP | {b"content-length", b"date"}
_NAMES = {
    spelled: name for name in _REQUEST_NAMES | _RESPONSE_NAMES for spelled in (name, name.title())
}
"""Names in lower case, by how they are mostly spelled."""
_NOT_FOR_USER = (
    _HOP | contract.PRUNED | {contract.ORIGINAL_HOST, b"http2-settings", b"x-forwarded-for"}
)
_ADDED_TO = frozenset({b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"})
_DROPPED = _NOT_FOR_USER - _ADDED_TO
_ONCE = frozenset({b"host", b"content-length"})
_LISTS = _HOP | {b"x-forwarded-for"}
_PLAIN_TOKENS = frozenset({b"close", b"keep-alive", b"upgrade", b""})
_NO_TOKENS: frozenset[bytes] = frozenset()
_KEEP_ALIVE = frozenset({b"keep-alive"})


def _any_of(names: Iterable[bytes]) -> bytes:
    """A pattern for any of the names, branching on the first letter so that it fails fast."""
    initials: dict[bytes, list[bytes]] = {}
    for name in sorted(names):
        initials.setdefault(name[:1], []).append(re.escape(name[1:]))
    groups = (initial + b"(?:" + b"|".join(rest) + b")" for initial, rest in initials.items())
    return b"(?i:" + b"|".join(groups) + b")"


def _fields_of(names: Iterable[bytes]) -> re.Pattern[bytes]:
    return re.compile(rb"\r\n(" + _any_of(names) + rb"):[ \t]*([^\r]*)")


def _lines_of(names: Iterable[bytes]) -> re.Pattern[bytes]:
    return re.compile(rb"\r\n" + _any_of(names) + rb":[^\r]*")


_REQUEST_FIELDS = _fields_of(_REQUEST_NAMES)
_RESPONSE_FIELDS = _fields_of(_RESPONSE_NAMES)
_LINES_NOT_FOR_USER = _lines_of(_NOT_FOR_USER)
_LINES_NOT_FOR_CLIENT = _lines_of(_HOP)
_HOST_LINE = _lines_of([b"host"])


class Malformed(ValueError):
    """The peer broke HTTP. `status` and `reason` are what a client of ours is told."""

    def __init__(self, why: str, status: int = 400, reason: bytes = b"Bad Request") -> None:
        super().__init__(why)
        self.status = status
        self.reason = reason


class _Silent:
    """llhttp's callbacks, all absent: it only judges."""

    on_url: None = None
    on_status: None = None
    on_header: None = None
    on_body: None = None
    on_message_begin: None = None
    on_headers_complete: None = None
    on_message_complete: None = None
    on_chunk_header: None = None
    on_chunk_complete: None = None


_SILENT = _Silent()


def check_start(data: bytes | bytearray) -> None:
    """Raise Malformed if what came so far can't become a request: garbage need not wait."""
    end = data.find(b"\n")
    if end >= 0:
        line = data[:end]
        if line == b"\r":
            return
        if not line.endswith(b"\r") or not _REQUEST_LINE.fullmatch(line, 0, end - 1):
            raise _no_request(line, len(line) - line.endswith(b"\r"))
    elif data and not (65 <= data[0] <= 122 or data[0] in b"\r!#$%&'*+-.|~0123456789"):
        raise Malformed("no method")


def _no_request(data: bytes | bytearray, end: int) -> Malformed:
    """What is wrong with a first line up to `end` that is no request line."""
    if _OTHER_VERSION.fullmatch(data, 0, end):
        return Malformed("not HTTP/1", 505, b"HTTP Version Not Supported")
    return Malformed("request line")


def check_fields(block: bytes) -> None:
    """Raise Malformed unless the block (lines ending CRLF, then an empty one) is strictly valid."""
    try:
        HttpRequestParser(_SILENT).feed_data(b"PUT / HTTP/1.1\r\n" + block)
    except HttpParserUpgrade:
        pass  # only says that the head asks for an upgrade
    except HttpParserError as error:
        raise Malformed(str(error)) from None


def _understood(fields: re.Pattern[bytes], data: bytes, end: int) -> dict[bytes, bytes]:
    """Check the header block behind `end` (of the first line); the fields that mean something."""
    check_fields(data[end + 2 :])
    seen: dict[bytes, bytes] = {}
    found: list[tuple[bytes, bytes]] = fields.findall(data, end)
    for name, value in found:
        name = _NAMES.get(name) or name.lower()
        if name not in seen:
            seen[name] = value.rstrip()
        elif name in _LISTS:
            seen[name] += b", " + value.rstrip()
        elif name in _ONCE:
            raise Malformed(f"more than one {name.decode()}")
    return seen


def _tokens(connection: bytes) -> frozenset[bytes]:
    connection = connection.lower()
    if connection == b"keep-alive":
        return _KEEP_ALIVE
    return frozenset([token.strip() for token in connection.split(b",")])


def _without(data: bytes, tokens: frozenset[bytes]) -> bytes:
    """The head without the fields that Connection names, but never without its framing."""
    named = tokens - _PLAIN_TOKENS - _ONCE
    first, *lines = data[:-4].split(b"\r\n")
    kept = (line for line in lines if line.partition(b":")[0].lower() not in named)
    return b"\r\n".join([first, *kept, b"", b""])


def _transfer_coding(seen: dict[bytes, bytes], minor: int) -> bool:
    coding = seen.get(b"transfer-encoding")
    if coding is None:
        return False
    if coding.lower() != b"chunked":
        raise Malformed(
            f"transfer coding {coding.decode('latin-1')} is not chunked", 501, b"Not Implemented"
        )
    if not minor:
        raise Malformed("transfer coding in an HTTP/1.0 message")
    return True


class _Forwarded(dict[tuple[bytes | None, bytes | None, bytes | None, bool, bytes], bytes]):
    """Lines that the user container gets from us, by what an ingress said of its client.

    The values of X-Forwarded-For, -Host and -Proto, whether there is a Forwarded, and the peer: the
    same clients come again, and so do these. Each line ends in CRLF.
    """

    def __missing__(
        self, key: tuple[bytes | None, bytes | None, bytes | None, bool, bytes]
    ) -> bytes:
        for_, host, proto, there, peer = key
        made = b"X-Forwarded-For: %b\r\n" % (appended([for_], peer) if for_ else peer)
        if not there and (for_ or host or proto):
            value = forwarded(for_ or b"", host or b"", proto or b"")
            made = b"Forwarded: %b\r\n%b" % (value, made)
        if len(made) <= _REMEMBERED_BYTES:
            if len(self) >= _REMEMBERED_CLIENTS:
                self.clear()
            self[key] = made
        return made


_FORWARDED = _Forwarded()


class _RequestLines(dict[bytes, tuple[bytes, bytes, int]]):
    """Method, target and minor version of a request line: most services have few of them."""

    def __missing__(self, line: bytes) -> tuple[bytes, bytes, int]:
        match = _REQUEST_LINE.fullmatch(line)
        if match is None:
            raise _no_request(line, len(line))
        parsed = match[1], match[2], 1 if match[3] == b"1" else 0
        if len(line) <= _REMEMBERED_LINE_BYTES:
            if len(self) >= _REMEMBERED_LINES:
                self.clear()
            self[line] = parsed
        return parsed


_REQUEST_LINES = _RequestLines()
_HOSTS = dict[bytes, None]()


def _check_host(host: bytes) -> None:
    if not _HOST.fullmatch(host):
        raise Malformed("malformed Host header")
    if len(host) <= _REMEMBERED_LINE_BYTES:
        if len(_HOSTS) >= _REMEMBERED_LINES:
            _HOSTS.clear()
        _HOSTS[host] = None


class RequestHead:
    """A request as it came in. `length` is 0 without a body, None when the body is chunked."""

    __slots__ = (
        "_data",
        "_tokens",
        "close",
        "length",
        "method",
        "minor",
        "seen",
        "target",
        "upgrade",
    )

    def __init__(self, data: bytes) -> None:
        """Raises Malformed. `data` is one whole head with the empty line that ends it."""
        end = data.find(b"\r\n")
        self.method, self.target, self.minor = _REQUEST_LINES[data[:end]]
        self._data = data
        self.seen = seen = _understood(_REQUEST_FIELDS, data, end)
        chunked = _transfer_coding(seen, self.minor)
        length = seen.get(b"content-length")
        self.length: int | None = None if chunked else int(length) if length else 0
        connection = seen.get(b"connection")
        self._tokens = tokens = _NO_TOKENS if connection is None else _tokens(connection)
        self.close = b"close" in tokens if self.minor else b"keep-alive" not in tokens
        self.upgrade: bytes | None = None
        if tokens and b"upgrade" in tokens and self.minor:
            protocol = seen.get(b"upgrade")
            if protocol and protocol.lower() != b"h2c":  # see `http2_settings`
                self.upgrade = protocol
        self._check_target()

    @property
    def http2_settings(self) -> bytes | None:
        """Of a request that wants to go on in HTTP/2 (RFC 7540, 3.2), which we may ignore."""
        wanted = self.seen.get(b"upgrade", b"").lower().replace(b" ", b"").split(b",")
        if b"h2c" in wanted and b"http2-settings" in self._tokens and self.minor:
            return self.seen.get(b"http2-settings")
        return None

    def keep_upgrade(self) -> None:
        """`for_user` passes `Upgrade: h2c` on: as far as the user container sees, it is refused."""
        if b"upgrade" in self._tokens:
            self.upgrade = self.seen.get(b"upgrade")

    @property
    def version(self) -> bytes:
        return b"HTTP/1.1" if self.minor else b"HTTP/1.0"

    def fields(self) -> list[tuple[bytes, bytes]]:
        """All header fields as they came, in that order."""
        lines = self._data[:-4].split(b"\r\n")[1:]
        return [
            (name, value.strip()) for name, _, value in (line.partition(b":") for line in lines)
        ]

    def replace(self, fields: dict[bytes, bytes]) -> None:
        """Set fields for the user container, in place of those of the same (lower-case) names.

        An empty value removes the field. Not for names that HTTP itself needs, nor for those
        that `for_user` sets. To be called before it.
        """
        first, *lines = self._data[:-4].split(b"\r\n")
        kept = [line for line in lines if line.partition(b":")[0].lower() not in fields]
        kept += [b"%s: %s" % (name.title(), value) for name, value in fields.items() if value]
        self._data = b"\r\n".join([first, *kept, b"", b""])

    def _check_target(self) -> None:
        """Target and Host as RFC 9112 wants them; an absolute target's authority is the Host."""
        target = self.target
        host = self.seen.get(b"host")
        if host is not None:
            if host not in _HOSTS:
                _check_host(host)
        elif self.minor:
            raise Malformed("no Host", 400, b"Bad Request: missing required Host header")
        if target.startswith(b"/") or (target == b"*" and self.method == b"OPTIONS"):
            return
        if self.method == b"CONNECT":
            self._set_host(target)
            return
        match = _ABSOLUTE.fullmatch(target)
        if match is None:
            raise Malformed("request target")
        authority, path = match.groups()
        self.target = path if path.startswith(b"/") else b"/" + path
        self._set_first_line()
        self._set_host(authority)

    def _set_first_line(self) -> None:
        fields = self._data[self._data.find(b"\r\n") :]
        self._data = b"%s %s HTTP/1.1%s" % (self.method, self.target, fields)

    def _set_host(self, host: bytes) -> None:
        """Put another value into the Host line, where it stands; first, when there was none."""
        line = b"\r\nHost: " + host
        if b"host" in self.seen:
            self._data = _HOST_LINE.sub(lambda _: line, self._data, 1)
        else:
            end = self._data.find(b"\r\n")
            self._data = self._data[:end] + line + self._data[end:]
        self.seen[b"host"] = host

    def _with_forwarded(self, peer: bytes) -> bytes:
        """As an ingress sends it: nothing changes but X-Forwarded-For, and Forwarded if missing."""
        seen = self.seen
        for_ = seen.get(b"x-forwarded-for")
        host, proto = seen.get(b"x-forwarded-host"), seen.get(b"x-forwarded-proto")
        added = _FORWARDED[(for_, host, proto, b"forwarded" in seen, peer)]
        data = self._data
        if for_ is None:
            return b"".join((data[:-2], added, b"\r\n"))
        at = data.find(b"\r\nx-forwarded-for:")  # most often it is spelled like this, or so
        if at < 0:
            at = data.find(b"\r\nX-Forwarded-For:")
        end = data.find(b"\r\n", at + 18)
        if at < 0 or data[at + 18 : end].strip() != for_:  # there are several
            return b"".join((_LINES_NOT_FOR_USER.sub(b"", data)[:-2], added, b"\r\n"))
        return b"".join((data[:at], data[end:-2], added, b"\r\n"))

    def for_user(self, peer: bytes, authority: bytes) -> bytes:
        """The head for the user container (contract section 3.3). To be asked once.

        `peer` is the client's address, `authority` the Host for a request that names none.
        """
        seen = self.seen
        if self.minor and _DROPPED.isdisjoint(seen) and seen.get(b"host"):
            if _ADDED_TO.isdisjoint(seen):
                return self._data[:-2] + b"X-Forwarded-For: " + peer + HEAD_END
            if seen.get(b"forwarded") != b"":
                return self._with_forwarded(peer)
        if not self.minor:
            self._set_first_line()
        original = seen.get(contract.ORIGINAL_HOST)
        if original:
            self._set_host(original)
        elif not seen.get(b"host"):
            self._set_host(authority)
        for_ = seen.get(b"x-forwarded-for")
        host, proto = seen.get(b"x-forwarded-host"), seen.get(b"x-forwarded-proto")
        there = bool(seen.get(b"forwarded"))
        if not there and b"forwarded" in seen and (for_ or host or proto):
            self.replace({b"forwarded": b""})  # an empty one is none
        added = [_FORWARDED[(for_, host, proto, there, peer)][:-2]]
        if b"te" in seen and b"trailers" in seen[b"te"].lower():
            added.append(b"Te: trailers")
        if self.length is None:
            added.append(b"Transfer-Encoding: chunked")
            if b"trailer" in seen:
                added.append(b"Trailer: " + seen[b"trailer"])
        if self.upgrade:
            added.append(b"Connection: Upgrade")
            added.append(b"Upgrade: " + self.upgrade)
        data = self._data
        if not _NOT_FOR_USER.isdisjoint(seen):
            data = _LINES_NOT_FOR_USER.sub(b"", data)
            if not self._tokens <= _PLAIN_TOKENS:
                data = _without(data, self._tokens)
        return data[:-2] + b"\r\n".join(added) + HEAD_END


class ResponseHead:
    """A response as the user container or a sink gave it.

    `length` is the body's length, None when it is chunked, -1 when the end of the connection ends
    it; the request's method decides, because HEAD has none.
    """

    __slots__ = (
        "_data",
        "_headers",
        "_rendered",
        "_rendered_for",
        "_tokens",
        "close",
        "length",
        "seen",
        "status",
        "upgrade",
    )

    def __init__(self, data: bytes, method: bytes) -> None:
        """Raises Malformed. `data` is one whole head with the empty line that ends it."""
        end = data.find(b"\r\n")
        self.status, minor = _STATUS_LINES[data[:end]]
        self._data = data
        self._headers: tuple[tuple[bytes, bytes], ...] | None = None
        self._rendered = b""
        self._rendered_for: tuple[int, bool, bool, bytes] | None = None
        self.seen = seen = _understood(_RESPONSE_FIELDS, data, end)
        connection = seen.get(b"connection")
        self._tokens = tokens = _NO_TOKENS if connection is None else _tokens(connection)
        self.close = b"close" in tokens if minor else b"keep-alive" not in tokens
        self.upgrade: bytes | None = seen.get(b"upgrade") if b"upgrade" in tokens else None
        self.length: int | None
        status = self.status
        if method == b"HEAD" or status < 200 or status == 204 or status == 304:
            self.length = 0
        elif _transfer_coding(seen, minor):
            self.length = None
        else:
            length = seen.get(b"content-length")
            self.length = int(length) if length else -1

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """All header fields, names in lower case, in the order they came."""
        if self._headers is None:
            pairs = []
            for line in self._data[:-4].split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                pairs.append((name.lower(), value.strip()))
            self._headers = tuple(pairs)
        return self._headers

    def for_client(self, minor: int, keep: bool, chunked: bool, date: bytes) -> bytes:
        """The head for a client of HTTP/1.`minor`, whose connection stays open or not.

        `date` is the line to use when the response brings none.
        """
        key = (minor, keep, chunked, date)
        if self._rendered_for != key:
            self._rendered = self._render(minor, keep, chunked, date)
            self._rendered_for = key
        return self._rendered

    def _render(self, minor: int, keep: bool, chunked: bool, date: bytes) -> bytes:
        added = [] if b"date" in self.seen else [date]
        if chunked:
            added.append(b"Transfer-Encoding: chunked")
            if b"trailer" in self.seen:
                added.append(b"Trailer: " + self.seen[b"trailer"])
        if not keep:
            if minor:
                added.append(b"Connection: close")
        elif not minor:
            added.append(b"Connection: keep-alive")
        return self._end_to_end(minor, added)

    def for_interim(self) -> bytes:
        """The head of a 1xx that is passed on."""
        return self._end_to_end(1, [])

    def for_switching(self) -> bytes:
        """The head of a 101, with the fields that make it one."""
        return self._end_to_end(1, [b"Connection: Upgrade", b"Upgrade: " + (self.upgrade or b"")])

    def _end_to_end(self, minor: int, added: list[bytes]) -> bytes:
        data = self._data
        if not minor:
            data = b"HTTP/1.0" + data[8:]
        elif data.startswith(b"HTTP/1.0"):
            data = b"HTTP/1.1" + data[8:]
        if not _HOP.isdisjoint(self.seen):
            data = _LINES_NOT_FOR_CLIENT.sub(b"", data)
            if not self._tokens <= _PLAIN_TOKENS:
                data = _without(data, self._tokens)
        if not added:
            return data
        return data[:-2] + b"\r\n".join(added) + HEAD_END


class ResponseHeads(dict[bytes, ResponseHead]):
    """The heads of one server, by their bytes.

    A server that answers many times within a second mostly sends the same head: Date has seconds.
    Not for responses to HEAD, whose body depends on more than the bytes.
    """

    def __missing__(self, data: bytes) -> ResponseHead:
        head = ResponseHead(data, b"")
        if len(data) <= _REMEMBERED_BYTES:
            if len(self) >= _REMEMBERED_HEADS:
                self.clear()
            self[data] = head
        return head


class _StatusLines(dict[bytes, tuple[int, int]]):
    """Status and minor version of a status line; a server has few of them, so they are kept."""

    def __missing__(self, line: bytes) -> tuple[int, int]:
        match = _STATUS_LINE.fullmatch(line)
        if match is None:
            raise Malformed("status line")
        parsed = int(match[2]), 1 if match[1] == b"1" else 0
        if len(self) < 256 and len(line) < 128:
            self[line] = parsed
        return parsed


_STATUS_LINES = _StatusLines()
