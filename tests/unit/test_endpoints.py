"""The pods of a sink in a routes file."""

from __future__ import annotations

import pytest

from weir.adaptor.routes import RoutesError, parse
from weir.proxy.policy.balance import Revision


def sink_of(text: str) -> tuple[Revision, ...]:
    (route,) = parse(f"routes: [{{filter: a, sink: {text}}}]")
    return route.access.pods


def test_pods_are_listed_with_or_without_their_port() -> None:
    found = sink_of("{uri: 'http://fn/', pods: [10.0.0.7, '10.0.0.8:9000', '[fd00::7]', fn-0.x]}")
    pods = ("10.0.0.7:8012", "10.0.0.8:9000", "[fd00::7]:8012", "fn-0.x:8012")
    assert found == (Revision("", pods),)


def test_revisions_have_names_weights_and_pods() -> None:
    found = sink_of(
        "{uri: 'http://fn/', revisions: {new: {weight: 10, pods: [10.0.0.7]}, old: {weight: 90}}}"
    )
    assert found == (Revision("new", ("10.0.0.7:8012",), 10), Revision("old", (), 90))


def test_an_empty_list_is_a_set_that_is_empty() -> None:
    assert sink_of("{uri: 'http://fn/', pods: []}") == (Revision("", ()),)
    assert sink_of("{uri: 'http://fn/'}") == sink_of("http://fn/") == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{uri: 'https://fn/', pods: [10.0.0.7]}", "sink.uri`: pods are for http sinks"),
        ("{uri: 'http://fn/', pods: 10.0.0.7}", "sink.pods`: must be a list of HOST"),
        ("{uri: 'http://fn/', pods: [7]}", "sink.pods`: must be a list of HOST"),
        ("{uri: 'http://fn/', pods: ['a/b']}", "sink.pods`: `a/b` is not the address of a pod"),
        ("{uri: 'http://fn/', pods: ['http://a']}", "is not the address of a pod"),
        ("{uri: 'http://fn/', pods: ['u@a']}", "is not the address of a pod"),
        ("{uri: 'http://fn/', pods: ['a:0']}", "port 0"),
        ("{uri: 'http://fn/', pods: ['a:99999']}", "sink.pods`"),
        ("{uri: 'http://fn/', pods: ['[::1']}", "sink.pods`"),
        ("{uri: 'http://fn/', pods: [a], revisions: {r: {}}}", "sink.pods`: stand in each of"),
        ("{uri: 'http://fn/', revisions: [a]}", "sink.revisions`: must be a mapping of names"),
        ("{uri: 'http://fn/', revisions: {r: {wait: 1}}}", "sink.revisions.r.wait`: unknown"),
        ("{uri: 'http://fn/', revisions: {r: {weight: -1}}}", "weight`: must be a number from 0"),
    ],
)
def test_pods_that_make_no_sense_are_named(text: str, complaint: str) -> None:
    with pytest.raises(RoutesError) as caught:
        sink_of(text)
    assert complaint in str(caught.value)


def test_two_routes_to_one_sink_name_the_same_pods() -> None:
    one, two = "{uri: 'http://fn/', pods: [a]}", "{uri: 'http://fn/', pods: [b]}"
    with pytest.raises(RoutesError, match="another caFile, tokenFile or pods"):
        parse(f"routes: [{{filter: a, sink: {one}}}, {{filter: b, sink: {two}}}]")
