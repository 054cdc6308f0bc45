"""The routes file: every error names the file, the route, the field and the way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from weir.adaptor.retry import Delivery
from weir.adaptor.routes import RoutesError, load, parse

FULL = """
routes:
  - name: temperatures
    filter: plant/+/temperature
    sink: function
    qos: 0
    type: io.example.{level[2]}
    source: mqtt://plant/{level[1]}
    subject: "{level[1]}"
    datacontenttype: application/json
    delivery: {retry: 7, backoffPolicy: linear, backoffDelay: PT1.5S, timeout: PT1M}
    onFailure: drop
  - filter: $share/group/other/#
    sink: http://127.0.0.1:8080/events?x=1
"""


def test_a_full_route_and_one_with_defaults() -> None:
    full, plain = parse(FULL)
    assert (full.name, full.sink, full.qos, full.on_failure) == (
        "temperatures",
        "function",
        0,
        "drop",
    )
    assert full.type.render("plant/oven/temperature", "b") == "io.example.temperature"
    assert full.datacontenttype == "application/json"
    assert full.delivery == Delivery(retry=7, policy="linear", delay=1.5, timeout=60.0)
    assert (plain.name, plain.qos, plain.on_failure) == ("$share/group/other/#", 1, "quarantine")
    assert plain.type.render("other", "b") == "weir.mqtt.message"
    assert plain.source.render("other", "b:1883") == "mqtt://b:1883"
    assert plain.subject.render("other/x", "b") == "other/x"
    assert plain.delivery == Delivery()


def one(fields: str) -> str:
    return "routes: [{filter: a/+, sink: function, " + fields + "}]"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (one("onfailure: drop"), ["field `onfailure`", "unknown", "onFailure"]),
        (one("onFailure: deadLetter"), ["field `onFailure`", "needs a `deadLetterSink`"]),
        (one("deadLetterSink: x"), ["field `deadLetterSink`", "nor a URL"]),
        (one("deadLetterSink: function"), ["field `deadLetterSink`", "write a URL"]),
        (one("deadLetterSink: 'http://d', onFailure: drop"), ["field `onFailure`", "remove one"]),
        (one("broker: plant"), ["field `broker`", "not among `brokers`"]),
        (
            "brokers: {b: http://h}\nroutes: [{filter: a, sink: function, broker: b}]",
            ["field `brokers.b`", "mqtt://host:port"],
        ),
        (
            "brokers: {b: {url: mqtt://h, caFile: x}}\nroutes: [{filter: a, sink: function}]",
            ["field `brokers.b.url`", "write mqtts://"],
        ),
        (
            "brokers: {b: {url: mqtts://h, ca: x}}\nroutes: [{filter: a, sink: function}]",
            ["field `brokers.b.ca`", "unknown", "caFile"],
        ),
        (
            "brokers: {b: {url: mqtts://h, alpn: x}}\nroutes: [{filter: a, sink: function}]",
            ["field `brokers.b.alpn`", "list"],
        ),
        (one("deadLetterSink: {topic: 'a/x'}"), ["`deadLetterSink.topic`", "in a circle"]),
        (one("deadLetterSink: {topic: 'd/#'}"), ["`deadLetterSink.topic`", "without wildcards"]),
        (
            one("deadLetterSink: {topic: '{user[x]}'}"),
            ["`deadLetterSink.topic`", "message's topic"],
        ),
        (one("deadLetterSink: {topic: d, uri: x}"), ["`deadLetterSink.uri`", "unknown"]),
        (
            "routes: [{filter: a, sink: {uri: 'http://h', tokenFile: t}}]",
            ["field `sink.uri`", "for https sinks"],
        ),
        ("routes: [{filter: a, sink: {url: 'http://h'}}]", ["`sink.url`", "uri, caFile"]),
        (
            "routes: [{filter: a, sink: {uri: 'https://h', tokenFile: t}}, "
            "{filter: b, sink: 'https://h'}]",
            ["route 2 (b)", "field `sink`", "say the same"],
        ),
        (one("onFailure: retry"), ["field `onFailure`", "deadLetter, quarantine, block, drop"]),
        (one("ordered: 3"), ["field `ordered`", "quote it"]),
        (one("ordered: '{level[7]}'"), ["field `ordered`", "level"]),
        (one("spool: sometimes"), ["field `spool`", "always"]),
        (one("spool: {size: 1}"), ["field `spool.size`", "from 65536"]),
        (one("spool: {age: PT0S}"), ["field `spool.age`", "shorter"]),
        (one("spool: {bytes: 1}"), ["field `spool.bytes`", "size"]),
        (one("qos: 2"), ["field `qos`", "use 1"]),
        (one("qos: '1'"), ["field `qos`", "whole number"]),
        (one("qos: true"), ["field `qos`", "whole number"]),
        (one("type: '{level[2]}'"), ["field `type`", "guarantees 2 levels"]),
        (one("source: '{nope}'"), ["field `source`", "unknown name"]),
        (one("subject: 5"), ["field `subject`", "must be a text"]),
        (one("datacontenttype: json"), ["field `datacontenttype`", "media type"]),
        (one("datacontenttype: application/cloudevents+json"), ["`datacontenttype`", "leave it"]),
        (one("delivery: 5"), ["field `delivery`", "mapping"]),
        (one("delivery: {retries: 5}"), ["field `delivery.retries`", "unknown", "retry"]),
        (one("delivery: {retry: -1}"), ["field `delivery.retry`", "whole number"]),
        (one("delivery: {backoffPolicy: fast}"), ["field `delivery.backoffPolicy`", "linear"]),
        (one("delivery: {backoffDelay: 5s}"), ["field `delivery.backoffDelay`", "PT0.2S"]),
        (one("delivery: {backoffDelay: 5}"), ["field `delivery.backoffDelay`", "text"]),
        (one("delivery: {timeout: PT0S}"), ["field `delivery.timeout`", "longer"]),
        (one("delivery: {retryAfterMax: 1}"), ["field `delivery.retryAfterMax`", "text"]),
        ("routes: [{filter: a/b#, sink: function}]", ["field `filter`", "whole level"]),
        ("routes: [{sink: function}]", ["route 1", "field `filter`", "missing"]),
        ("routes: [{filter: a}]", ["route 1 (a)", "field `sink`", "missing"]),
        ("routes: [{filter: a, sink: 'x:80'}]", ["field `sink`", "http://host:8080/path"]),
        ("routes: [{filter: a, sink: 'http://'}]", ["field `sink`", "http://host"]),
        ("routes: [{filter: a, sink: 'http://h/a b'}]", ["field `sink`", "percent-encode"]),
        ("routes: [{filter: a, sink: 'http://u:p@h/'}]", ["field `sink`", "no user"]),
        ("routes: [{filter: a, sink: 'http://h:99999/'}]", ["field `sink`"]),
        ("routes: [{filter: a, sink: function}, {filter: a, sink: function}]", ["route 2", "name"]),
        ("routes: [{filter: a, filter: b, sink: function}]", ["`filter` stands twice"]),
        ("routes: [5]", ["route 1", "mapping"]),
        ("routes: []", ["at least one route"]),
        ("routes: {}", ["at least one route"]),
        (one("onfailure: drop"), ["did you mean `onFailure`?"]),
        (one("id: '{level[2]}'"), ["field `id`", "guarantees 2 levels"]),
        (one("type: '{json[/a]}'"), ["field `type`", "{json[/a]|unknown}"]),
        (one("source: '{user[a]}'"), ["field `source`", "may be missing"]),
        (one("extensions: 5"), ["field `extensions`", "mapping"]),
        (one("extensions: {Unit: x}"), ["field `extensions.Unit`", "lower-case"]),
        (one("extensions: {id: x}"), ["field `extensions.id`", "field `id`"]),
        (one("extensions: {mqttqos: x}"), ["field `extensions.mqttqos`", "how the message came"]),
        (one("extensions: {unit: 5}"), ["field `extensions.unit`", "text"]),
        (one("extensions: {unit: '{json[/~]}'}"), ["field `extensions.unit`", "~0"]),
        (one("retained: maybe"), ["field `retained`", "new, always, never"]),
        (one("concurrency: 0"), ["field `concurrency`", "from 1 to 64"]),
        (one("rate: 0"), ["field `rate`", "number"]),
        (one("rate: true"), ["field `rate`", "number"]),
        (
            "routes: [{name: x, filter: a, sink: function}, "
            "{name: y, filter: a, sink: function, retained: never}]",
            ["route 2 (y)", "field `retained`", "says `new`", "say the same"],
        ),
        ("version: 2\nroutes: [{filter: a, sink: function}]", ["field `version`", "reads 1"]),
        ("routes: [{filter: a, sink: function}]\nroute: 5", ["field `route`", "`routes`?"]),
        ("route: []", ["one key, `routes`"]),
        ("", ["one key, `routes`"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_an_error_says_where_and_what_to_do(text: str, parts: list[str]) -> None:
    with pytest.raises(RoutesError) as caught:
        parse(text, "my-routes.yaml")
    for part in ["my-routes.yaml", *parts]:
        assert part in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    with pytest.raises(RoutesError, match=re.escape(str(missing))):
        load(missing)


def test_a_file_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(FULL)
    assert len(load(path)) == 2


def test_everything_that_is_wrong_is_said_at_once_each_with_its_line() -> None:
    text = """
version: 1
routes:
  - filter: a/b#
    sink: function
  - name: second
    filter: a/+
    sink: function
    delivery:
      retry: many
      timeout: 5
    extensions:
      unit: ok
      Unit: x
  - filter: fine
    sink: function
"""
    with pytest.raises(RoutesError) as caught:
        parse(text, "f.yaml")
    said = str(caught.value).splitlines()
    places = [line.partition(": ")[0] for line in said]
    assert places == ["f.yaml:4", "f.yaml:10", "f.yaml:11", "f.yaml:14"]


def test_json_is_read_as_well() -> None:
    (route,) = parse('{"version": 1, "routes": [{"filter": "a/#", "sink": "function"}]}')
    assert route.filter.text == "a/#"


@pytest.mark.parametrize("text", ["a: &x {b: *x}", "[" * 2000, "? [a]\n: 1", "\0", "1: 2", "- - -"])
def test_strange_documents_are_refused_in_words(text: str) -> None:
    with pytest.raises(RoutesError, match=r"^f\.yaml:"):
        parse(text, "f.yaml")


def test_new_fields_and_their_defaults() -> None:
    text = (
        "version: 1\nroutes: [{filter: a/+, sink: function, id: '{json[/n]}', time: '{user[at]}', "
        "extensions: {unit: '{json[/u]|K}'}, retained: never, concurrency: 2, rate: 0.5}, "
        "{filter: b, sink: function}]"
    )
    full, plain = parse(text)
    assert full.id is not None and full.time is not None
    assert full.extensions["unit"].text == "{json[/u]|K}"
    assert (full.retained, full.concurrency, full.rate) == ("never", 2, 0.5)
    assert (plain.retained, plain.concurrency, plain.rate, plain.id) == ("new", None, None, None)
    assert not plain.extensions
