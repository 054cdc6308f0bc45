"""The sidecar's own log as zap would write it (contract section 3.14)."""

import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weir.proxy.contract import RevisionSettings
from weir.proxy.environment import Logging, SidecarSettings
from weir.proxy.observe import ownlog
from weir.proxy.observe.ownlog import Formatter, PipeHandler, log_settings

COMMON = {"knative.dev/key": "default/hello-00001", "knative.dev/pod": "pod-1"}
KNATIVE = json.dumps(
    {
        "level": "info",
        "development": False,
        "outputPaths": ["stdout"],
        "errorOutputPaths": ["stderr"],
        "encoding": "json",
        "encoderConfig": {
            "timeKey": "timestamp",
            "levelKey": "severity",
            "nameKey": "logger",
            "callerKey": "caller",
            "messageKey": "message",
            "stacktraceKey": "stacktrace",
            "lineEnding": "",
            "levelEncoder": "",
            "timeEncoder": "iso8601",
            "durationEncoder": "",
            "callerEncoder": "",
        },
    }
)


def record(level: int = logging.INFO, message: str = "hello", **more: Any) -> logging.LogRecord:
    made = logging.LogRecord(
        "weir.relay", level, "/srv/weir/proxy/relay.py", 33, message, None, None
    )
    made.created = 1790000000.5
    made.__dict__.update(more)
    return made


def written(config: str = "", **what: Any) -> str:
    return Formatter(log_settings(config, "")[0], COMMON).format(record(**what))


def test_a_line_is_json_with_the_queue_proxy_s_keys_in_its_order() -> None:
    assert written() == (
        '{"severity":"INFO","timestamp":"2026-09-21T14:13:20.5Z","logger":"queueproxy",'
        '"caller":"proxy/relay.py:33","message":"hello",'
        '"knative.dev/key":"default/hello-00001","knative.dev/pod":"pod-1"}'
    )


def test_an_error_brings_its_reason_and_where_it_came_from() -> None:
    try:
        raise ValueError("no good")
    except ValueError as error:
        line = json.loads(written(exc_info=(ValueError, error, error.__traceback__)))
    assert line["error"] == "no good"
    assert "test_own_log.py" in line["stacktrace"]
    line = json.loads(written(fields={"error": "EOF"}))
    assert line["error"] == "EOF"


@pytest.mark.parametrize(
    ("level", "severity"),
    [
        (logging.DEBUG, "DEBUG"),
        (logging.INFO, "INFO"),
        (logging.WARNING, "WARNING"),
        (logging.ERROR, "ERROR"),
        (logging.CRITICAL, "CRITICAL"),
    ],
)
def test_severities_are_stackdriver_s(level: int, severity: str) -> None:
    assert json.loads(written(level=level))["severity"] == severity


def test_with_knative_s_example_configuration() -> None:
    line = json.loads(written(KNATIVE, level=logging.WARNING))
    assert line["severity"] == "warn"
    assert line["timestamp"] == "2026-09-21T14:13:20.500Z"
    assert log_settings(KNATIVE, "")[0].stream == "stdout"


@pytest.mark.parametrize(
    ("config", "level", "wanted"),
    [
        ("", "", logging.INFO),
        ("", "debug", logging.DEBUG),
        ("", "warn", logging.WARNING),
        ("", "error", logging.ERROR),
        ("", "fatal", logging.CRITICAL),
        ('{"level":"error"}', "", logging.ERROR),
        ('{"level":"error"}', "debug", logging.DEBUG),
        ("", "loud", logging.INFO),
    ],
)
def test_the_level(config: str, level: str, wanted: int) -> None:
    settings, complaint = log_settings(config, level)
    assert settings.level == wanted
    assert bool(complaint) == (level == "loud")


def test_console_lines() -> None:
    line = written('{"encoding":"console"}')
    assert line == (
        "INFO\t2026-09-21T14:13:20.5Z\tqueueproxy\tproxy/relay.py:33\thello\t" + json.dumps(COMMON)
    )


@pytest.mark.parametrize(
    ("encoder", "wanted"),
    [
        ("epoch", 1790000000.5),
        ("millis", 1790000000500.0),
        ("nanos", 1790000000500000000),
        ("rfc3339", "2026-09-21T14:13:20Z"),
    ],
)
def test_times(encoder: str, wanted: object) -> None:
    line = json.loads(written(json.dumps({"encoderConfig": {"timeEncoder": encoder}})))
    assert line["timestamp"] == wanted


def test_a_key_that_is_empty_is_left_out() -> None:
    line = json.loads(written('{"encoderConfig":{"callerKey":"","messageKey":"msg"}}'))
    assert "caller" not in line and line["msg"] == "hello"


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '{"level":7}',
        '{"level":"loud"}',
        '{"encoding":"xml"}',
        '{"encoderConfig":[]}',
        '{"outputPaths":"stdout"}',
    ],
)
def test_a_configuration_that_is_no_good_is_the_default_with_a_complaint(config: str) -> None:
    settings, complaint = log_settings(config, "")
    assert "SERVING_LOGGING_CONFIG" in complaint
    assert settings == log_settings("", "")[0]


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=10))
def test_no_configuration_is_fatal(config: str, level: str) -> None:
    log_settings(config, level)


# --- the pipe ------------------------------------------------------------------------------------
@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    yield reading, writing
    os.close(writing)
    os.close(reading)


def test_a_log_that_nobody_reads_holds_up_nobody_and_counts_what_is_lost(
    pipe: tuple[int, int],
) -> None:
    reading, writing = pipe
    handler = PipeHandler(writing)
    handler.setFormatter(Formatter(log_settings("", "")[0], COMMON))
    for number in range(2000):
        handler.handle(record(message=f"{number:0500d}"))
    os.set_blocking(reading, True)
    data = b""
    while data.count(b"were dropped") == 0:
        data += os.read(reading, 1 << 20)
        handler.handle(record(message="more"))
    lines = [json.loads(line) for line in data.splitlines()]
    messages = [line["message"] for line in lines]
    kept = sum(message.isdecimal() for message in messages)
    assert messages[:kept] == [f"{number:0500d}" for number in range(kept)]
    (complaint,) = (message for message in messages if "dropped" in message)
    assert int(complaint.split()[0]) >= 2000 - kept > 0


def test_all_loggers_of_ours_and_warnings_of_others_go_there(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = pipe
    root, ours = logging.getLogger(), logging.getLogger("weir")
    before = root.handlers[:], root.level, ours.level
    monkeypatch.setattr("sys.stderr", os.fdopen(os.dup(writing), "w"))
    settings = SidecarSettings(
        RevisionSettings(user_port=8080, pod="pod-1", revision="hello-00001"),
        8012,
        8112,
        "10.0.0.1",
        logging=Logging("{", "debug"),
    )
    try:
        ownlog.set_up(settings)
        logging.getLogger("weir.pod").debug("ours")
        logging.getLogger("other").info("theirs")
        logging.getLogger("other").warning("theirs, a warning")
    finally:
        root.handlers[:], root.level = before[:2]
        ours.setLevel(before[2])
    lines = [json.loads(line) for line in os.read(reading, 1 << 16).splitlines()]
    assert [line["message"].partition(":")[0] for line in lines] == [
        "SERVING_LOGGING_CONFIG can't be used, the default is",
        "ours",
        "theirs, a warning",
    ]
    assert lines[1]["knative.dev/key"] == "default/hello-00001"
