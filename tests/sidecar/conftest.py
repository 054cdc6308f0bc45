"""A pod's namespace for each test, gone afterwards with everything in it."""

from collections.abc import Iterator

import pytest

from tests.sidecar.pod import Pod


@pytest.fixture
def pod() -> Iterator[Pod]:
    made = Pod()
    try:
        yield made
    finally:
        made.close()
