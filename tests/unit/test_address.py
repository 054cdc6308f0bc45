"""Broker URLs and what stands beside them; every refusal says what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weir.adaptor.address import Broker, BrokerError

PEM = Path("x.pem")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("mqtt://h", "mqtt://h:1883"),
        ("mqtts://h", "mqtts://h:8883"),
        ("ws://h", "ws://h:80/mqtt"),
        ("ws://h/", "ws://h:80/mqtt"),
        ("wss://u:p@h/a/b?c=d", "wss://h:443/a/b?c=d"),
        ("wss://[::1]:9/x", "wss://[::1]:9/x"),
    ],
)
def test_ports_and_paths_have_their_usual_defaults(url: str, shown: str) -> None:
    assert str(Broker.parse(url)) == shown


@pytest.mark.parametrize(
    ("url", "more", "said"),
    [
        ("http://h", {}, "write mqtt://host:port"),
        ("mqtts://h/path", {}, "nothing after them"),
        ("wss://h/path#x", {}, "nothing after them"),
        ("mqtt://h", {"ca": PEM}, "write mqtts://"),
        ("ws://h", {"certificate": PEM}, "write wss://"),
        ("mqtt://h", {"alpn": ("mqtt",)}, "write mqtts://"),
        ("mqtts://h", {"key": PEM}, "give both"),
        ("mqtt://ann@h", {"username_file": PEM}, "leave out one"),
        ("mqtt://ann:x@h", {"password_file": PEM}, "leave out one"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_way_out(
    url: str, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Broker.parse(url, **more)


def test_one_line_end_is_no_part_of_a_secret_and_every_other_byte_is(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    broker = Broker.parse("mqtt://ann@h", password_file=secret)
    for written, read in (("x", "x"), ("x\n", "x"), ("x\r\n", "x"), (" x \n\n", " x \n")):
        secret.write_bytes(written.encode())
        assert broker.credentials() == ("ann", read)


def test_a_secret_that_is_not_text_is_refused_without_being_shown(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s3cr\xff")
    with pytest.raises(BrokerError) as caught:
        Broker.parse("mqtt://ann@h", password_file=secret).credentials()
    assert str(secret) in str(caught.value)
    assert "s3cr" not in str(caught.value)


def test_plain_connections_have_no_tls_context() -> None:
    assert Broker.parse("mqtt://h").ssl_context() is None
    assert Broker.parse("ws://h").ssl_context() is None
