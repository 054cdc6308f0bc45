"""Templates over topic levels: rendered as written, refused when a topic could break them."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from weir.adaptor.templates import Content, Template, TemplateError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("{topic}", "site/oven/temperature"),
        ("io.{level[0]}.{level[2]}", "io.site.temperature"),
        ("{level[-1]}", "temperature"),
        ("{level[-3]}", "site"),
        ("mqtt://{broker}/{level[1]}", "mqtt://broker:1883/oven"),
        ("{{{level[1]}}}", "{oven}"),
        ("{{topic}}", "{topic}"),
    ],
)
def test_a_template_renders(text: str, expected: str) -> None:
    template = Template.parse(text, fewest_levels=3)
    assert template.render("site/oven/temperature", "broker:1883") == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{level[3]}", "the filter guarantees 3 levels"),
        ("{level[-4]}", "the filter guarantees 3 levels"),
        ("{levels[0]}", "unknown name `{levels[0]}`"),
        ("{}", "unknown name `{}`"),
        ("{level[x]}", "unknown name"),
        ("{topic", "a lone `{`"),
        ("topic}", "a lone `}`"),
    ],
)
def test_a_template_that_can_fail_is_refused_at_load(text: str, why: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(why)):
        Template.parse(text, fewest_levels=3)


def test_topic_levels_are_made_safe_for_a_source() -> None:
    template = Template.parse("mqtt://plant/{level[1]}#x", fewest_levels=2)
    assert template.render("a/oven 1?ü", "b", uri=True) == "mqtt://plant/oven%201%3F%C3%BC#x"


@given(st.text(max_size=20))
def test_text_with_doubled_braces_renders_to_itself(text: str) -> None:
    template = Template.parse(text.replace("{", "{{").replace("}", "}}"), fewest_levels=1)
    assert template.render("topic", "broker") == text


names = st.sampled_from(["{topic}", "{broker}", "{level[0]}", "{level[-1]}", "{level[1]}", "-"])


@given(st.lists(names, max_size=6), st.lists(st.text("ab", max_size=3), min_size=1, max_size=4))
def test_what_was_accepted_at_load_never_fails_later(parts: list[str], levels: list[str]) -> None:
    assume(any(levels))
    try:
        template = Template.parse("".join(parts), fewest_levels=len(levels))
    except TemplateError:
        assert "{level[1]}" in parts
        assert len(levels) == 1
        return
    topic = "/".join(levels)
    table = {"{topic}": topic, "{broker}": "b", "{level[0]}": levels[0], "-": "-"}
    table |= {"{level[-1]}": levels[-1], "{level[1]}": levels[min(1, len(levels) - 1)]}
    assert template.render(topic, "b") == "".join(table[part] for part in parts)


# --- what a message brings with it ----------------------------------------------------------------


def rendered(text: str, payload: bytes = b"", **user: str) -> str | None:
    template = Template.parse(text, fewest_levels=1)
    assert template.dynamic
    return template.render("t", "b", Content(list(user.items()), payload))


def test_a_user_property_is_taken_and_of_several_the_last() -> None:
    assert rendered("<{user[unit]}>", unit="K") == "<K>"
    pairs = [("a", "1"), ("a", "2")]
    assert Template.parse("{user[a]}", fewest_levels=1).render("t", "b", Content(pairs, b"")) == "2"


@pytest.mark.parametrize(
    ("pointer", "value"),
    [
        ("/a/0/b", "deep"),
        ("/n", "7"),
        ("/f", "21.5"),
        ("/yes", "true"),
        ("/s~1t", "slash"),
        ("/til~0de", "tilde"),
        ("/", "empty name"),
        ("/null", None),
        ("/a", None),
        ("/a/1", None),
        ("/a/-1", None),
        ("/a/00", None),
        ("/n/x", None),
        ("/nothing", None),
        ("", None),
    ],
)
def test_a_json_pointer_finds_what_rfc_6901_says(pointer: str, value: str | None) -> None:
    payload = (
        b'{"a": [{"b": "deep"}], "n": 7, "f": 21.5, "yes": true, "s/t": "slash",'
        b' "til~de": "tilde", "": "empty name", "null": null}'
    )
    assert rendered(f"{{json[{pointer}]}}", payload) == value
    assert rendered(f"{{json[{pointer}]|else}}", payload) == (value or "else")


@pytest.mark.parametrize("payload", [b"", b"{", b"\xff", b"[" * 100_000, b"5"])
def test_a_payload_that_is_no_object_has_no_values(payload: bytes) -> None:
    assert rendered("{json[/a]}", payload) is None
    assert rendered("{json[/a]|x}", payload) == "x"


def test_one_missing_piece_makes_the_whole_value_missing() -> None:
    assert rendered("a {user[x]} b {user[y]}", x="1") is None
    assert rendered("a {user[x]} b {user[y]|2}", x="1") == "a 1 b 2"


def test_what_must_have_a_value_needs_a_default() -> None:
    with pytest.raises(TemplateError, match=r"\{json\[/a\]\|unknown\}"):
        Template.parse("{json[/a]}", fewest_levels=1, always=True)
    Template.parse("{json[/a]|x}", fewest_levels=1, always=True)


@given(st.binary(max_size=50), st.text(max_size=20))
def test_no_payload_and_no_pointer_makes_rendering_fail(payload: bytes, pointer: str) -> None:
    try:
        template = Template.parse(f"{{json[/{pointer}]|d}}", fewest_levels=1)
    except TemplateError:
        return
    assert template.render("t", "b", Content([], payload), uri=True) is not None
