"""Templates that nobody would write and messages that nobody would send, through a whole route."""

from __future__ import annotations

import json

import mqtt5
from hypothesis import given
from hypothesis import strategies as st

from weir.adaptor.mapping import Mapper
from weir.adaptor.routes import Route, RoutesError, parse
from weir.adaptor.templates import Content, Template, TemplateError

pieces = st.one_of(
    st.sampled_from(
        [
            *("{topic}", "{broker}", "{level[0]}", "{level[-2]}", "{user[x]}", "{user[x]|y}"),
            *("{json[]}", "{json[/a/0]|}", "{json[/~1~0]|d}", "{{", "}}", "{", "}", "|", "[", "]"),
        ]
    ),
    st.text(max_size=4),
)
texts = st.lists(pieces, max_size=6).map("".join)
mqtt_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
topics = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/+#"), max_size=4),
    min_size=2,
    max_size=4,
).map("/".join)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | mqtt_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(mqtt_text, inner, max_size=3),
    max_leaves=6,
)
payloads = st.binary(max_size=40) | documents.map(lambda each: json.dumps(each).encode())


def parsed(text: str) -> Template | None:
    try:
        return Template.parse(text, fewest_levels=2)
    except TemplateError as error:
        assert str(error)
        return None


@given(texts, topics, st.lists(st.tuples(mqtt_text, mqtt_text), max_size=3), payloads)
def test_any_text_is_a_template_or_an_error_and_a_template_renders_any_message(
    text: str, topic: str, properties: list[tuple[str, str]], payload: bytes
) -> None:
    template = parsed(text)
    if template is None:
        return
    content = Content(properties, payload)
    value = template.render(topic, "b:1883", content)
    assert value is None or isinstance(value, str)
    assert value is not None or template.dynamic
    uri = template.render(topic, "b:1883", content, uri=True)
    assert (uri is None) == (value is None)


def route_of(**templates: str) -> Route | None:
    fields = {"filter": "+/+/#", "sink": "http://s/", **templates}
    try:
        (route,) = parse(json.dumps({"routes": [fields]}))
    except RoutesError:
        return None
    return route


@given(texts, texts, texts, topics, st.lists(st.tuples(mqtt_text, mqtt_text), max_size=3), payloads)
def test_no_template_and_no_message_makes_a_header_line_of_its_own(
    subject: str,
    type_: str,
    extension: str,
    topic: str,
    properties: list[tuple[str, str]],
    payload: bytes,
) -> None:
    templates = {"subject": subject, "type": type_, "source": "s"}
    fields = {name: text for name, text in templates.items() if text}
    route = route_of(**fields)
    if route is None:
        return
    message = mqtt5.PublishPacket(topic, payload, user_properties=properties)
    lines, body = Mapper(route, "b:1883").encode_plain(message, "id-1", 1_700_000_000.0)
    assert body == payload
    assert lines.endswith(b"\r\n") and lines.isascii()
    for line in lines.split(b"\r\n")[:-1]:
        name, colon, value = line.partition(b": ")
        assert colon and name.replace(b"-", b"").isalnum()
        assert b"\r" not in value and b"\n" not in value and b"\0" not in value
