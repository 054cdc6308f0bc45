"""A request as the template of a request log sees it: Go's http.Request and url.URL.

Owns the names and spellings that Go's server would have given to what came in. Built from header
fields, read only when a template asks.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any, ClassVar
from urllib.parse import quote, unquote_to_bytes

from weir.proxy.observe.govalues import (
    Int64,
    Map,
    Method,
    Nil,
    Strings,
    Struct,
    TemplateError,
    Uint16,
    Unsupported,
    text,
)

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_CANONICAL: dict[bytes, str] = {}


def canonical(name: str) -> str:
    """A header's name as Go spells it: Like-This."""
    if not _TOKEN.fullmatch(name):
        return name
    return "-".join(part.capitalize() for part in name.split("-"))


def _canonical(name: bytes) -> str:
    known = _CANONICAL.get(name)
    if known is None:
        known = canonical(text(name))
        if len(_CANONICAL) < 512 and len(name) < 64:
            _CANONICAL[name] = known
    return known


class Header(Map):
    go_type = "http.Header"

    def first(self, name: str) -> str:
        values = self.get(canonical(name))
        return values[0] if values else ""

    go_methods: ClassVar[dict[str, Method]] = {
        "Get": Method(("string",), lambda self, name: self.first(name)),
        "Values": Method(("string",), lambda self, name: self.get(canonical(name), Strings())),
    }


class Values(Map):
    """url.Values."""

    go_type = "url.Values"

    def first(self, name: str) -> str:
        values = self.get(name)
        return values[0] if values else ""

    def encoded(self) -> str:
        return "&".join(
            f"{quote(key, safe='', errors='surrogateescape').replace('%20', '+')}"
            f"={quote(value, safe='', errors='surrogateescape').replace('%20', '+')}"
            for key in sorted(self)
            for value in self[key]
        )

    go_methods: ClassVar[dict[str, Method]] = {
        "Get": Method(("string",), lambda self, name: self.first(name)),
        "Has": Method(("string",), lambda self, name: name in self),
        "Encode": Method((), encoded),
    }


_BAD_ESCAPE = re.compile(r"%(?![0-9a-fA-F]{2})")
_PATH_KEPT = "/$&+,:;=@"
_PATH_VALID = re.compile(r"(?:[A-Za-z0-9\-_.~!$&'()*+,;=:@\[\]/]|%[0-9a-fA-F]{2})*")


class URL(Struct):
    """The URL of a request: a path and a query, no host."""

    go_type = "*url.URL"
    go_fields = (
        "Scheme",
        "Opaque",
        "User",
        "Host",
        "Path",
        "Fragment",
        "RawQuery",
        "RawPath",
        "RawFragment",
        "ForceQuery",
        "OmitHost",
    )
    Scheme = Opaque = Host = Fragment = RawFragment = ""
    User = Nil("*url.Userinfo", "")
    OmitHost = False

    def __init__(self, target: str) -> None:
        path, mark, self.RawQuery = target.partition("?")
        self.ForceQuery = bool(mark) and not self.RawQuery
        self._given = path
        bad = _BAD_ESCAPE.search(path)
        self.Path = path if bad else text(unquote_to_bytes(path.encode("utf-8", "surrogateescape")))
        default = quote(self.Path, safe=_PATH_KEPT, errors="surrogateescape")
        self._escaped = path if _PATH_VALID.fullmatch(path) else default
        self.RawPath = "" if path == default else path

    def string(self) -> str:
        path = self._escaped
        if ":" in path.partition("/")[0]:
            path = "./" + path
        return path + self._query()

    def _query(self) -> str:
        return f"?{self.RawQuery}" if self.RawQuery or self.ForceQuery else ""

    @cached_property
    def values(self) -> Values:
        found = Values()
        for pair in self.RawQuery.split("&"):
            if not pair or ";" in pair:
                continue
            name, _, value = pair.partition("=")
            if not _BAD_ESCAPE.search(pair):
                found.setdefault(_plain(name), Strings()).append(_plain(value))
        return found

    go_methods: ClassVar[dict[str, Method]] = {
        "String": Method((), string),
        "Redacted": Method((), string),
        "EscapedPath": Method((), lambda self: self._escaped),
        "RequestURI": Method((), lambda self: (self._escaped or "/") + self._query()),
        "Query": Method((), lambda self: self.values),
        "Hostname": Method((), lambda self: ""),
        "Port": Method((), lambda self: ""),
        "IsAbs": Method((), lambda self: False),
    }


def _plain(value: str) -> str:
    data = value.replace("+", " ").encode("utf-8", "surrogateescape")
    return text(unquote_to_bytes(data))


class ConnectionState(Struct):
    """Of TLS: that there was a handshake is all we know."""

    __slots__ = ()
    go_type = "*tls.ConnectionState"
    go_fields = ("Version", "HandshakeComplete", "DidResume", "CipherSuite", "ServerName")
    Version = CipherSuite = Uint16()
    HandshakeComplete = True
    DidResume = False
    ServerName = ""


class Cookie(Struct):
    __slots__ = ("Name", "Value")
    go_type = "*http.Cookie"
    go_fields = ("Name", "Value")

    def __init__(self, name: str, value: str) -> None:
        self.Name = name
        self.Value = value


_TLS = ConnectionState()
_NO_TLS = Nil("*tls.ConnectionState")


class Request(Struct):
    """Of header fields as they came; `length` None is a body without one."""

    go_type = "*http.Request"
    go_fields = (
        "Method",
        "URL",
        "Proto",
        "ProtoMajor",
        "ProtoMinor",
        "Header",
        "Body",
        "ContentLength",
        "TransferEncoding",
        "Close",
        "Host",
        "Form",
        "PostForm",
        "MultipartForm",
        "Trailer",
        "RemoteAddr",
        "RequestURI",
        "TLS",
        "Response",
        "Pattern",
    )
    MultipartForm = Nil("*multipart.Form")
    Response = Nil("*http.Response")
    Pattern = ""

    def __init__(
        self,
        method: bytes,
        target: bytes,
        version: bytes,
        host: bytes,
        fields: list[tuple[bytes, bytes]],
        length: int | None,
        peer: str,
        tls: bool,
    ) -> None:
        self.Method = text(method)
        self.RequestURI = text(target)
        self.Proto = version.decode()
        self.Host = text(host)
        self.ContentLength = Int64(-1 if length is None else length)
        self.RemoteAddr = peer
        self.TLS: Any = _TLS if tls else _NO_TLS
        self._fields = fields

    @property
    def ProtoMajor(self) -> int:
        return int(self.Proto[5])

    @property
    def ProtoMinor(self) -> int:
        return int(self.Proto[7])

    @cached_property
    def URL(self) -> URL:
        return URL(self.RequestURI)

    @cached_property
    def Header(self) -> Header:
        header = Header()
        for name, value in self._fields:
            key = _canonical(name)
            if key not in _NOT_IN_HEADER:
                header.setdefault(key, Strings()).append(text(value))
        return header

    @property
    def TransferEncoding(self) -> Strings:
        chunked = self.ContentLength < 0 and self.Proto.startswith("HTTP/1")
        return Strings(["chunked"]) if chunked else Strings()

    @property
    def Close(self) -> bool:
        connection = self.first(b"connection").lower()
        if self.Proto == "HTTP/1.0":
            return b"keep-alive" not in connection
        return b"close" in connection

    @property
    def Body(self) -> None:
        raise Unsupported("Request.Body is gone when the line is written")

    @property
    def Form(self) -> Values:
        return Values()

    @property
    def PostForm(self) -> Values:
        return Values()

    @property
    def Trailer(self) -> Map:
        return Values()

    @cached_property
    def _firsts(self) -> dict[bytes, bytes]:
        return {name.lower(): value for name, value in reversed(self._fields)}

    def first(self, name: bytes) -> bytes:
        """The first value of the field of that (lower-case) name."""
        return self._firsts.get(name, b"")

    def user_agent(self) -> str:
        return text(self.first(b"user-agent"))

    def referer(self) -> str:
        return text(self.first(b"referer"))

    def cookie(self, wanted: str) -> Cookie:
        for key, value in self._fields:
            if key.lower() == b"cookie":
                for pair in text(value).split(";"):
                    name, mark, content = pair.strip().partition("=")
                    if mark and name == wanted:
                        return Cookie(name, content.strip('"'))
        raise TemplateError("http: named cookie not present")

    go_methods: ClassVar[dict[str, Method]] = {
        "UserAgent": Method((), user_agent),
        "Referer": Method((), referer),
        "Cookie": Method(("string",), cookie),
        "FormValue": Method(("string",), lambda self, name: self.URL.values.first(name)),
        "PathValue": Method(("string",), lambda self, name: ""),
        "ProtoAtLeast": Method(
            ("int", "int"),
            lambda self, major, minor: (self.ProtoMajor, self.ProtoMinor) >= (major, minor),
        ),
    }


_NOT_IN_HEADER = frozenset({"Host", "Transfer-Encoding", "Trailer"})


class Response(Struct):
    __slots__ = ("Code", "Latency", "Size")
    go_type = "*http.RequestLogResponse"
    go_fields = ("Code", "Size", "Latency")

    def __init__(self, code: int, size: int, seconds: float) -> None:
        self.Code = code
        self.Size = size
        nanoseconds = round(seconds * 1e9)  # as Go's Duration.Seconds, so that the digits agree
        self.Latency = nanoseconds // 1_000_000_000 + nanoseconds % 1_000_000_000 / 1e9


class Revision(Struct):
    __slots__ = ("Configuration", "Name", "Namespace", "PodIP", "PodName", "Service")
    go_type = "*http.RequestLogRevision"
    go_fields = ("Name", "Namespace", "Service", "Configuration", "PodName", "PodIP")

    def __init__(
        self,
        name: str,
        namespace: str,
        service: str,
        configuration: str,
        pod_name: str,
        pod_ip: str,
    ) -> None:
        self.Name = name
        self.Namespace = namespace
        self.Service = service
        self.Configuration = configuration
        self.PodName = pod_name
        self.PodIP = pod_ip


class Entry(Struct):
    """What `.` is."""

    __slots__ = ("Request", "Response", "Revision", "TraceID")
    go_type = "*http.RequestLogTemplateInput"
    go_fields = ("Request", "Response", "Revision", "TraceID")

    def __init__(
        self, request: Request, response: Response, revision: Revision, trace_id: str
    ) -> None:
        self.Request = request
        self.Response = response
        self.Revision = revision
        self.TraceID = trace_id
