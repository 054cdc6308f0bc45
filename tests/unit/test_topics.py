"""Topic filters, by MQTT 5 section 4.7."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.adaptor.topics import LONGEST, REMEMBERED, FilterError, TopicFilter, TopicTable

MATCHES = [
    ("a/b", "a/b", True),
    ("a/b", "a/b/c", False),
    ("a/b", "A/b", False),
    ("+", "a", True),
    ("+", "a/b", False),
    ("+/b", "/b", True),
    ("/+", "/a", True),
    ("+", "/a", False),
    ("+/+", "/a", True),
    ("a/+", "a/", True),
    ("a/+", "a", False),
    ("a/#", "a", True),
    ("a/#", "a/", True),
    ("a/#", "a/b/c", True),
    ("a/#", "ab", False),
    ("a/+/#", "a", False),
    ("a/+/#", "a/b", True),
    ("#", "a/b", True),
    ("#", "/", True),
    ("#", "$SYS/broker", False),
    ("+/broker", "$SYS/broker", False),
    ("$SYS/#", "$SYS/broker", True),
    ("$SYS/+", "$SYS/broker", True),
    ("a/#", "a/$SYS", True),
    ("$share/group/a/+", "a/b", True),
    ("$share/group/#", "$SYS/broker", False),
    ("$share/group//a", "/a", True),
    ("$shared/a", "$shared/a", True),
]


@pytest.mark.parametrize(("pattern", "topic", "expected"), MATCHES)
def test_a_filter_matches_as_the_specification_says(
    pattern: str, topic: str, expected: bool
) -> None:
    assert TopicFilter.parse(pattern).matches(topic) is expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("a/#/b", "must be the last level"),
        ("a/b#", "takes a whole level"),
        ("a/b+/c", "takes a whole level"),
        ("a/++", "takes a whole level"),
        ("a\0b", "U+0000"),
        ("x" * 65_536, "at most 65535 bytes"),
        ("$share", "write $share/GROUP/FILTER"),
        ("$share/group", "write $share/GROUP/FILTER"),
        ("$share/group/", "write $share/GROUP/FILTER"),
        ("$share//a", "write $share/GROUP/FILTER"),
        ("$share/g+/a", "must not hold"),
        ("$share/g/a/#/b", "must be the last level"),
    ],
)
def test_what_is_no_filter_is_refused_with_a_reason(text: str, why: str) -> None:
    with pytest.raises(FilterError, match=re.escape(why)):
        TopicFilter.parse(text)


level = st.text("ab$", max_size=2)
topics = st.lists(level, min_size=1, max_size=5).map("/".join).filter(bool)
filters = (
    st.tuples(st.lists(level | st.just("+"), min_size=1, max_size=5), st.booleans())
    .map(lambda drawn: "/".join([*drawn[0], *(["#"] if drawn[1] else [])]))
    .filter(lambda text: text and not text.startswith("$share"))
)


def by_regular_expression(pattern: str, topic: str) -> bool:
    """The rules once more, in another form."""
    if topic.startswith("$") and pattern[0] in "+#":
        return False
    rest = ""
    if pattern == "#":
        return True
    if pattern.endswith("/#"):
        pattern, rest = pattern[:-2], "(/.*)?"
    levels = ("[^/]*" if each == "+" else re.escape(each) for each in pattern.split("/"))
    return re.fullmatch("/".join(levels) + rest, topic, re.DOTALL) is not None


@given(filters, topics)
def test_matching_agrees_with_a_simple_reference(pattern: str, topic: str) -> None:
    assert TopicFilter.parse(pattern).matches(topic) == by_regular_expression(pattern, topic)


@given(st.lists(filters, max_size=6), st.lists(topics, max_size=20))
def test_a_table_gives_every_match_in_order_and_the_same_again(
    patterns: list[str], asked: list[str]
) -> None:
    parsed = [TopicFilter.parse(each) for each in patterns]
    table = TopicTable((each, number) for number, each in enumerate(parsed))
    for topic in [*asked, *asked]:
        expected = [number for number, each in enumerate(parsed) if each.matches(topic)]
        assert list(table.matching(topic)) == expected


@given(filters, topics)
def test_every_matching_topic_has_the_levels_that_the_filter_guarantees(
    pattern: str, topic: str
) -> None:
    parsed = TopicFilter.parse(pattern)
    if parsed.matches(topic):
        assert len(topic.split("/")) >= parsed.fewest_levels


def test_a_table_forgets_rather_than_grow_without_end() -> None:
    table = TopicTable([(TopicFilter.parse("#"), 1)])
    for number in range(REMEMBERED * 2 + 1):
        table.matching(str(number))
    assert len(table._known) <= REMEMBERED


def test_a_table_does_not_remember_topics_of_64_kib() -> None:
    table = TopicTable([(TopicFilter.parse("a/#"), 1)])
    long = "a/" + "x" * 60_000
    assert table.matching(long) == table.matching(long) == (1,)
    assert not table._known


def test_the_deepest_topics_and_filters_are_matched_like_any() -> None:
    deep = "/" * (LONGEST - 1)
    levels = deep.count("/") + 1
    texts = ["#", "/".join(["+"] * 20_000 + ["#"]), "/".join(["+"] * 20_000), "//+/#", "a/#"]
    parsed = [TopicFilter.parse(each) for each in texts]
    table = TopicTable((each, number) for number, each in enumerate(parsed))
    assert levels > 20_000
    assert table.matching(deep) == (0, 1, 3)
    assert table.matching("/".join("x" * 20_000)) == (0, 1, 2)


def test_wildcards_in_a_topic_are_ordinary_characters() -> None:
    """No broker may send such topics; one that does must not reach every route by it."""
    texts = ["a/b", "a/+", "a/#", "#"]
    table = TopicTable((TopicFilter.parse(each), each) for each in texts)
    assert table.matching("a/#") == table.matching("a/+") == ("a/+", "a/#", "#")
    assert table.matching("+/b") == ("#",)
