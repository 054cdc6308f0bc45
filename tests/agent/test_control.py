"""The channel between supervisor and worker: messages whole and in order, descriptors intact."""

import asyncio
import os
import socket

import pytest

from weir.proxy.control import MAX_MESSAGE, MAX_QUEUED_DESCRIPTORS, Channel, Message


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


async def test_a_message_over_the_limit_is_refused_with_its_operation() -> None:
    a, b = pair()
    with pytest.raises(ValueError, match="'adopt'"):
        a.channel.send({"op": "adopt", "padding": "x" * MAX_MESSAGE})
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
