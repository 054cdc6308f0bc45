"""SERVING_READINESS_PROBE as the controller writes it (contract section 1.2)."""

import json
from typing import Any

import pytest

from weir.proxy.contract import GrpcCheck, HttpGet, Probe
from weir.proxy.gojson import FieldError
from weir.proxy.probe_settings import parse_probes

USER_PORT = 8080


def parsed(**fields: Any) -> Probe:
    (probe,) = parse_probes(json.dumps(fields), USER_PORT)
    return probe


def fault(text: str, *, several: bool = False) -> str:
    with pytest.raises(FieldError) as caught:
        parse_probes(text, USER_PORT, several=several)
    return str(caught.value)


def test_no_text_is_no_probe() -> None:
    assert parse_probes("", USER_PORT) == ()
    assert parse_probes("", USER_PORT, several=True) == ()


def test_the_default_is_an_aggressive_tcp_connect() -> None:
    assert parsed(tcpSocket={"port": 8080, "host": "127.0.0.1"}, successThreshold=1) == Probe(
        port=8080, host="127.0.0.1", period=0.0, success_threshold=1
    )


def test_an_http_get_is_read_whole() -> None:
    probe = parsed(
        httpGet={
            "host": "127.0.0.1",
            "port": 9000,
            "scheme": "HTTPS",
            "path": "/healthz?full",
            "httpHeaders": [{"name": "X-Token", "value": "s"}, {"name": "X-Empty", "value": ""}],
        },
        initialDelaySeconds=3,
        timeoutSeconds=2,
        periodSeconds=5,
        successThreshold=3,
        failureThreshold=4,
        terminationGracePeriodSeconds=30,
    )
    get = HttpGet("/healthz?full", (("X-Token", "s"), ("X-Empty", "")), "https")
    assert probe == Probe(port=9000, http=get, period=5.0, timeout=2.0, success_threshold=3)


def test_the_scheme_defaults_to_http() -> None:
    http = parsed(httpGet={"port": 8080}).http
    assert http is not None and http.scheme == "http"


def test_http2_is_looked_for_when_the_feature_is_on() -> None:
    text = '{"httpGet": {"port": 8080}}'
    for wanted in (False, True):
        (probe,) = parse_probes(text, USER_PORT, detect_http2=wanted)
        assert probe.http is not None and probe.http.detect_http2 is wanted


def test_a_grpc_probe_has_a_service_or_none() -> None:
    assert parsed(grpc={"port": 9000, "service": "eggs"}) == Probe(
        port=9000, grpc=GrpcCheck("eggs")
    )
    assert parsed(grpc={"port": 9000, "service": None}).grpc == GrpcCheck("")


@pytest.mark.parametrize("name", ["http1", "h2c", "user-port"])
@pytest.mark.parametrize("handler", ["httpGet", "tcpSocket"])
def test_a_named_port_is_the_user_port(handler: str, name: str) -> None:
    assert parsed(**{handler: {"port": name}}).port == USER_PORT


@pytest.mark.parametrize("fields", [{}, {"port": 0}, {"port": None}])
def test_a_port_that_is_not_given_is_the_user_port(fields: dict[str, Any]) -> None:
    assert parsed(tcpSocket=fields).port == USER_PORT


def test_a_port_may_be_digits() -> None:
    assert parsed(tcpSocket={"port": "9000"}).port == 9000


def test_an_array_is_one_probe_for_each_container() -> None:
    text = '[{"tcpSocket": {"port": 8080}}, {"grpc": {"port": 9001}}, {"httpGet": {"port": 9002}}]'
    probes = parse_probes(text, USER_PORT, several=True)
    assert [probe.port for probe in probes] == [8080, 9001, 9002]


@pytest.mark.parametrize("text", ["[null]", "[]", "null"])
def test_a_container_without_a_probe_counts_as_ready(text: str) -> None:
    assert parse_probes(text, USER_PORT, several=True) == ()


def test_null_takes_no_probe_from_the_others() -> None:
    text = '[null, {"tcpSocket": {"port": 9001}}]'
    assert parse_probes(text, USER_PORT, several=True) == (Probe(port=9001),)


def test_unknown_fields_are_ignored() -> None:
    assert parsed(tcpSocket={"port": 8080, "new": 1}, newer={"x": []}) == Probe(port=8080)


def test_names_may_be_in_any_case() -> None:
    assert parsed(TCPSocket={"Port": 9000}, PERIODSECONDS=5) == Probe(port=9000, period=5.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "document: expected an object, got an array"),
        ('"x"', "document: expected an object, got a string"),
        ("{}", "httpGet, tcpSocket, grpc"),
        ('{"exec": {"command": ["x"]}}', "httpGet, tcpSocket, grpc"),
        ('{"httpGet": 1}', "httpGet: expected an object, got a number"),
        ('{"httpGet": {"port": 70000}}', "httpGet.port: 70000"),
        ('{"tcpSocket": {"port": ""}}', "tcpSocket.port: ''"),
        ('{"tcpSocket": {"port": 80.5}}', "tcpSocket.port: 80.5"),
        ('{"grpc": {"port": true}}', "grpc.port: True"),
        (
            '{"httpGet": {"scheme": "FTP"}}',
            "httpGet.scheme: 'FTP' is unknown; allowed: HTTP, HTTPS",
        ),
        ('{"httpGet": {"path": 1}}', "httpGet.path: expected a string, got a number"),
        ('{"httpGet": {"httpHeaders": {}}}', "httpGet.httpHeaders: expected an array"),
        ('{"httpGet": {"httpHeaders": [1]}}', "httpGet.httpHeaders[0]: expected an object"),
        ('{"httpGet": {"httpHeaders": [{"name": ""}]}}', "httpGet.httpHeaders[0]"),
        ('{"httpGet": {"httpHeaders": [{"name": "a", "value": "b\\r\\nc: d"}]}}', "line break"),
        ('{"tcpSocket": {}, "periodSeconds": "1"}', "periodSeconds: expected a number"),
        ('{"tcpSocket": {}, "periodSeconds": -1}', "periodSeconds: -1 is negative"),
        ('{"tcpSocket": {}, "timeoutSeconds": 1.5}', "timeoutSeconds: expected a number, got 1.5"),
        ('{"tcpSocket": {}, "successThreshold": 2147483648}', "successThreshold: 2147483648"),
        ('{"tcpSocket": {}, "failureThreshold": []}', "failureThreshold: expected a number"),
    ],
)
def test_what_can_not_be_used_is_named(text: str, words: str) -> None:
    assert words in fault(text)


def test_in_an_array_the_place_is_named() -> None:
    assert fault("{}", several=True).startswith("document: expected an array")
    assert fault('[null, {"tcpSocket": {"port": -1}}]', several=True).startswith(
        "[1].tcpSocket.port: -1"
    )
    assert fault("[null, {}]", several=True).startswith("[1]: no handler")


def test_a_document_nested_without_end_is_no_json() -> None:
    assert "nested too deeply" in fault("[" * 100_000)
