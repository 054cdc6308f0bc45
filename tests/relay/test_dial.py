"""Dialling: what it needs, and what an address that is none comes to."""

import asyncio
import os
import socket

import pytest

from tests.relay.rig import UserContainer
from weir.proxy.wire.dial import DialError, connect_once, dial_here


async def test_a_literal_address_does_not_wait_for_the_resolver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user = UserContainer()
    await user.start()

    async def stuck(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", stuck)
    (await connect_once(dial_here, "127.0.0.1", user.port, 5)).close()
    with pytest.raises(TimeoutError):
        await connect_once(dial_here, "127.0.0.1.nip.example", user.port, 0.01)
    await user.stop()


async def test_a_port_that_is_none_is_an_error_like_any_other() -> None:
    with pytest.raises(DialError, match=r"127\.0\.0\.1:99999"):
        await connect_once(dial_here, "127.0.0.1", 99999, 5)


async def test_a_dial_that_is_given_up_leaves_nothing_behind() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        host, port = full.getsockname()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            with pytest.raises(TimeoutError):
                await connect_once(dial_here, host, port, 0.005)
        assert len(os.listdir("/proc/self/fd")) == before
        for filler in fillers:
            filler.close()
