"""The DNS of the test cluster answers as a resolver in a pod needs it."""

import struct

from tests.cluster import dns

ADDRESSES = {"web.default.svc.cluster.local": "10.96.0.9"}


def _query(name: str, kind: int) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!6H", 77, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


def _answer(name: str, kind: int) -> tuple[int, int, bytes]:
    query = _query(name, kind)
    reply = dns.reply(query, ADDRESSES)
    number, flags, questions, answers, _, _ = struct.unpack_from("!6H", reply)
    assert (number, questions) == (77, 1)
    assert flags & 0x8000, "a reply"
    assert reply[12 : len(query)] == query[12:], "the question is repeated"
    return flags & 15, answers, reply[len(query) :]


def test_a_services_address_is_the_last_four_bytes_of_its_one_record() -> None:
    code, answers, record = _answer("web.default.svc.cluster.local", 1)
    assert (code, answers) == (0, 1)
    assert record[-4:] == bytes([10, 96, 0, 9])


def test_names_have_no_case() -> None:
    assert _answer("WEB.Default.svc.cluster.local", 1)[:2] == (0, 1)


def test_a_service_has_no_ipv6_address_but_it_exists() -> None:
    assert _answer("web.default.svc.cluster.local", 28) == (0, 0, b"")


def test_another_name_does_not_exist() -> None:
    assert _answer("web.default.svc.cluster.local.default.svc.cluster.local", 1) == (3, 0, b"")
