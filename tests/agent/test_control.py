"""The channel between supervisor and worker: messages whole and in order, descriptors intact."""

import asyncio
import os
import socket

import pytest

from weir.proxy import control
from weir.proxy.control import (
    MAX_MESSAGE,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_DESCRIPTORS,
    MAX_SAID,
    Channel,
    Message,
)
from weir.proxy.policy.budget import Pace


class End:
    """One end of a channel that remembers what came."""

    def __init__(self, sock: socket.socket) -> None:
        self.messages: list[tuple[Message, list[int]]] = []
        self.changed = asyncio.Event()
        self.gone = asyncio.Event()
        self.channel = Channel(sock, self._receive, self.gone.set)

    def _receive(self, message: Message, descriptors: list[int]) -> None:
        self.messages.append((message, descriptors))
        self.changed.set()

    async def wait_for(self, count: int) -> None:
        while len(self.messages) < count:
            self.changed.clear()
            await self.changed.wait()


def pair() -> tuple[End, End]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return End(a), End(b)


async def test_messages_arrive_whole_and_in_order_though_the_socket_is_full() -> None:
    a, b = pair()
    for number in range(2000):
        a.channel.send({"number": number, "padding": "x" * 1000})
    await b.wait_for(2000)
    assert [message["number"] for message, _ in b.messages] == list(range(2000))
    a.channel.close()
    b.channel.close()


async def test_a_socket_that_is_sent_works_on_the_other_side_and_the_sender_keeps_its_own() -> None:
    a, b = pair()
    left, right = socket.socketpair()
    a.channel.send({"op": "sockets"}, [right])
    await b.wait_for(1)
    ((_, descriptors),) = b.messages
    right.close()
    with socket.socket(fileno=descriptors[0]) as received, left:
        received.sendall(b"hello")
        assert left.recv(5) == b"hello"
    a.channel.close()
    b.channel.close()


async def test_eof_is_told_once_and_sending_to_the_gone_is_harmless() -> None:
    a, b = pair()
    a.channel.close()
    await b.gone.wait()
    b.channel.send({"op": "report"})
    b.channel.close()
    a.channel.close()


async def test_no_descriptor_is_left_when_the_peer_dies_with_messages_queued() -> None:
    a, b = pair()
    before = len(os.listdir("/proc/self/fd"))
    left, right = socket.socketpair()
    for _ in range(500):
        a.channel.send({"padding": "x" * 2000}, [right])
    b.channel.close()
    await a.gone.wait()
    left.close()
    right.close()
    # both ends' sockets are closed as well
    assert len(os.listdir("/proc/self/fd")) == before - 2


async def test_a_side_that_can_not_handle_a_message_ends_instead_of_going_on_half_informed() -> (
    None
):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    a = End(ours)
    gone = asyncio.Event()

    def fail(message: Message, descriptors: list[int]) -> None:
        raise KeyError("pod")

    Channel(theirs, fail, gone.set)
    a.channel.send({"op": "adopt"})
    await gone.wait()
    await a.gone.wait()


async def test_a_message_over_the_limit_is_refused_with_its_operation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control, "MAX_ENCLOSED", 100_000)
    a, b = pair()
    with pytest.raises(ValueError, match="'adopt'"):
        a.channel.send({"op": "adopt", "padding": "x" * 100_000})
    a.channel.close()
    b.channel.close()


@pytest.mark.parametrize("data", [b"no JSON", b"[" * 60_000, b""])
async def test_descriptors_beside_what_is_no_message_are_closed(data: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    b = End(theirs)
    left, right = socket.socketpair()
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(ours, [data], [right.fileno()] * 20)
    await b.gone.wait()
    assert len(os.listdir("/proc/self/fd")) == before - 1  # the channel's own end
    for sock in (ours, left, right):
        sock.close()


async def test_a_peer_that_never_stops_talking_leaves_the_loop_to_others() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    seen = 0

    def again(message: Message, descriptors: list[int]) -> None:
        nonlocal seen
        seen += 1
        if seen < 100_000:  # so that the test ends where the loop is not left
            ours.send(b"{}")

    channel = Channel(theirs, again, lambda: None)
    ours.send(b"{}")
    for _ in range(10):
        await asyncio.sleep(0)
    assert 0 < seen < 100_000
    channel.close()
    ours.close()


async def test_a_side_that_asks_for_descriptors_and_takes_none_is_given_up() -> None:
    a, b = pair()
    before = len(os.listdir("/proc/self/fd"))
    b.channel._loop.remove_reader(b.channel._sock.fileno())  # it reads no more
    left, right = socket.socketpair()
    while not a.gone.is_set():
        a.channel.send({"op": "sockets", "padding": "x" * 5000}, [right] * 32)
        assert len(os.listdir("/proc/self/fd")) < before + MAX_QUEUED_DESCRIPTORS + 100
        await asyncio.sleep(0)
    left.close()
    right.close()
    b.channel.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2


async def test_a_large_message_arrives_whole_between_small_ones_with_its_descriptors() -> None:
    a, b = pair()
    before = len(os.listdir("/proc/self/fd"))
    left, right = socket.socketpair()
    padding = "x" * 4 * MAX_MESSAGE
    a.channel.send({"number": 1})
    a.channel.send({"number": 2, "padding": padding}, [right])
    a.channel.send({"number": 3})
    await b.wait_for(3)
    assert [message["number"] for message, _ in b.messages] == [1, 2, 3]
    message, descriptors = b.messages[1]
    assert message["padding"] == padding
    with socket.socket(fileno=descriptors[0]) as received:
        received.sendall(b"hello")
        assert left.recv(5) == b"hello"
    left.close()
    right.close()
    assert len(os.listdir("/proc/self/fd")) == before
    a.channel.close()
    b.channel.close()


async def test_a_side_that_never_reads_is_given_up_before_what_it_is_told_fills_the_memory() -> (
    None
):
    a, b = pair()
    b.channel._loop.remove_reader(b.channel._sock.fileno())
    sent = 0
    while not a.gone.is_set():
        a.channel.send({"op": "direct", "padding": "x" * 50_000})
        sent += 50_000
        assert sent < 2 * MAX_QUEUED_BYTES
        await asyncio.sleep(0)
    b.channel.close()


def untrusted(rate: float, burst: float) -> tuple[socket.socket, list[Message], asyncio.Event]:
    """Our raw end, and what the trusting side heard until it had enough."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    heard: list[Message] = []
    gone = asyncio.Event()
    Channel(
        theirs,
        lambda message, _: heard.append(message),
        gone.set,
        peer="the worker",
        pace=Pace(rate, burst),
    )
    return ours, heard, gone


async def test_who_is_not_trusted_is_cut_off_when_it_talks_too_much_and_the_log_says_who(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, heard, gone = untrusted(rate=0.001, burst=100)
    for _ in range(120):
        ours.send(b"{}")
    await gone.wait()
    assert 90 < len(heard) <= 100
    assert caplog.messages == ["the worker talks too much"]
    ours.close()


async def test_long_messages_of_who_is_not_trusted_count_for_more() -> None:
    ours, heard, gone = untrusted(rate=0.001, burst=100)
    for _ in range(12):
        ours.send(b'{"padding": "%s"}' % (b"x" * 9000))
    await gone.wait()
    assert 5 < len(heard) <= 10
    ours.close()


async def test_a_message_that_is_too_long_ends_the_channel_of_who_is_not_trusted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, heard, gone = untrusted(rate=1000, burst=1000)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_SAID)
    ours.send(b'"%s"' % (b"x" * MAX_SAID))
    await gone.wait()
    assert not heard
    assert str(MAX_SAID) in caplog.messages[0]
    ours.close()


async def test_descriptors_of_who_is_not_trusted_are_never_taken() -> None:
    ours, heard, _ = untrusted(rate=1000, burst=1000)
    left, right = socket.socketpair()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        socket.send_fds(ours, [b"{}"], [right.fileno()] * 200)
    # what looks like a large message would be read from a descriptor
    socket.send_fds(ours, [b"@"], [right.fileno()])
    async with asyncio.timeout(10):
        while len(heard) < 3:
            await asyncio.sleep(0)
    # but the channel's own end, which that has closed
    assert before - 1 <= len(os.listdir("/proc/self/fd")) <= before
    for sock in (ours, left, right):
        sock.close()
