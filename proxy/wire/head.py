"""Heads of HTTP/1 requests: read strictly, kept byte for byte, rewritten for the user container.

We find where a head ends and what its first line says; the header block in between is judged by
`fields`. Header lines that nobody has to understand are never taken apart: they leave with the
spelling, order and spacing they came with.

Refuses to know sockets, bodies and which requests are probes.
"""

from __future__ import annotations

import re

from weir.proxy import contract
from weir.proxy.policy.forwarded import appended, forwarded
from weir.proxy.wire.fields import (
    HEAD_END,
    NO_TOKENS,
    PLAIN_TOKENS,
    Malformed,
    fields_of,
    lines_of,
    tokens_of,
    transfer_coding,
    understood,
    without,
)

_REQUEST_LINE = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])"
)
_OTHER_VERSION = re.compile(rb"[A-Z]+ [\x21-\x7e]+ HTTP/(?!1\.[01])[0-9](?:\.[0-9])?")
_ABSOLUTE = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*://(?:[^/?#@]*@)?([^/?#]*)([^#]*)")
_HOST = re.compile(rb"[A-Za-z0-9!$%&'()*+,\-.:;=\[\]_~]*")

_REMEMBERED_BYTES = 1024
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
_NOT_FOR_USER = (
    _HOP | contract.PRUNED | {contract.ORIGINAL_HOST, b"http2-settings", b"x-forwarded-for"}
)
_ADDED_TO = frozenset({b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"})
_DROPPED = _NOT_FOR_USER - _ADDED_TO

_REQUEST_FIELDS = fields_of(_REQUEST_NAMES)
_LINES_NOT_FOR_USER = lines_of(_NOT_FOR_USER)
_HOST_LINE = lines_of([b"host"])


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
        self.seen = seen = understood(_REQUEST_FIELDS, data, end)
        chunked = transfer_coding(seen, self.minor)
        length = seen.get(b"content-length")
        self.length: int | None = None if chunked else int(length) if length else 0
        connection = seen.get(b"connection")
        self._tokens = tokens = NO_TOKENS if connection is None else tokens_of(connection)
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
            if not self._tokens <= PLAIN_TOKENS:
                data = without(data, self._tokens)
        return data[:-2] + b"\r\n".join(added) + HEAD_END
