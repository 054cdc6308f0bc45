"""Responses of our own, byte for byte as the queue-proxy words them (contract 3.2, 3.12, 4.1)."""

from __future__ import annotations

import time
from http import HTTPStatus

from weir.proxy import contract

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_TYPE = b"Content-Type: "
_TEXT = _TYPE + contract.TEXT_PLAIN
_DAYS = b"Mon Tue Wed Thu Fri Sat Sun".split()
_MONTHS = b"Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
_NOSNIFF = b"X-Content-Type-Options: nosniff"


class _Clock:
    """The Date line, made anew once a second."""

    __slots__ = ("line", "second")

    def __init__(self) -> None:
        self.second = 0
        self.line = b""


_clock = _Clock()


def http_date(second: int) -> bytes:
    """IMF-fixdate (RFC 9110, 5.6.7). email.utils has it too, and takes 8 ms to be imported."""
    at = time.gmtime(second)
    day, month = _DAYS[at.tm_wday], _MONTHS[at.tm_mon - 1]
    clock = (at.tm_hour, at.tm_min, at.tm_sec)
    return b"%s, %02d %s %04d %02d:%02d:%02d GMT" % (day, at.tm_mday, month, at.tm_year, *clock)


def date_line() -> bytes:
    second = int(time.time())
    if second != _clock.second:
        _clock.second = second
        _clock.line = b"Date: " + http_date(second)
    return _clock.line


def reply(status: int, body: bytes = b"", *fields: bytes, kind: bytes = b"") -> list[bytes]:
    """Status line, fields and body of an ordinary answer; `fields` come before Date.

    A body is plain text if no `kind` is given; an empty one has a type only if one is given.
    """
    lines = [_status_line(status), *fields, date_line(), b"Content-Length: %d" % len(body)]
    if body or kind:
        lines.append(_TYPE + (kind or contract.TEXT_PLAIN))
    return [*lines, body]


def error(status: int, body: bytes) -> list[bytes]:
    """An error with a text, as Go's http.Error words it."""
    length = b"Content-Length: %d" % len(body)
    return [_status_line(status), _TEXT, _NOSNIFF, date_line(), length, body]


def framed(parts: list[bytes], minor: int, close: bool, headless: bool) -> bytes:
    """The bytes of a reply() or error() for a client of HTTP/1.`minor`.

    `headless`: the request was HEAD, so the body stays here.
    """
    *lines, body = parts
    if not minor:
        lines[0] = b"HTTP/1.0" + lines[0][8:]
        if not close:
            lines.append(b"Connection: keep-alive")
    elif close:
        lines.append(b"Connection: close")
    return b"\r\n".join([*lines, b"", b"" if headless else body])


def refusal(status: int, reason: bytes) -> bytes:
    """What a client that broke HTTP reads before the connection is closed."""
    text = b"%d %s" % (status, reason)
    return b"HTTP/1.1 %s\r\n%s\r\nConnection: close\r\n\r\n%s" % (text, _TEXT, text)


def _status_line(status: int) -> bytes:
    return b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())
