"""Memory stays bounded whoever is slow: bytes are counted where they are accepted."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from tests.relay.rig import Closed, Peer, Request, Rig, hang, ok, post, request

MakeRig = Callable[..., Awaitable[Rig]]

BOUND = 24 << 20
"""Far above what two loopback sockets and two write buffers hold, far below what is offered."""
OFFERED = 256 << 20
PIECE = b"x" * 65536


class Pump:
    """Writes as long as the other side accepts, and counts what was handed to the kernel."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.accepted = 0

    async def run(self, frame: Callable[[bytes], bytes] = lambda piece: piece) -> None:
        while self.accepted < OFFERED:
            await self._peer.send(frame(PIECE))
            self.accepted += len(PIECE)

    async def stalled(self) -> int:
        """Wait until nothing more is accepted."""
        last = -1
        while self.accepted != last:
            last = self.accepted
            await asyncio.sleep(0.2)
        return self.accepted


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_client_that_does_not_read_stops_the_user_container(
    rig: MakeRig, chunked: bool
) -> None:
    made = await rig()
    pumps: list[Pump] = []

    async def flood(peer: Peer, _: Request) -> None:
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {OFFERED}"
        await peer.send(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode())
        pumps.append(Pump(peer))
        await pumps[0].run((lambda p: b"%x\r\n%s\r\n" % (len(p), p)) if chunked else lambda p: p)
        if chunked:
            await peer.send(b"0\r\n\r\n")

    made.user.on("/flood", flood)
    client = await made.client(receive_buffer=65536)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await client.send(request("GET", "/flood"))
    await made.settled(lambda: bool(pumps))
    assert 0 < await pumps[0].stalled() < BOUND

    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    await client.head()
    got = 0
    if chunked:
        while size := int(await client.until(b"\r\n"), 16):
            got += len(await client.exactly(size + 2)) - 2
    else:
        while got < OFFERED:
            got += len(await client.exactly(1 << 20))
    assert got == OFFERED


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_user_container_that_does_not_read_stops_the_client(
    rig: MakeRig, chunked: bool
) -> None:
    made = await rig()
    read_on = asyncio.Event()
    received = 0

    async def dawdle(peer: Peer, _: Request) -> None:
        nonlocal received
        await read_on.wait()
        if chunked:
            while size := int(await peer.until(b"\r\n"), 16):
                received += len(await peer.exactly(size + 2)) - 2
            await peer.exactly(2)
        while not chunked and received < OFFERED:
            received += len(await peer.exactly(1 << 20))
        await peer.send(ok(b"all read"))

    made.user.on("/up", dawdle, unread=True)
    client = await made.client()
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {OFFERED}"
    await client.send(request("POST", "/up", framing))
    pump = Pump(client)
    pumping = asyncio.create_task(
        pump.run((lambda p: b"%x\r\n%s\r\n" % (len(p), p)) if chunked else lambda p: p)
    )
    await made.user.received(1)
    assert 0 < await pump.stalled() < BOUND
    read_on.set()
    await pumping
    if chunked:
        await client.send(b"0\r\n\r\n")
    assert (await client.response()).body == b"all read"
    assert received == OFFERED


async def test_a_body_whose_request_waits_for_its_turn_is_not_swallowed(rig: MakeRig) -> None:
    made = await rig(container_concurrency=1)
    made.user.on("/hang", hang)
    busy, client = await made.client(), await made.client()
    await busy.send(request("GET", "/hang"))
    await made.user.received(1)
    await client.send(request("POST", "/", f"Content-Length: {OFFERED}"))
    pump = Pump(client)
    pumping = asyncio.create_task(pump.run())
    assert await pump.stalled() < BOUND
    pumping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await pumping


async def test_pipelined_requests_behind_one_that_takes_time_are_not_swallowed(
    rig: MakeRig,
) -> None:
    made = await rig()
    made.user.on("/hang", hang)
    client = await made.client()
    await client.send(request("GET", "/hang"))
    pump = Pump(client)
    pumping = asyncio.create_task(pump.run(lambda _: post("/", PIECE)))
    assert await pump.stalled() < BOUND
    pumping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await pumping


@pytest.mark.parametrize("slow", ["client", "user container"])
async def test_a_tunnel_has_back_pressure_as_well(rig: MakeRig, slow: str) -> None:
    made = await rig()
    pumps: list[Pump] = []
    tunnel = asyncio.Event()

    async def switch(peer: Peer, _: Request) -> None:
        await peer.send(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"
        )
        if slow == "client":
            pumps.append(Pump(peer))
            await pumps[0].run()
        await tunnel.wait()
        raise Closed

    made.user.on("/ws", switch)
    client = await made.client(receive_buffer=65536)
    await client.send(request("GET", "/ws", "Connection: Upgrade", "Upgrade: x"))
    await client.head()
    pumping = None
    if slow == "client":
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    else:
        pumps.append(Pump(client))
        pumping = asyncio.create_task(pumps[0].run())
    await made.settled(lambda: bool(pumps))
    assert await pumps[0].stalled() < BOUND
    tunnel.set()
    if pumping is not None:
        pumping.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await pumping


async def test_a_client_that_reads_no_answers_of_ours_is_held_and_gets_all_of_them_later(
    rig: MakeRig,
) -> None:
    made = await rig()
    client = await made.client(receive_buffer=4096)
    client.reader._transport.pause_reading()  # type: ignore[attr-defined]
    probe = request("GET", "/", "K-Network-Probe: probe", "K-Network-Hash: " + "h" * 1000)
    offered = accepted = 20_000
    for sent in range(0, offered, 10):
        try:
            async with asyncio.timeout(2):
                await client.send(probe * 10)
        except TimeoutError:
            accepted = sent + 10
            break
    assert accepted * len(probe) < BOUND - (8 << 20)
    assert made.relay.counters().probes < accepted
    client.reader._transport.resume_reading()  # type: ignore[attr-defined]
    for _ in range(accepted):
        assert (await client.response()).status == 200
