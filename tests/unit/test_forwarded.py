"""Construction of Forwarded and X-Forwarded-For (contract 3.5)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.proxy.policy.forwarded import appended, forwarded


@pytest.mark.parametrize(
    ("for_", "host", "proto", "result"),
    [
        ("127.0.0.1, ::1", "h", "p", 'for=127.0.0.1;host=h;proto=p, for="[::1]"'),
        ("127.0.0.1, ::1", "", "", 'for=127.0.0.1, for="[::1]"'),
        ("", "h", "p", "host=h;proto=p"),
        ("", "", "https", "proto=https"),
        ("", "", "", ""),
        (",,,", "", "", "for=, for=, for="),
        ("a,", "", "", "for=a"),
        ("a, ", "", "", "for=a, for="),
        (" a \t,b", "h", "", "for=a;host=h, for=b"),
        ("fd00::1", "", "", 'for="[fd00::1]"'),
    ],
)
def test_forwarded(for_: str, host: str, proto: str, result: str) -> None:
    assert forwarded(for_.encode(), host.encode(), proto.encode()) == result.encode()


def test_the_peer_is_appended_or_alone() -> None:
    assert appended([], b"10.0.0.1") == b"10.0.0.1"
    assert appended([b"a, b", b"c"], b"10.0.0.1") == b"a, b, c, 10.0.0.1"


address = st.sampled_from(["10.0.0.1", "fd00::1", "unknown", "_hidden", ""])


@given(st.lists(address, min_size=1, max_size=6), st.sampled_from(["", "h"]))
def test_every_node_is_named_once_in_order(nodes: list[str], host: str) -> None:
    result = forwarded(", ".join(nodes).encode(), host.encode(), b"").decode()
    if not result:
        assert not any(nodes) and not host
        return
    named = [part.partition(";")[0] for part in result.split(", ") if part.startswith("for=")]
    assert [name.removeprefix("for=").strip('"[]') for name in named] == (
        nodes if len(nodes) > 1 or nodes[0] else []
    )
