"""Bytes of our own answers that no scenario over a socket pins down."""

from __future__ import annotations

from email.utils import formatdate

from hypothesis import given
from hypothesis import strategies as st

from weir.proxy.wire.answers import http_date


@given(st.integers(0, 4_102_444_800))
def test_dates_are_those_of_the_standard_library(second: int) -> None:
    assert http_date(second).decode() == formatdate(second, usegmt=True)
