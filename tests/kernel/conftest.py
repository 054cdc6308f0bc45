"""A pod with a scripted backend behind its direct port, and what the kernel says about it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import get_args

import pytest

from tests.kernel.direct import Direct
from tests.pods import Pod, why_no_bcc
from weir.proxy.kernel import Kernel, Loader


@pytest.fixture(scope="session", params=get_args(Loader))
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Every test of the kernel side runs with the programs of every loader."""
    reason = why_no_bcc() if request.param == "bcc" else None
    if reason is not None:
        pytest.skip(reason)
    loaded = Kernel.load(loader=request.param)
    try:
        yield loaded
    finally:
        loaded.close()


@pytest.fixture
def pod() -> Iterator[Pod]:
    with Pod() as made:
        yield made


@pytest.fixture(scope="module")
def module_direct(kernel: Kernel) -> Iterator[Direct]:
    with Pod() as made:
        attached = kernel.attach(made.target())
        attached.open_direct()
        backend = made.backend()
        try:
            yield Direct(made, attached, backend, backend.listen("::"))
        finally:
            attached.detach()


@pytest.fixture(params=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> int:
    return socket.AF_INET6 if request.param == "IPv6" else socket.AF_INET


@pytest.fixture
def direct(module_direct: Direct) -> Iterator[Direct]:
    """One pod for all tests of a module; counts are relative to the start of the test."""
    module_direct.begin()
    try:
        yield module_direct
    finally:
        module_direct.end()
