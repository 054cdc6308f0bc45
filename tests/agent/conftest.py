"""A bpffs for the pins of a test's own agents."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.bpffs import mounted


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    at = tmp_path / "bpf"
    at.mkdir()
    with mounted(at) as made:
        yield made
