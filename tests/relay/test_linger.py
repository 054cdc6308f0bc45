"""A connection that is closed with bytes of the client unread: what was answered still arrives."""

import asyncio
from typing import Any

import pytest

from weir.proxy.wire import server
from weir.proxy.wire.head import RequestHead
from weir.proxy.wire.server import ServerConnection


class SlowClient(asyncio.Transport):
    """The transport to a client that takes its time; `unsent` is what it has not taken yet."""

    def __init__(self) -> None:
        super().__init__()
        self.unsent = 100
        self.asked = 0
        self.aborted = asyncio.Event()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else default

    def get_write_buffer_size(self) -> int:
        self.asked += 1
        return self.unsent

    def is_closing(self) -> bool:
        return self.aborted.is_set()

    def write(self, data: Any) -> None: ...

    def write_eof(self) -> None: ...

    def abort(self) -> None:
        self.aborted.set()


async def test_an_early_answer_is_not_cut_for_a_client_that_reads_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "LINGER_SECONDS", 0.001)

    def answer(client: ServerConnection, head: RequestHead, piece: bytes, ended: bool) -> None:
        assert not ended
        client.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        client.finish(False)

    client = SlowClient()
    connection = ServerConnection(answer, lambda _: None)
    connection.connection_made(client)
    connection.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
    while client.asked < 3:  # the moment to linger was over several times
        await asyncio.sleep(0.001)
    assert not client.aborted.is_set()
    client.unsent = 0
    await client.aborted.wait()
