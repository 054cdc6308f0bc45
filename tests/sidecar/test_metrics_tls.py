"""METRICS_PROMETHEUS_TLS_*: the metrics port speaks TLS where the image asks it (contract 1.1)."""

import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.pods import needs_pods, until
from tests.relay.certificates import Pair, make_pair, needs_openssl
from tests.sidecar.pod import METRICS, Pod, rest

pytestmark = [needs_pods, needs_openssl]

ASK = b"GET /metrics HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path / "server")


def asked(pair: Pair, **more: str) -> dict[str, Any]:
    own = {"TLS_CERT": str(pair.certificate), "TLS_KEY": str(pair.key), **more}
    return {f"METRICS_PROMETHEUS_{name}": value for name, value in own.items()}


def scrape(pod: Pod, context: ssl.SSLContext) -> bytes:
    with context.wrap_socket(pod.connect(METRICS), server_hostname="kn-user-default") as secured:
        secured.sendall(ASK)
        return rest(secured)


def test_metrics_are_served_by_tls_and_by_nothing_else(pod: Pod, pair: Pair) -> None:
    pod.start(**asked(pair))
    pod.serving()
    until(lambda: pod.place.accepts(METRICS))
    assert scrape(pod, pair.trusted()).startswith(b"HTTP/1.1 200")
    assert pod.ask(ASK, METRICS).startswith(b"HTTP/1.0 400")


def test_the_lowest_version_is_as_asked(pod: Pod, pair: Pair) -> None:
    pod.start(**asked(pair, TLS_MIN_VERSION="1.2"))
    pod.serving()
    context = pair.trusted()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert scrape(pod, context).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(("auth", "strangers"), [("require", False), ("optional", True)])
def test_scrapers_show_their_certificate(
    pod: Pod, pair: Pair, tmp_path: Path, auth: str, strangers: bool
) -> None:
    known = make_pair(tmp_path / "known", "prometheus")
    unknown = make_pair(tmp_path / "unknown", "somebody")
    pod.start(**asked(pair, TLS_CLIENT_AUTH=auth, TLS_CLIENT_CA_FILE=str(known.certificate)))
    pod.serving()

    def answered(who: Pair | None) -> bool:
        context = pair.trusted()
        if who is not None:
            context.load_cert_chain(who.certificate, who.key)
        try:
            return scrape(pod, context).startswith(b"HTTP/1.1 200")
        except (ssl.SSLError, ConnectionError):
            return False

    assert answered(known)
    assert answered(None) is strangers
    assert not answered(unknown)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"TLS_KEY": ""}, "only one is set"),
        ({"TLS_CLIENT_AUTH": "require"}, "METRICS_PROMETHEUS_TLS_CLIENT_CA_FILE"),
        ({"TLS_KEY": "/dev/null"}, "are no certificate and its key"),
        ({"TLS_CERT": "/nowhere"}, "/nowhere"),
        ({"TLS_CLIENT_AUTH": "require", "TLS_CLIENT_CA_FILE": "/dev/null"}, "/dev/null"),
    ],
)
def test_what_cannot_be_had_leaves_the_pod_without_metrics_and_not_without_tls(
    pod: Pod, pair: Pair, changes: dict[str, str], words: str
) -> None:
    pod.start(**asked(pair, **changes))
    pod.serving()
    until(lambda: words in pod.said, pod.said)
    assert "no metrics are served" in pod.said
    until(lambda: not pod.place.accepts(METRICS), "the port is closed")
    assert pod.running
