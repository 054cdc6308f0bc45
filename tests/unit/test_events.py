"""CloudEvents: percent-encoding, JSON, and what becomes of an MQTT message."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import mqtt5
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.adaptor.events import (
    Event,
    MalformedEvent,
    decode_value,
    encode_value,
    http_headers,
    is_media_type,
    is_timestamp,
)
from weir.adaptor.httpbinding import Mode, encoded
from weir.adaptor.jsonformat import from_json
from weir.adaptor.mapping import Clock, Mapper, minted_ids, publisher_id
from weir.adaptor.routes import parse

text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        ("plain/~!", "plain/~!"),
        ("Euro € 😀", "Euro%20%E2%82%AC%20%F0%9F%98%80"),
        ('say "hi"', "say%20%22hi%22"),
        ("100%", "100%25"),
        ("a\r\nce-id: x", "a%0D%0Ace-id:%20x"),
        ("\x7f\x00", "%7F%00"),
        ("\ud800", "%EF%BF%BD"),
    ],
)
def test_header_values_are_percent_encoded_as_the_binding_says(value: str, encoded: str) -> None:
    assert encode_value(value) == encoded


@given(text)
def test_what_is_encoded_decodes_to_itself(value: str) -> None:
    assert decode_value(encode_value(value)) == value


@given(text)
def test_an_encoded_value_is_printable_ascii_without_space_quote_or_stray_percent(
    value: str,
) -> None:
    encoded = encode_value(value)
    assert re.fullmatch(r"(?:[!#-$&-~]|%[0-9A-F]{2})*", encoded)


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        ("Euro%20%e2%82%ac", "Euro €"),
        ("%41bc", "Abc"),
        (r'"say \"hi\" \\ "', 'say "hi" \\ '),
        ('"%20"', " "),
        ("100%", "100%"),
        ("%2525", "%25"),
    ],
)
def test_decoding_is_lenient_and_goes_exactly_one_round(encoded: str, value: str) -> None:
    assert decode_value(encoded) == value


def test_an_overlong_encoding_is_refused() -> None:
    with pytest.raises(MalformedEvent):
        decode_value("%C0%A0")


def test_binary_mode_has_no_ce_datacontenttype() -> None:
    event = Event({"specversion": "1.0", "id": "ü"}, b"", "text/plain")
    assert http_headers(event) == (
        b"ce-specversion: 1.0\r\nce-id: %C3%BC\r\nContent-Type: text/plain\r\n"
    )


# --- JSON ---

REQUIRED = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}


@pytest.mark.parametrize(
    ("more", "content_type", "data"),
    [
        ({"data": {"a": "ü"}}, "application/json", rb'{"a": "\u00fc"}'),
        ({"data": "text"}, "application/json", b'"text"'),
        ({"data": "a,b", "datacontenttype": "text/csv"}, "text/csv", b"a,b"),
        ({"data": "x", "datacontenttype": "application/x+json"}, "application/x+json", b'"x"'),
        ({"data": None}, "application/json", b"null"),
        ({"data_base64": base64.b64encode(b"\0\xff").decode()}, None, b"\0\xff"),
        ({}, None, b""),
    ],
)
def test_structured_data_becomes_a_body(
    more: dict[str, object], content_type: str | None, data: bytes
) -> None:
    event = from_json(json.dumps(REQUIRED | more).encode())
    assert (event.content_type, event.data) == (content_type, data)
    assert dict(event.attributes) == REQUIRED


def test_extensions_take_their_canonical_form() -> None:
    event = from_json(json.dumps(REQUIRED | {"n": 5, "yes": True, "none": None}).encode())
    assert (event.attributes["n"], event.attributes["yes"]) == ("5", "true")
    assert "none" not in event.attributes


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"{",
        json.dumps({**REQUIRED, "id": ""}).encode(),
        json.dumps({**REQUIRED, "specversion": "0.3"}).encode(),
        json.dumps({**REQUIRED, "Bad-Name": "x"}).encode(),
        json.dumps({**REQUIRED, "list": []}).encode(),
        json.dumps({**REQUIRED, "data": 1, "data_base64": ""}).encode(),
        json.dumps({**REQUIRED, "data_base64": "?"}).encode(),
        json.dumps({**REQUIRED, "datacontenttype": "x\r\ny"}).encode(),
        b"[" * 100_000,
    ],
)
def test_what_is_no_event_is_refused(payload: bytes) -> None:
    with pytest.raises(MalformedEvent):
        from_json(payload)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("application/json", True),
        ("text/plain; charset=utf-8", True),
        ("json", False),
        ("a/b\r\nX: y", False),
        ("a/b;x=\n", False),
        ("ä/b", False),
    ],
)
def test_only_media_types_reach_a_header(value: str, expected: bool) -> None:
    assert is_media_type(value) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2024-02-29T12:00:00Z", True),
        ("2024-02-29T12:00:00.123+02:00", True),
        ("2024-02-29 12:00:00Z", False),
        ("2024-13-01T12:00:00Z", False),
        ("2024-02-29T12:00:00", False),
    ],
)
def test_timestamps_are_rfc_3339(value: str, expected: bool) -> None:
    assert is_timestamp(value) is expected


# --- from MQTT messages ---

ROUTE = "routes: [{filter: 'a/#', sink: function, type: 't.{level[0]}', DEFAULT}]"
NOW = 1_700_000_000.25
NOW_TEXT = "2023-11-14T22:13:20.250000Z"


def mapper(default: str = "qos: 1", *, sniff: bool = False) -> Mapper:
    made = Mapper(parse(ROUTE.replace("DEFAULT", default))[0], "broker:1883")
    made.sniff = sniff
    return made


def message(payload: bytes = b"x", topic: str = "a/b", **more: object) -> mqtt5.PublishPacket:
    more.setdefault("qos", mqtt5.QoS.AT_LEAST_ONCE)
    more.setdefault("packet_id", 1)
    return mqtt5.PublishPacket(topic, payload, **more)  # type: ignore[arg-type]


def test_a_plain_message_gets_the_attributes_of_its_route() -> None:
    event = mapper().event(message(), "the-id", NOW)
    assert event.attributes == {
        "specversion": "1.0",
        "id": "the-id",
        "type": "t.a",
        "source": "mqtt://broker:1883",
        "subject": "a/b",
        "time": NOW_TEXT,
        "mqtttopic": "a/b",
        "mqttqos": "1",
        "mqttretain": "false",
        "mqttdup": "false",
    }
    assert event.content_type == "application/octet-stream"


@pytest.mark.parametrize(
    ("default", "more", "expected"),
    [
        ("qos: 1", {"content_type": "text/csv"}, "text/csv"),
        ("datacontenttype: application/json", {"content_type": "text/csv"}, "text/csv"),
        ("datacontenttype: application/json", {}, "application/json"),
        ("datacontenttype: application/json", {"payload_format_indicator": 1}, "application/json"),
        ("qos: 1", {"payload_format_indicator": 1}, "text/plain;charset=utf-8"),
        ("qos: 1", {"content_type": "no type\r\nx: y"}, "application/octet-stream"),
    ],
)
def test_datacontenttype_by_the_first_that_says_it(
    default: str, more: dict[str, object], expected: str
) -> None:
    assert mapper(default).event(message(b"x", "a/b", **more), "i", NOW).content_type == expected


def test_a_publishers_time_is_kept_and_ours_recorded() -> None:
    given = [("time", "2023-01-01T00:00:00Z")]
    event = mapper().event(message(user_properties=given), "i", NOW)
    assert event.attributes["time"] == "2023-01-01T00:00:00Z"
    assert event.attributes["recordedtime"] == NOW_TEXT


def test_message_expiry_becomes_expirytime() -> None:
    event = mapper().event(message(message_expiry_interval=60), "i", NOW)
    assert event.attributes["expirytime"] == "2023-11-14T22:14:20.250000Z"


SPEC = [("specversion", "1.0"), ("id", "7"), ("source", "/s"), ("type", "t"), ("ext", "ü")]
SDK_GO = [(f"ce-{name}", value) for name, value in SPEC]


@pytest.mark.parametrize("properties", [SPEC, SDK_GO])
def test_binary_mode_is_recognised_in_both_dialects(properties: list[tuple[str, str]]) -> None:
    event = mapper().event(
        message(b"data", user_properties=properties, content_type="text/csv"), "minted", NOW
    )
    assert event.attributes["id"] == "7"
    assert event.attributes["ext"] == "ü"
    assert event.attributes["mqtttopic"] == "a/b"
    assert (event.content_type, event.data) == ("text/csv", b"data")


def test_sdk_gos_content_type_property_is_understood_and_the_mqtt_one_wins() -> None:
    properties = [*SDK_GO, ("Content-Type", "application/xml")]
    event = mapper().event(message(user_properties=properties), "i", NOW)
    assert event.content_type == "application/xml"
    declared = message(user_properties=properties, content_type="text/csv")
    assert mapper().event(declared, "i", NOW).content_type == "text/csv"


def test_a_missing_required_attribute_makes_it_a_plain_message() -> None:
    event = mapper().event(message(user_properties=SPEC[1:]), "minted", NOW)
    assert (event.attributes["id"], event.attributes["type"]) == ("minted", "t.a")


def test_structured_mode_goes_by_content_type() -> None:
    payload = json.dumps(REQUIRED | {"data": 5}).encode()
    for declared in ("application/cloudevents+json", "Application/CloudEvents; charset=utf-8"):
        event = mapper().event(message(payload, content_type=declared), "minted", NOW)
        assert (event.attributes["id"], event.data) == ("1", b"5")


def test_an_unknown_format_is_forwarded_as_it_is() -> None:
    event = mapper().event(message(content_type="application/cloudevents+avro"), "minted", NOW)
    assert (event.attributes["id"], event.data) == ("minted", b"x")
    assert event.content_type == "application/cloudevents+avro"


def test_a_malformed_structured_event_raises() -> None:
    with pytest.raises(MalformedEvent):
        mapper().event(message(b"{}", content_type="application/cloudevents+json"), "i", NOW)


def test_without_a_content_type_structured_mode_is_looked_for_in_3_1_1_or_where_wanted() -> None:
    payload = json.dumps(REQUIRED).encode()
    assert mapper(sniff=True).event(message(payload), "minted", NOW).attributes["id"] == "1"
    assert mapper().event(message(payload), "minted", NOW).attributes["id"] == "minted"
    wanted = mapper("sniff: true")
    wanted.sniff = False  # whatever the version is
    assert wanted.event(message(b"\n " + payload), "minted", NOW).attributes["id"] == "1"
    nearly = b'{"specversion": "1.0"}'
    assert mapper(sniff=True).event(message(nearly), "minted", NOW).attributes["id"] == "minted"


properties = st.lists(
    st.tuples(
        st.sampled_from(["id", "time", "traceparent", "x", "ce-id", "source", "specversion"]), text
    ),
    max_size=4,
)


@given(
    topic=text.map(lambda value: "a/" + value.translate(dict.fromkeys(map(ord, "\0+#")))),
    payload=st.binary(max_size=20) | st.just(json.dumps(REQUIRED).encode()),
    user_properties=properties,
    content_type=st.sampled_from(
        [None, "text/csv", "bad", "application/json", "application/cloudevents+json"]
    ),
    mode=st.sampled_from(["binary", "structured", "batch"]),
    retain=st.booleans(),
    duplicate=st.booleans(),
    payload_format_indicator=st.integers(0, 1),
    message_expiry_interval=st.none() | st.integers(0, 1000),
    sniff=st.booleans(),
    given_id=text.filter(bool),
)
def test_the_fast_encoding_says_what_the_event_says(
    topic: str, payload: bytes, sniff: bool, given_id: str, mode: Mode, **more: object
) -> None:
    both = mapper(f"mode: {mode}", sniff=sniff)
    published = message(payload, topic, **more)
    event_id = given_id if published.user_properties else "minted"
    for _ in range(2):  # rendered, and from memory
        try:
            event = both.event(published, event_id, NOW)
        except MalformedEvent:
            with pytest.raises(MalformedEvent):
                both.encode(published, event_id, NOW)
            return
        head, body = both.encode(published, event_id, NOW)
        said, body_said = encoded(event, mode)
        assert sorted(head.split(b"\r\n")) == sorted(said.split(b"\r\n"))
        if head.startswith(b"Content-Type: application/cloudevents"):
            body, body_said = (each.strip(b"[]") for each in (body, body_said))
            assert from_json(body) == from_json(body_said)
            assert len(body) == len(body_said)
        else:
            assert body == body_said


def test_minted_ids_look_like_uuids_and_differ_between_sources() -> None:
    one, other = minted_ids(), minted_ids()
    ids = [one() for _ in range(1000)] + [other() for _ in range(1000)]
    assert len(set(ids)) == 2000
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", each) for each in ids)


def test_of_several_ids_the_last_one_counts() -> None:
    assert publisher_id([("id", "1"), ("x", "y"), ("id", "2")]) == "2"
    assert publisher_id([("id", "")]) is None


@given(st.floats(0, 4e9))
def test_the_clock_says_what_datetime_says(seconds: float) -> None:
    value = Clock().text(seconds)
    assert is_timestamp(value)
    assert value.endswith("Z")


@pytest.mark.parametrize("more", [{"topic": "a/" + "é" * 30_000}, {"content_type": "x" * 60_000}])
def test_a_head_of_a_64_kib_topic_or_content_type_is_not_remembered(more: dict[str, Any]) -> None:
    rules = mapper()
    rules.encode(message(**more), "1", 0.0)
    rules.encode(message(), "1", 0.0)
    assert [topic for topic, *_ in rules._rendered] == ["a/b"]
