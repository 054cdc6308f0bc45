"""The sidecar's own log: lines on stderr, as zap would have written them (contract section 3.14).

Owns the keys, levels and encodings that SERVING_LOGGING_CONFIG and SERVING_LOGGING_LEVEL choose.
A configuration that can't be used is complained about and replaced by the default, as upstream.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

from weir.proxy.environment import SidecarSettings

_NAME = "queueproxy"
_SEVERITIES = {
    logging.DEBUG: "DEBUG",
    logging.INFO: "INFO",
    logging.WARNING: "WARNING",
    logging.ERROR: "ERROR",
    logging.CRITICAL: "CRITICAL",
}
_ZAP_NAMES = {
    logging.DEBUG: "debug",
    logging.INFO: "info",
    logging.WARNING: "warn",
    logging.ERROR: "error",
    logging.CRITICAL: "dpanic",
}
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "dpanic": logging.CRITICAL,
    "panic": logging.CRITICAL,
    "fatal": logging.CRITICAL,
}
_KEYS = {
    "levelKey": "severity",
    "timeKey": "timestamp",
    "nameKey": "logger",
    "callerKey": "caller",
    "messageKey": "message",
    "stacktraceKey": "stacktrace",
}
_PIPE_BYTES = select.PIPE_BUF
_KEPT_BYTES = 64 << 10


@dataclass(frozen=True)
class LogSettings:
    """`keys` by their names in zap's encoderConfig, an empty one is left out."""

    level: int
    encoding: str
    keys: dict[str, str]
    level_encoder: str
    time_encoder: str
    stream: str


def log_settings(config: str, level: str) -> tuple[LogSettings, str]:
    """What zap would do with these, and a complaint (or nothing) about what it would not."""
    complaint = ""
    wanted: dict[str, Any] = {}
    if config:
        try:
            wanted = _checked(json.loads(config))
        except ValueError as error:
            complaint = f"SERVING_LOGGING_CONFIG can't be used, the default is: {error}"
    encoder = wanted.get("encoderConfig", {})
    name = str(wanted.get("level", ""))
    if level:
        if level.lower() in _LEVELS:
            name = level
        else:
            complaint = complaint or f"SERVING_LOGGING_LEVEL: {level!r} is no level"
    outputs = wanted.get("outputPaths", ["stderr"])
    stream = "stdout" if outputs == ["stdout"] else "stderr"
    settings = LogSettings(
        level=_LEVELS[name.lower()],
        encoding=wanted.get("encoding", "json"),
        keys={key: str(encoder.get(key, default)) for key, default in _KEYS.items()},
        level_encoder=str(encoder.get("levelEncoder", "stackdriver")),
        time_encoder=str(encoder.get("timeEncoder", "rfc3339nano")),
        stream=stream,
    )
    return settings, complaint


def _checked(config: Any) -> dict[str, Any]:
    """The configuration, if it is one. Raises ValueError."""
    if not isinstance(config, dict):
        raise ValueError("it is no JSON object")
    for key, kind in (("encoderConfig", dict), ("outputPaths", list), ("level", str)):
        if not isinstance(config.get(key, kind()), kind):
            raise ValueError(f"{key} is no {kind.__name__}")
    if str(config.get("level", "")).lower() not in _LEVELS:
        raise ValueError(f"level {config['level']!r} is unknown")
    if config.get("encoding", "json") not in ("json", "console"):
        raise ValueError(f"encoding {config['encoding']!r} is unknown; allowed: json, console")
    return config


class Formatter(logging.Formatter):
    """`common` fields are in every line; more come by `extra={"fields": {…}}`."""

    def __init__(self, settings: LogSettings, common: dict[str, str]) -> None:
        super().__init__()
        self._settings = settings
        self._common = common

    def format(self, record: logging.LogRecord) -> str:
        settings = self._settings
        fields: dict[str, Any] = {**self._common, **getattr(record, "fields", {})}
        stack = ""
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = str(record.exc_info[1]) or type(record.exc_info[1]).__name__
            stack = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        parts = {
            "levelKey": self._level(record.levelno),
            "timeKey": self._time(record.created),
            "nameKey": _NAME,
            "callerKey": _caller(record),
            "messageKey": record.getMessage(),
        }
        if settings.encoding == "console":
            shown = [str(value) for key, value in parts.items() if settings.keys[key]]
            line = "\t".join([*shown, json.dumps(fields)])
            return f"{line}\n{stack}" if stack else line
        named = {settings.keys[key]: value for key, value in parts.items() if settings.keys[key]}
        named |= fields
        if stack and settings.keys["stacktraceKey"]:
            named[settings.keys["stacktraceKey"]] = stack
        return json.dumps(named, separators=(",", ":"), ensure_ascii=False)

    def _level(self, level: int) -> str:
        level = level // 10 * 10
        encoder = self._settings.level_encoder
        if encoder == "stackdriver":
            return _SEVERITIES.get(level, "INFO")
        name = _ZAP_NAMES.get(level, "info")
        return name.upper() if encoder.startswith("capital") else name

    def _time(self, created: float) -> str | float | int:
        encoder = self._settings.time_encoder.lower()
        microseconds = round(created * 1e6)
        seconds, fraction = divmod(microseconds, 1_000_000)
        base = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        if encoder == "iso8601":
            return f"{base}.{fraction // 1000:03d}Z"
        if encoder == "rfc3339":
            return f"{base}Z"
        if encoder == "rfc3339nano":
            digits = f"{fraction:06d}".rstrip("0")
            return f"{base}{'.' if digits else ''}{digits}Z"
        if encoder == "millis":
            return microseconds / 1e3
        if encoder == "nanos":
            return microseconds * 1000
        return microseconds / 1e6


def _caller(record: logging.LogRecord) -> str:
    folder, _, name = record.pathname.rpartition("/")
    return f"{folder.rpartition('/')[2]}/{name}:{record.lineno}"


class PipeHandler(logging.Handler):
    """Writes lines to a descriptor, but never waits for whoever reads them.

    What does not fit now is kept for the next line, up to a limit; then lines are dropped, and
    how many is said as soon as there is room.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._left = b""
        self._dropped = 0
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
            if len(self._left) + len(line) > _KEPT_BYTES:
                self._dropped += 1
            else:
                self._left += line
            self._write()
            if self._dropped and not self._left:
                dropped, self._dropped = self._dropped, 0
                self.handle(_about(record, f"{dropped} lines of this log were dropped"))
        except OSError:
            self._left = b""
        except (ValueError, TypeError):
            self.handleError(record)

    def _write(self) -> None:
        while self._left and self._poll.poll(0):
            self._left = self._left[os.write(self._descriptor, self._left[:_PIPE_BYTES]) :]


def _about(record: logging.LogRecord, message: str) -> logging.LogRecord:
    return logging.LogRecord(
        record.name, logging.WARNING, record.pathname, record.lineno, message, None, None
    )


def set_up(settings: SidecarSettings) -> None:
    """All loggers of ours, and everyone's warnings, go to where the settings say."""
    wanted, complaint = log_settings(settings.logging.config, settings.logging.level)
    revision = settings.revision
    common = {
        "knative.dev/key": f"{revision.namespace}/{revision.revision}",
        "knative.dev/pod": revision.pod,
    }
    stream = sys.stdout if wanted.stream == "stdout" else sys.stderr
    handler = PipeHandler(stream.fileno())
    handler.setFormatter(Formatter(wanted, common))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(wanted.level, logging.WARNING))
    logging.getLogger("weir").setLevel(wanted.level)
    if complaint:
        logging.getLogger("weir.log").warning("%s", complaint)
