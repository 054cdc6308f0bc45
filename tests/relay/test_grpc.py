"""gRPC by the official client and server through the relay (contract section 8, gRPC rows)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.relay.h2pair import Pair

MakePair = Callable[..., Awaitable[Pair]]
LARGE = [
    ("grpc.max_receive_message_length", 1 << 26),
    ("grpc.max_send_message_length", 1 << 26),
]


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Bytes in, bytes out."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.waiting = asyncio.Event()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        kinds = {
            "Echo": grpc.unary_unary_rpc_method_handler(self.echo),
            "Fail": grpc.unary_unary_rpc_method_handler(self.fail),
            "Hang": grpc.unary_unary_rpc_method_handler(self.hang),
            "Many": grpc.unary_stream_rpc_method_handler(self.many),
            "Sum": grpc.stream_unary_rpc_method_handler(self.sum),
            "Chat": grpc.stream_stream_rpc_method_handler(self.chat),
        }
        return kinds[str(details.method).rpartition("/")[2]]

    async def echo(self, message: bytes, context: Any) -> bytes:
        sent = dict(context.invocation_metadata())
        await context.send_initial_metadata([("x-first", str(sent.get("x-mine", "")))])
        context.set_trailing_metadata([("x-last", "2"), ("x-bytes-bin", b"\0\xff")])
        return message

    async def fail(self, message: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing: ä")
        return b""

    async def hang(self, message: bytes, context: Any) -> bytes:
        self.waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        return b""

    async def many(self, message: bytes, context: Any) -> AsyncIterator[bytes]:
        for number in range(int(message)):
            yield b"%d" % number

    async def sum(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        return b"%d" % sum([len(message) async for message in messages])

    async def chat(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message.upper()


class World:
    def __init__(self, pair: Pair, service: Service, channel: grpc.aio.Channel) -> None:
        self.pair, self.service, self.channel = pair, service, channel


@pytest.fixture
async def world(pair: MakePair) -> AsyncIterator[World]:
    service = Service()
    server = grpc.aio.server(options=LARGE)
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    made = await pair(user_port=port)
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{made.port}", options=LARGE)
    yield World(made, service, channel)
    await channel.close()
    await server.stop(None)


async def test_a_unary_call_with_its_metadata(world: World) -> None:
    call = world.channel.unary_unary("/s/Echo")(b"hello", metadata=[("x-mine", "1")], timeout=20)
    assert await call == b"hello"
    assert ("x-first", "1") in tuple(await call.initial_metadata())
    trailing = tuple(await call.trailing_metadata())
    assert ("x-last", "2") in trailing
    assert ("x-bytes-bin", b"\0\xff") in trailing
    await world.pair.settled()
    assert world.pair.relay.counters().requests == 1


async def test_messages_of_four_megabytes(world: World) -> None:
    message = bytes(range(256)) * 16_384
    assert await world.channel.unary_unary("/s/Echo")(message, timeout=60) == message


async def test_an_error_without_an_answer(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.channel.unary_unary("/s/Fail")(b"", timeout=20)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "no such thing: ä"


async def test_a_stream_of_answers(world: World) -> None:
    call = world.channel.unary_stream("/s/Many")(b"500", timeout=30)
    assert [answer async for answer in call] == [b"%d" % number for number in range(500)]


async def test_a_stream_of_requests(world: World) -> None:
    async def requests() -> AsyncIterator[bytes]:
        for _ in range(300):
            yield b"x" * 10_000

    call = world.channel.stream_unary("/s/Sum")(requests(), timeout=30)
    assert await call == b"3000000"


async def test_a_conversation(world: World) -> None:
    call = world.channel.stream_stream("/s/Chat")(timeout=30)
    for word in (b"one", b"two", b"three"):
        await call.write(word)
        assert await call.read() == word.upper()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_a_hundred_calls_at_once(world: World) -> None:
    echo = world.channel.unary_unary("/s/Echo")
    calls = [echo(b"%d" % number, timeout=30) for number in range(100)]
    assert await asyncio.gather(*calls) == [b"%d" % number for number in range(100)]


async def test_a_call_that_is_cancelled_is_cancelled_at_the_server(world: World) -> None:
    call = world.channel.unary_unary("/s/Hang")(b"")
    await asyncio.wait_for(world.service.waiting.wait(), 20)
    call.cancel()
    await asyncio.wait_for(world.service.cancelled.wait(), 20)
    await world.pair.settled()


async def test_a_deadline_ends_a_call_on_both_sides(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.channel.unary_unary("/s/Hang")(b"", timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(world.service.cancelled.wait(), 20)
    await world.pair.settled()
