"""The autoscaler's message of contract section 5.1, byte for byte."""

from __future__ import annotations

import struct

from weir.proxy.policy.meter import Report
from weir.proxy.policy.stat import encode


def test_before_the_first_period_only_the_pod_is_named() -> None:
    assert encode("pod-1") == bytes.fromhex("0a05706f642d31")


def test_the_recorded_message_of_an_original_queue_proxy() -> None:
    average, uptime = struct.unpack("<dd", bytes.fromhex("92a36a1ea8b2db3f42c1d6b672000840"))
    message = encode("pod-1", Report(average, 0.0, 1, 0), uptime)
    recorded = "0a05706f642d31 1192a36a1ea8b2db3f 21000000000000f03f 3142c1d6b672000840"
    assert message == bytes.fromhex(recorded)


def test_all_fields_in_their_order() -> None:
    message = encode("p", Report(1.5, 0.5, 7, 3), 60.0)
    expected = b"\x0a\x01p"
    for tag, value in ((0x11, 1.5), (0x19, 0.5), (0x21, 7.0), (0x29, 3.0), (0x31, 60.0)):
        expected += bytes([tag]) + struct.pack("<d", value)
    assert message == expected


def test_the_longest_pod_name_fits_what_the_autoscaler_reads() -> None:
    message = encode("x" * 253, Report(1.5, 0.5, 7, 3), 60.0)
    assert message.startswith(b"\x0a\xfd\x01" + b"x" * 253)
    assert len(message) <= 336


def test_a_pod_without_a_name_is_still_a_valid_message() -> None:
    assert encode("") == b""
