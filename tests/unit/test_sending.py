"""The fields of a route that say how its events look, and where replies go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mqtt5 import PublishPacket

from weir.adaptor.replies import NoTopic, topic_of
from weir.adaptor.routes import RoutesError, parse
from weir.adaptor.sending import Batch, Sending
from weir.adaptor.topics import TopicFilter


def one(more: str) -> str:
    return f"routes: [{{filter: a/+, sink: function, {more}}}]"


def test_unless_told_otherwise_events_go_in_binary_mode_and_ask_for_no_reply() -> None:
    (route,) = parse(one("qos: 1"))
    assert route.sending == Sending("binary", None, None, "spec")


def test_a_batch_has_limits_of_number_size_and_age() -> None:
    (given,) = parse(one("mode: batch, batch: {events: 7, bytes: 1000, age: PT1.5S}"))
    assert given.sending.batch == Batch(7, 1000, 1.5)
    (default,) = parse(one("mode: batch"))
    assert default.sending.batch == Batch()


def test_a_reply_is_welcome_where_the_message_or_the_route_names_a_topic() -> None:
    (asked,) = parse(one("reply: true"))
    (always,) = parse(one("reply: {topic: 'done/{level[1]}', allow: 'replies/#'}, dialect: sdk-go"))
    (never,) = parse(one("reply: false"))
    assert asked.sending.reply is not None and always.sending.reply is not None
    assert [asked.sending.reply.welcome(each) for each in (None, "", "r/1")] == [False, False, True]
    assert [always.sending.reply.welcome(each) for each in (None, "r/1")] == [True, True]
    assert always.sending.reply.allow.matches("replies/1")
    assert not always.sending.reply.allow.matches("other")
    assert always.sending.dialect == "sdk-go"
    assert never.sending.reply is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("mode: batched", ["field `mode`", "binary, structured, batch"]),
        ("batch: {events: 5}", ["field `batch`", "the mode is binary"]),
        ("mode: batch, batch: 5", ["field `batch`", "events, bytes, age"]),
        ("mode: batch, batch: {count: 5}", ["field `batch.count`", "unknown"]),
        ("mode: batch, batch: {events: 0}", ["field `batch.events`", "from 1"]),
        ("mode: batch, batch: {age: PT61S}", ["field `batch.age`", "at most PT60S"]),
        ("mode: batch, batch: {age: 1}", ["field `batch.age`", "text"]),
        ("mode: batch, concurrency: 1", ["field `concurrency`", "remove it"]),
        ("mode: batch, reply: true", ["field `reply`", "no reply"]),
        ("reply: sometimes", ["field `reply`", "or true"]),
        ("reply: {to: x}", ["field `reply.to`", "unknown"]),
        ("reply: {topic: 'a/x'}", ["field `reply.topic`", "in a circle"]),
        ("reply: {topic: 'd/#'}", ["field `reply.topic`", "without wildcards"]),
        ("reply: {topic: '{user[x]}'}", ["field `reply.topic`", "default"]),
        ("reply: {allow: 'a/#/b'}", ["field `reply.allow`", "last level"]),
        ("reply: {allow: '$share/g/a'}", ["field `reply.allow`", "$share/GROUP/"]),
        ("dialect: go", ["field `dialect`", "spec, sdk-go"]),
        ("sniff: 1", ["field `sniff`", "true or false"]),
    ],
)
def test_an_error_says_where_and_what_to_do(text: str, parts: list[str]) -> None:
    with pytest.raises(RoutesError) as caught:
        parse(one(text), "my-routes.yaml")
    for part in ["my-routes.yaml:1: route 1 (a/+)", *parts]:
        assert part in str(caught.value)


topics = st.text(st.sampled_from("ab/+#$\0é"), max_size=6)


@settings(deadline=None)
@given(asked=st.none() | topics, allowed=st.sampled_from(["#", "a/#", "b/+", "$a"]), topic=topics)
def test_a_reply_goes_where_it_may_or_nowhere(asked: str | None, allowed: str, topic: str) -> None:
    text = f"reply: {{topic: 'a/{{topic}}', allow: '{allowed}'}}"
    (route,) = parse(f"routes: [{{filter: 'a/b/#', sink: function, {text}}}]")
    message = SimpleNamespace(
        topic=topic, response_topic=asked, user_properties=[], payload=b"", correlation_data=None
    )
    try:
        where = topic_of(route, cast(PublishPacket, message), "broker:1883")
    except NoTopic as error:
        assert str(error)
        return
    assert where and not any(each in where for each in "+#\0") and not where.startswith("$")
    assert not route.filter.matches(where)
    assert where == f"a/{topic}" if not asked else TopicFilter.parse(allowed).matches(where)
