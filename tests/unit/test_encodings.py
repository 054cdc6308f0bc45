"""Every encoding of an event, there and back, and what strangers may send in its place."""

from __future__ import annotations

import json
import re
from typing import Any

import mqtt5
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weir.adaptor.events import Event, MalformedEvent, http_headers
from weir.adaptor.httpbinding import (
    Headers,
    Mode,
    encoded,
    events_from_http,
    from_http,
    mode_of,
)
from weir.adaptor.jsonformat import LARGEST, batch_from_json, from_json, to_batch, to_json
from weir.adaptor.mapping import Mapper, publisher_id
from weir.adaptor.mqttbinding import Dialect, Uncarried, properties, published
from weir.adaptor.routes import parse
from weir.adaptor.templates import LARGEST_DOCUMENT, Content

SPEC = {"specversion": "1.0", "id": "7", "source": "/s", "type": "t"}
text = st.text(st.characters(exclude_categories=["Cs"]))
names = st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True).filter(
    lambda name: name not in ("data", "datacontenttype", "specversion")
)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
json_data = json_values.map(lambda value: json.dumps(value).encode())
data_of: dict[str | None, st.SearchStrategy[bytes]] = {
    None: st.binary(),
    "application/octet-stream": st.binary(),
    "text/plain": text.map(str.encode),
    "text/plain; charset=latin-1": st.binary(),
    "application/json": json_data,
    "application/vnd.x+json; charset=utf-8": json_data,
    "image/png": st.binary(),
}


@st.composite
def events(draw: st.DrawFn) -> Event:
    required = {name: draw(text.filter(bool)) for name in ("id", "source", "type")}
    more = draw(st.dictionaries(names, text.filter(bool), max_size=5))
    content_type = draw(st.sampled_from(list(data_of)))
    data = draw(data_of[content_type] | st.binary())
    return Event({"specversion": "1.0", **more, **required}, data, content_type)


def lines(head: bytes) -> Headers:
    """Header lines as a server reads them."""
    assert head.endswith(b"\r\n")
    pairs = [line.split(b": ", 1) for line in head[:-2].split(b"\r\n")]
    return [(name.lower(), value) for name, value in pairs]


def same(one: Event, other: Event) -> bool:
    """Outer white space of JSON is no part of its value."""
    return (
        dict(one.attributes) == dict(other.attributes)
        and one.content_type == other.content_type
        and (one.data == other.data or one.data.strip(b" \t\r\n") == other.data)
    )


# --- there and back -------------------------------------------------------------------------------


@settings(deadline=None)
@given(events())
def test_binary_mode_of_http(event: Event) -> None:
    head, body = encoded(event, "binary")
    assert mode_of(lines(head)) == "binary"
    assert from_http(lines(head), body) == event


@settings(deadline=None)
@given(events())
def test_structured_mode_of_http(event: Event) -> None:
    head, body = encoded(event, "structured")
    assert mode_of(lines(head)) == "structured"
    json.loads(body)
    assert same(event, from_http(lines(head), body))


@settings(deadline=None)
@given(st.lists(events(), max_size=5))
def test_batches(some: list[Event]) -> None:
    body = to_batch([to_json(each) for each in some])
    head = (
        encoded(some[0], "batch")[0]
        if some
        else b"Content-Type: application/cloudevents-batch+json\r\n"
    )
    found = events_from_http(lines(head), body)
    assert len(found) == len(json.loads(body)) == len(some)
    assert all(same(one, other) for one, other in zip(some, found, strict=True))


@settings(deadline=None)
@given(events(), st.sampled_from(["spec", "sdk-go"]))
def test_binary_mode_of_mqtt_in_both_dialects(event: Event, dialect: Dialect) -> None:
    try:
        content_type, pairs, payload = properties(event, dialect)
    except Uncarried:
        assert any("\0" in value for value in event.attributes.values())
        return
    packet = mqtt5.PublishPacket(
        *("a/b", payload), content_type=content_type, user_properties=pairs
    )
    wire = packet.write()
    read, _ = mqtt5.read(memoryview(wire))
    assert isinstance(read, mqtt5.PublishPacket)
    assert published(read, sniff=False) == event


@settings(deadline=None)
@given(events())
def test_structured_mode_of_mqtt(event: Event) -> None:
    body = to_json(event)
    declared = mqtt5.PublishPacket("a/b", body, content_type="application/cloudevents+json")
    undeclared = mqtt5.PublishPacket("a/b", body)
    for message, sniff in ((declared, False), (undeclared, True)):
        found = published(message, sniff=sniff)
        assert found is not None and same(event, found)
    assert published(undeclared, sniff=False) is None


@settings(deadline=None)
@given(json_values.map(lambda value: json.dumps(value, ensure_ascii=False)))
@example('{"b": 1.10, "a": 12345678901234567890123, "b": "\\u00fc", "c": 1e400}')
@example("[1E+2, -0.0, 0.1000000000000000055511151231257827]")
def test_json_data_passes_as_it_is_written(data: str) -> None:
    event = Event(
        {"specversion": "1.0", "id": "1", "source": "/", "type": "t"},
        data.encode(),
        "application/json",
    )
    assert f'"data":{data}' in to_json(event).decode()
    assert from_json(to_json(event)).data == event.data


@pytest.mark.parametrize(
    "data", [b"NaN", b"[Infinity]", b"{", b"", b"\xff", b"'x'", b"\xef\xbb\xbf1"]
)
def test_what_is_no_json_is_never_passed_off_as_such(data: bytes) -> None:
    event = Event(
        {"specversion": "1.0", "id": "1", "source": "/", "type": "t"}, data, "application/json"
    )
    assert "data" not in json.loads(to_json(event))
    assert from_json(to_json(event)) == event


# --- strangers ------------------------------------------------------------------------------------

hostile = text | st.sampled_from(  # what the codec lets through
    ["a\r\nce-id: x", "x" * 300, "%C0%A0", '"', "\x7f", "\u2028", "ü" * 300]
)
topics = hostile.map(lambda topic: re.sub("[+#\0]", "", topic) or "/")
pairs_of = st.lists(
    st.tuples(
        st.sampled_from(
            ["specversion", "id", "source", "type", "time", "data", "datacontenttype", "x", "X-y",
             "ce-specversion", "ce-id", "ce-source", "ce-type", "ce-data", "Content-Type",
             "content-type", "traceparent"]
        )
        | hostile,
        hostile | st.sampled_from(["1.0", "0.3", "application/cloudevents+json", "text/plain"]),
    ),
    max_size=8,
)  # fmt: skip
ROUTES = {
    mode: parse(f"routes: [{{filter: '#', sink: function, mode: {mode}, type: 't{{topic}}'}}]")[0]
    for mode in ("binary", "structured", "batch")
}


@settings(deadline=None)
@given(
    topic=topics,
    payload=st.binary(max_size=40) | json_data,
    pairs=pairs_of,
    content_type=st.none() | hostile | st.sampled_from(["application/cloudevents+json"]),
    mode=st.sampled_from(list(ROUTES)),
    sniff=st.booleans(),
)
def test_no_message_breaks_out_of_its_header_line_or_its_json(
    topic: str,
    payload: bytes,
    pairs: list[tuple[str, str]],
    content_type: str | None,
    mode: Mode,
    sniff: bool,
) -> None:
    mapper = Mapper(ROUTES[mode], "broker:1883")
    mapper.sniff = sniff
    message = mqtt5.PublishPacket(topic, payload, content_type=content_type, user_properties=pairs)
    event_id = publisher_id(pairs) or "minted"
    try:
        head, body = mapper.encode(message, event_id, 0.0)
    except MalformedEvent as error:
        assert str(error).startswith("on the topic `")
        assert str(error).isprintable() and len(str(error)) < 3000
        head, body = mapper.encode_plain(message, event_id, 0.0)
    assert re.fullmatch(rb"(?:[A-Za-z0-9-]+: [!-~ \t]*\r\n)+", head)
    if mode == "binary":
        found = from_http(lines(head), body)
    elif mode == "structured":
        found = from_json(body)
    else:
        (found,) = batch_from_json(body)
    assert found.attributes["id"]
    assert "data" not in found.attributes


@pytest.mark.parametrize("mode", list(ROUTES))
@pytest.mark.parametrize("character", ["x", "ü", " ", "\n"])
def test_texts_as_long_as_mqtt_has_them_pass_whole(mode: Mode, character: str) -> None:
    long = character * (65_535 // len(character.encode()))
    pairs = [*SPEC.items(), ("x", long), ("y" * 60_000, "z")]
    message = mqtt5.PublishPacket(f"a/{long[3:]}", b"", user_properties=pairs)
    head, body = Mapper(ROUTES[mode], "broker:1883").encode(message, "minted", 0.0)
    (found,) = events_from_http(lines(head), body)
    assert found.attributes["x"] == long
    assert found.attributes["mqtttopic"] == message.topic


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=30), st.binary(max_size=30)), max_size=6), st.binary())
def test_any_request_is_an_event_or_is_refused_in_words(headers: Headers, body: bytes) -> None:
    ours = [(b"ce-" + name, value) for name, value in headers] + [(b"ce-specversion", b"1.0")]
    for given_headers in (headers, ours, [(b"content-type", b"application/cloudevents+json")]):
        try:
            event = from_http(given_headers, body)
        except MalformedEvent as error:
            assert str(error)
        else:
            http_headers(event)
            to_json(event)


fragments = st.lists(
    st.sampled_from(
        ['{', '}', '[', ']', ',', ':', '"', '"id"', '"data"', '"data_base64"', '1', 'null', ' ',
         '"specversion"', '"1.0"', '\\', '\\ud800', 'NaN', '\n', 'ü', '"source"', '"type"']
    ),
    max_size=30,
).map("".join)  # fmt: skip


@settings(deadline=None)
@given(fragments.map(str.encode) | st.binary(max_size=60))
@example(b'[{"specversion": "1.0"}, 5]')
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"[1")
@example(b"[{}")
@example(b"[{},")
@example(b'{"specversion":"1.0","id":"1","source":"s","type":"t","n":' + b"9" * 5000 + b"}")
def test_any_bytes_are_an_event_or_refused_in_words(payload: bytes) -> None:
    for read in (from_json, batch_from_json):
        try:
            read(payload)
        except MalformedEvent as error:
            assert str(error)
        else:
            json.loads(payload.decode("utf-8-sig"))


def test_json_too_large_to_be_looked_into_is_refused_or_passes_in_base64() -> None:
    large = b"[" + b"[]," * (LARGEST // 3) + b"[]]"
    event = Event(SPEC, large, "application/json")
    body = to_json(event)
    assert b"data_base64" in body
    for read in (from_json, batch_from_json):
        with pytest.raises(MalformedEvent, match=f"at most {LARGEST} bytes"):
            read(body)
    assert from_json(to_json(Event(SPEC, b"[]", "application/json"))).data == b"[]"
    assert Content([], b'{"a": 1}' + b" " * LARGEST_DOCUMENT).document is Content([], b"?").document


GOOD = '"specversion": "1.0", "id": "1", "source": "/s", "type": "t"'


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (f'{{{GOOD}, "id": "2"}}', "`id` stands twice"),
        (f'{{{GOOD}, "x": "\\ud800"}}', "the attribute `x` is no text"),
        (f'{{{GOOD}, "data": "\\ud800", "datacontenttype": "text/plain"}}', "data is no text"),
        (f'{{{GOOD}, "x": 1.5}}', "the attribute `x` is neither"),
        (f'{{{GOOD}, "x": {{}}}}', "the attribute `x` is neither"),
        (f'{{{GOOD}, "datacontenttype": 5}}', "datacontenttype `5`"),
        (f'{{{GOOD}, "data": NaN}}', "NaN is no JSON"),
        (f"{{{GOOD}}} x", "Extra data"),
        (f'{{{GOOD}, "{"ü" * 5000}": 1}}', "no attribute name"),
        ("[]", "not a JSON object"),
    ],
)
def test_a_refusal_names_the_member(payload: str, said: str) -> None:
    with pytest.raises(MalformedEvent) as caught:
        from_json(payload.encode())
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (f'[{{{GOOD}}}, {{"id": "2"}}]', "event 2 of the batch: the attribute `specversion`"),
        (f"[{{{GOOD}}}, 5]", "event 2 of the batch"),
        (f"[{{{GOOD}}}", "not JSON"),
        (f"{{{GOOD}}}", "not a JSON array"),
    ],
)
def test_a_refused_batch_names_the_event(payload: str, said: str) -> None:
    with pytest.raises(MalformedEvent) as caught:
        batch_from_json(payload.encode())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [("x" * 65_536, "65536 bytes"), ("ü" * 32_768, "65536 bytes"), ("\0", "null character"),
     ("\ud800", "surrogate")],
)  # fmt: skip
def test_what_mqtt_cannot_carry_is_named(value: str, said: str) -> None:
    event = Event({"specversion": "1.0", "id": "1", "source": "/", "type": "t", "x": value}, b"")
    for dialect in ("spec", "sdk-go"):
        with pytest.raises(Uncarried, match=r"the attribute `(ce-)?x`") as caught:
            properties(event, dialect)
        assert said in str(caught.value)


# --- dialects -------------------------------------------------------------------------------------


def message(
    pairs: list[tuple[str, str]], content_type: str | None = None, payload: bytes = b"x"
) -> mqtt5.PublishPacket:
    return mqtt5.PublishPacket("a", payload, content_type=content_type, user_properties=pairs)


def test_of_a_property_that_repeats_the_last_one_wins() -> None:
    found = published(message([*SPEC.items(), ("id", "8")]), sniff=False)
    assert found is not None and found.attributes["id"] == "8"


def test_older_sdk_go_declares_structured_mode_in_a_user_property() -> None:
    body = json.dumps(SPEC | {"data": 5}).encode()
    pairs = [("Content-Type", "application/cloudevents+json")]
    found = published(message(pairs, payload=body), sniff=False)
    assert found is not None and (found.attributes, found.data) == (SPEC, b"5")


def test_a_content_type_property_of_a_plain_message_means_nothing() -> None:
    assert published(message([("Content-Type", "text/csv")]), sniff=False) is None


def test_data_is_no_attribute() -> None:
    found = published(message([*SPEC.items(), ("data", "x"), ("Shift", "y")]), sniff=False)
    assert found is not None and found.attributes == SPEC


@pytest.mark.parametrize(
    "content_type",
    [
        "application/cloudevents+json",
        "Application/CloudEvents-Batch+JSON",
        "application/cloudevents+avro",
    ],
)
def test_data_that_is_an_event_itself_does_not_take_its_envelopes_place(content_type: str) -> None:
    event = Event({**SPEC, "x": "y"}, b"\x00{", content_type)
    head, body = encoded(event, "binary")
    assert from_http(lines(head), body) == event
    for dialect in ("spec", "sdk-go"):
        declared, pairs, payload = properties(event, dialect)
        assert published(message(pairs, declared, payload), sniff=False) == event
