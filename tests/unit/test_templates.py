"""Templates over topic levels: rendered as written, refused when a topic could break them."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from weir.adaptor.templates import Template, TemplateError


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
