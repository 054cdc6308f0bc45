"""W3C Trace Context in user properties: what counts as one, and what is passed on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.adaptor.tracecontext import passed_on, published, wanted

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_the_publisher_s_context_becomes_header_lines() -> None:
    properties = [("unit", "K"), ("traceparent", PARENT), ("tracestate", "a=1,b=2")]
    assert passed_on(properties) == (
        b"traceparent: %s\r\ntracestate: a=1,b=2\r\n" % PARENT.encode()
    )
    assert passed_on([("ce-traceparent", PARENT)]) == b"traceparent: %s\r\n" % PARENT.encode()


def test_of_several_the_last_counts() -> None:
    assert published([("traceparent", "x"), ("traceparent", PARENT)]) == {"traceparent": PARENT}


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "00",
        PARENT.upper(),
        PARENT + "-",
        PARENT.replace("00-4", "ff-4"),
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
        PARENT + "\r\nX-Evil: 1",
        PARENT + "\n",
    ],
)
def test_what_is_no_context_is_not_passed_on_and_takes_its_state_with_it(parent: str) -> None:
    assert passed_on([("traceparent", parent), ("tracestate", "a=1")]) == b""


@pytest.mark.parametrize("state", ["", " ", "a=1\r\nX-Evil: 1", "a=\u00e9", "a" * 513])
def test_a_state_that_no_header_can_carry_is_left_out(state: str) -> None:
    assert published([("traceparent", PARENT), ("tracestate", state)]) == {"traceparent": PARENT}


@given(st.lists(st.tuples(st.sampled_from(["traceparent", "tracestate", "x"]), st.text())))
def test_no_property_makes_a_header_line_of_its_own(properties: list[tuple[str, str]]) -> None:
    lines = passed_on([*properties, ("traceparent", PARENT)])
    first, *rest = lines.split(b"\r\n")
    assert first == b"traceparent: " + PARENT.encode()
    assert len(rest) == 1 or (rest[0].startswith(b"tracestate: ") and rest[1:] == [b""])
    assert lines.isascii() and lines.count(b"\r") == lines.count(b"\n") == len(rest)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
    ],
)
def test_spans_are_wanted_when_there_is_somewhere_to_send_them(
    environ: dict[str, str], expected: bool
) -> None:
    assert wanted(environ) is expected
