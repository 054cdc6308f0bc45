"""Heads of HTTP/1 messages: read strictly, kept byte for byte, rewritten for the next hop.

We find where a head ends and what its first line says; llhttp (httptools) judges the header block
in between, so everything a request smuggler likes (obs-fold, bare CR or LF, blanks before a colon,
two lengths, a length beside a transfer coding) ends in `Malformed`. What llhttp accepted is safe
to split at CRLF. Header lines that nobody has to understand are never taken apart: they leave with
the spelling, order and spacing they came with.

Refuses to know sockets, bodies and which requests are probes.
"""

from __future__ import annotations

import re
from typing import Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from weir.proxy import contract
from weir.proxy.policy.forwarded import appended, forwarded

HEAD_END: Final = b"\r\n\r\n"

_REQUEST_LINE = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])"
)
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_OTHER_VERSION = re.compile(rb"[^ ]+ [^ ]+ HTTP/[0-9]+(?:\.[0-9]+)?")
_ABSOLUTE = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*://(?:[^/?#@]*@)?([^/?#]*)([^#]*)")
_HOST = re.compile(rb"[A-Za-z0-9!$%&'()*+,\-.:;=\[\]_~]*")

# what happens to a header line that we do understand
_KEEP = 1  # it goes on as it came
_LIST = 2  # repeated lines are one list
_ONCE = 4  # a second line makes the message malformed

_HOP = {name: _LIST for name in contract.HOP_BY_HOP}
_REQUEST_FIELDS = {
    **_HOP,
    b"host": _KEEP | _ONCE,
    b"content-length": _KEEP | _ONCE,
    b"expect": _KEEP,
    b"user-agent": _KEEP,
    b"forwarded": _KEEP,
    b"x-forwarded-for": _LIST,
    b"x-forwarded-proto": _KEEP,
    b"x-forwarded-host": _KEEP,
    contract.NETWORK_PROBE: _KEEP,
    contract.NETWORK_HASH: _KEEP,
    contract.KUBELET_PROBE: _KEEP,
    contract.PROXY_REQUEST: _KEEP,
    contract.ORIGINAL_HOST: 0,
    b"http2-settings": 0,
    **dict.fromkeys(contract.PRUNED, 0),
}
_RESPONSE_FIELDS = {
    **_HOP,
    b"content-length": _KEEP | _ONCE,
    b"date": _KEEP,
}
_FRAMING = frozenset({b"host", b"content-length"})


class Malformed(ValueError):
    """The peer broke HTTP. `status` and `reason` are what a client of ours is told."""

    def __init__(self, why: str, status: int = 400, reason: bytes = b"Bad Request") -> None:
        super().__init__(why)
        self.status = status
        self.reason = reason


class _Silent:
    """llhttp's callbacks, all absent: it only judges."""

    on_url = on_status = on_header = on_body = None
    on_message_begin = on_headers_complete = on_message_complete = None
    on_chunk_header = on_chunk_complete = None


_SILENT = _Silent()


def check_start(data: bytes | bytearray) -> None:
    """Raise Malformed if what came so far can't become a request: garbage need not wait."""
    end = data.find(b"\n")
    if end >= 0:
        line = data[:end]
        if line == b"\r":
            return
        if not line.endswith(b"\r") or not _REQUEST_LINE.fullmatch(line, 0, end - 1):
            raise Malformed("request line")
    elif data and not (65 <= data[0] <= 122 or data[0] in b"\r!#$%&'*+-.|~0123456789"):
        raise Malformed("no method")


def check_fields(block: bytes) -> None:
    """Raise Malformed unless the block (lines ending CRLF, then an empty one) is strictly valid."""
    try:
        HttpRequestParser(_SILENT).feed_data(b"PUT / HTTP/1.1\r\n" + block)
    except HttpParserUpgrade:
        pass  # only says that the head asks for an upgrade
    except HttpParserError as error:
        raise Malformed(str(error)) from None


def _read(
    block: bytes, lines: list[bytes], understood: dict[bytes, int]
) -> tuple[dict[bytes, bytes], frozenset[bytes]]:
    """Append the lines that stay to `lines`; return what was understood and Connection's tokens."""
    check_fields(block)
    seen: dict[bytes, bytes] = {}
    if len(block) > 2:
        for line in block[:-4].split(b"\r\n"):
            name, _, value = line.partition(b":")
            name = name.lower()
            kind = understood.get(name)
            if kind is None:
                lines.append(line)
                continue
            if name not in seen:
                seen[name] = value.strip()
            elif kind & _LIST:
                seen[name] += b", " + value.strip()
            elif kind & _ONCE:
                raise Malformed(f"more than one {name.decode()}")
            if kind & _KEEP:
                lines.append(line)
    connection = seen.get(b"connection")
    if connection is None:
        return seen, _NO_TOKENS
    tokens = frozenset([token.strip() for token in connection.lower().split(b",")])
    if tokens - _PLAIN_TOKENS:
        first, *fields = lines
        lines[:] = [first, *(line for line in fields if not _named(line, tokens))]
    return seen, tokens


_NO_TOKENS: frozenset[bytes] = frozenset()
_PLAIN_TOKENS = frozenset({b"close", b"keep-alive", b"upgrade", b""})


def _named(line: bytes, tokens: frozenset[bytes]) -> bool:
    name = line.partition(b":")[0].lower()
    return name in tokens and name not in _FRAMING


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


class RequestHead:
    """A request as it came in. `length` is 0 without a body, None when the body is chunked."""

    __slots__ = (
        "_host_at",
        "close",
        "length",
        "lines",
        "method",
        "minor",
        "seen",
        "target",
        "upgrade",
    )

    def __init__(self, data: bytes) -> None:
        """Raises Malformed. `data` is one whole head with the empty line that ends it."""
        end = data.find(b"\r\n")
        line = data[:end]
        match = _REQUEST_LINE.fullmatch(line)
        if match is None:
            if _OTHER_VERSION.fullmatch(line):
                raise Malformed("not HTTP/1", 505, b"HTTP Version Not Supported")
            raise Malformed("request line")
        self.method, self.target, minor = match.groups()
        self.minor = 1 if minor == b"1" else 0
        self.lines = [line]
        seen, tokens = _read(data[end + 2 :], self.lines, _REQUEST_FIELDS)
        self.seen = seen
        length = seen.get(b"content-length")
        chunked = _transfer_coding(seen, self.minor)
        self.length: int | None = None if chunked else int(length) if length else 0
        self.close = b"close" in tokens if self.minor else b"keep-alive" not in tokens
        self.upgrade: bytes | None = None
        if b"upgrade" in tokens and self.minor:
            protocol = seen.get(b"upgrade")
            if protocol and protocol.lower() != b"h2c":  # a server may ignore h2c, and we do so far
                self.upgrade = protocol
        self._check_target()

    def _check_target(self) -> None:
        """Target and Host as RFC 9112 wants them; an absolute target's authority is the Host."""
        target = self.target
        host = self.seen.get(b"host")
        if target[0] == 47 and host is not None:  # "/"
            if not _HOST.fullmatch(host):
                raise Malformed("malformed Host header")
            return
        if host is None and self.minor:
            raise Malformed("no Host", 400, b"Bad Request: missing required Host header")
        if target[0] == 47 or (target == b"*" and self.method == b"OPTIONS"):
            return
        if self.method == b"CONNECT":
            self.set_host(target)
            return
        match = _ABSOLUTE.fullmatch(target)
        if match is None:
            raise Malformed("request target")
        authority, path = match.groups()
        if not path.startswith(b"/"):
            path = b"/" + path
        self.target = path
        self.lines[0] = b"%s %s HTTP/1.1" % (self.method, path)
        self.set_host(authority)

    def set_host(self, host: bytes) -> None:
        """Put another value into the Host line, where it stands; first, when there was none."""
        line = b"Host: " + host
        lines = self.lines
        if b"host" in self.seen:
            for index in range(1, len(lines)):
                if lines[index][:5].lower() == b"host:":
                    lines[index] = line
                    break
        else:
            lines.insert(1, line)
        self.seen[b"host"] = host

    def for_user(self, peer: bytes, authority: bytes) -> bytes:
        """The head for the user container (contract section 3.3). To be asked once.

        `peer` is the client's address, `authority` the Host for a request that names none.
        """
        seen = self.seen
        lines = self.lines
        if not self.minor:
            lines[0] = b"%s %s HTTP/1.1" % (self.method, self.target)
        original = seen.get(contract.ORIGINAL_HOST)
        if original:
            self.set_host(original)
        elif not seen.get(b"host"):
            self.set_host(authority)
        for_ = seen.get(b"x-forwarded-for", b"")
        if not seen.get(b"forwarded"):
            host = seen.get(b"x-forwarded-host", b"")
            proto = seen.get(b"x-forwarded-proto", b"")
            if for_ or host or proto:
                lines.append(b"Forwarded: " + forwarded(for_, host, proto))
        lines.append(b"X-Forwarded-For: " + appended([for_] if for_ else [], peer))
        if b"te" in seen and b"trailers" in seen[b"te"].lower():
            lines.append(b"Te: trailers")
        if self.length is None:
            lines.append(b"Transfer-Encoding: chunked")
            if b"trailer" in seen:
                lines.append(b"Trailer: " + seen[b"trailer"])
        if self.upgrade:
            lines.append(b"Connection: Upgrade")
            lines.append(b"Upgrade: " + self.upgrade)
        lines.append(HEAD_END[:2])
        return b"\r\n".join(lines)


class ResponseHead:
    """A response as the user container or a sink gave it.

    `length` is the body's length, None when it is chunked, -1 when the end of the connection ends
    it; the request's method decides, because HEAD has none.
    """

    __slots__ = ("_block", "close", "length", "lines", "seen", "status", "upgrade")

    def __init__(self, data: bytes, method: bytes) -> None:
        """Raises Malformed. `data` is one whole head with the empty line that ends it."""
        end = data.find(b"\r\n")
        line = data[:end]
        match = _STATUS_LINE.fullmatch(line)
        if match is None:
            raise Malformed("status line")
        minor = 1 if match[1] == b"1" else 0
        self.status = status = int(match[2])
        self.lines = [line]
        self._block = data[end + 2 :]
        self.seen, tokens = _read(self._block, self.lines, _RESPONSE_FIELDS)
        self.close = b"close" in tokens if minor else b"keep-alive" not in tokens
        self.upgrade: bytes | None = self.seen.get(b"upgrade") if b"upgrade" in tokens else None
        self.length: int | None
        if method == b"HEAD" or status < 200 or status == 204 or status == 304:
            self.length = 0
        elif _transfer_coding(self.seen, minor):
            self.length = None
        else:
            length = self.seen.get(b"content-length")
            self.length = int(length) if length else -1

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """All header fields, names in lower case, in the order they came."""
        if len(self._block) <= 2:
            return ()
        pairs = []
        for line in self._block[:-4].split(b"\r\n"):
            name, _, value = line.partition(b":")
            pairs.append((name.lower(), value.strip()))
        return tuple(pairs)

    def for_client(self, minor: int, added: list[bytes], date: bytes, chunked: bool) -> bytes:
        """The head for a client of HTTP/1.`minor`, with the lines the relay adds. Ask once."""
        lines = self.lines
        if not minor or lines[0][7] == 48:  # the version is the client's: an upstream may be 1.0
            lines[0] = (b"HTTP/1.1" if minor else b"HTTP/1.0") + lines[0][8:]
        if date and b"date" not in self.seen:
            lines.append(date)
        if chunked:
            lines.append(b"Transfer-Encoding: chunked")
            if b"trailer" in self.seen:
                lines.append(b"Trailer: " + self.seen[b"trailer"])
        lines += added
        lines.append(HEAD_END[:2])
        return b"\r\n".join(lines)
