"""HTTP/2 without TLS: prior knowledge in, prior knowledge out (contract 3.8, 3.9, 3.12)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.contract.http2 import Answer, Fields, Http2User, Side, Stream
from tests.contract.scenario import scenario
from tests.contract.world import USER, World
from tests.relay.rig import get


def ask(path: str = "/", *more: tuple[str, str], method: str = "GET") -> Fields:
    pseudo = [
        (":method", method),
        (":scheme", "http"),
        (":authority", "bench.example.com"),
        (":path", path),
    ]
    return [*pseudo, ("user-agent", "h2/1"), *more]


@asynccontextmanager
async def speaking(world: World) -> AsyncIterator[tuple[Side, Http2User]]:
    """A client's connection, and a user container that speaks HTTP/2."""
    await world.user.stop()
    user = Http2User()
    await user.start(world.place.listen(USER))
    side = await connected(world)
    try:
        yield side, user
        for number, stream in enumerate(user.streams):
            note(world, f"user {number}", stream.got)
    finally:
        side.close()


async def connected(world: World) -> Side:
    client = await world.client()
    side = Side(client.reader, client.writer, client=True)
    world.keep(asyncio.create_task(side.pump()))
    await side.begin()
    return side


def note(world: World, name: str, got: Answer) -> None:
    world.fields(name, got.fields)
    for number, fields in enumerate(got.interim):
        world.fields(f"{name}, interim {number}", fields)
    body = got.body.decode("latin-1")
    world.note(f"{name}: body", body if len(body) < 1000 else f"{len(body)} bytes")
    if got.trailers:
        world.note(f"{name}: trailers", sorted(got.trailers))
    if got.reset is not None:
        words = {-1: "connection lost", -2: "protocol error"}
        world.note(f"{name}: reset", words.get(got.reset, got.reset))


async def tell(world: World, name: str, stream: Stream, due: float = 0.0) -> None:
    begun = time.monotonic()
    note(world, name, await stream.all())
    world.when(name, time.monotonic() - begun, due)


@scenario("3.9")
async def h2c_GET(world: World) -> None:
    async with speaking(world) as (side, _):
        await tell(world, "answer", await side.stream(ask("/a?b=%zz&c")))


@scenario("3.9", QUEUE_SERVING_PORT="8013")
async def h2c_on_the_port_named_h2c(world: World) -> None:
    async with speaking(world) as (side, _):
        await tell(world, "answer", await side.stream(ask()))


@scenario("3.9")
async def h2c_HEAD(world: World) -> None:
    async def nothing(stream: Stream) -> None:
        await stream.headers([(":status", "200"), ("content-length", "9")], end=True)

    async with speaking(world) as (side, user):
        user.on("/", nothing)
        await tell(world, "answer", await side.stream(ask(method="HEAD")))


@scenario("3.9")
async def h2c_POST_with_and_without_a_length(world: World) -> None:
    async with speaking(world) as (side, _):
        for name, fields in {"with": [("content-length", "6")], "without": []}.items():
            stream = await side.stream(ask("/", *fields, method="POST"), end=False)
            await stream.data(b"abc")
            await stream.data(b"def", end=True)
            await tell(world, name, stream)


@scenario("3.9")
async def h2c_headers(world: World) -> None:
    """The activator's, hop-by-hop ones, crumbs of cookies."""
    more = [
        ("k-original-host", "orig.example.com"),
        ("k-proxy-request", "activator"),
        ("knative-serving-namespace", "default"),
        ("knative-serving-revision", "bench-00001"),
        ("x-forwarded-for", "10.0.0.1, fd00::1"),
        ("x-forwarded-proto", "https"),
        ("cookie", "a=1"),
        ("cookie", "b=2"),
        ("te", "trailers"),
        ("accept-encoding", "gzip"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ]
    async with speaking(world) as (side, _):
        await tell(world, "answer", await side.stream(ask("/", *more)))


@scenario("3.9")
async def h2c_response_headers(world: World) -> None:
    async def answer(stream: Stream) -> None:
        fields = [("set-cookie", "a=1"), ("set-cookie", "b=2"), ("server", "user/1"), ("x-a", "")]
        await stream.headers([(":status", "404"), *fields], end=True)

    async with speaking(world) as (side, user):
        user.on("/", answer)
        await tell(world, "answer", await side.stream(ask()))


@scenario("3.9")
async def a_gRPC_call(world: World) -> None:
    async def call(stream: Stream) -> None:
        await stream.all()
        await stream.headers([(":status", "200"), ("content-type", "application/grpc")])
        await stream.data(stream.got.body)
        await stream.headers([("grpc-status", "0"), ("grpc-message", "fine")], end=True)

    async with speaking(world) as (side, user):
        user.on("/ping.Ping/Ping", call)
        fields = (("content-type", "application/grpc"), ("te", "trailers"), ("grpc-timeout", "5S"))
        stream = await side.stream(ask("/ping.Ping/Ping", *fields, method="POST"), end=False)
        await stream.data(b"\0\0\0\0\x02hi", end=True)
        await tell(world, "answer", stream)


@scenario("3.9")
async def a_gRPC_call_that_has_trailers_only(world: World) -> None:
    """One HEADERS frame that ends the stream, as for a method that is not there."""

    async def fail(stream: Stream) -> None:
        await stream.all()
        fields = [("content-type", "application/grpc"), ("grpc-status", "12")]
        await stream.headers([(":status", "200"), *fields], end=True)

    async with speaking(world) as (side, user):
        user.on("/ping.Ping/None", fail)
        fields = (("content-type", "application/grpc"), ("te", "trailers"))
        stream = await side.stream(ask("/ping.Ping/None", *fields, method="POST"), end=False)
        await stream.data(b"\0\0\0\0\0", end=True)
        await tell(world, "answer", stream)


@scenario("3.11")
async def h2c_both_sides_talk_at_once(world: World) -> None:
    async def echo(stream: Stream) -> None:
        await stream.headers([(":status", "200"), ("content-type", "application/grpc")])
        for size in (3, 6):
            await stream.until(size)
            await stream.data(stream.got.body[-3:])
        await stream.all()
        await stream.headers([("grpc-status", "0")], end=True)

    async with speaking(world) as (side, user):
        user.on("/", echo)
        stream = await side.stream(ask("/", ("te", "trailers"), method="POST"), end=False)
        world.fields("head before any body", await stream.head())
        await stream.data(b"one")
        world.note("first echo", await stream.until(3))
        await stream.data(b"two")
        world.note("both", await stream.until(6))
        await stream.data(b"", end=True)
        await tell(world, "answer", stream)


@scenario("3.9")
async def h2c_trailers_of_a_request(world: World) -> None:
    async with speaking(world) as (side, _):
        stream = await side.stream(ask("/", ("trailer", "x-t"), method="POST"), end=False)
        await stream.data(b"abc")
        await stream.headers([("x-t", "v")], end=True)
        await tell(world, "answer", stream)


@scenario("3.9")
async def h2c_large_bodies_both_ways(world: World) -> None:
    """More than any window holds."""

    async def echo(stream: Stream) -> None:
        await stream.all()
        await stream.headers([(":status", "200"), ("content-type", "a/b")])
        await stream.data(stream.got.body, end=True)

    async with speaking(world) as (side, user):
        user.on("/", echo)
        stream = await side.stream(ask(method="POST"), end=False)
        await stream.data(b"x" * 3_000_000, end=True)
        await tell(world, "answer", stream)


@scenario("3.9")
async def h2c_streams_at_the_same_time(world: World) -> None:
    go_on = asyncio.Event()

    async def wait(stream: Stream) -> None:
        await go_on.wait()
        await stream.headers([(":status", "204")], end=True)

    async with speaking(world) as (side, user):
        user.on("/wait", wait)
        waiting = [await side.stream(ask("/wait")) for _ in range(10)]
        await tell(world, "overtakes", await side.stream(ask("/")))
        await world.until(lambda: len(user.streams) == 11, "eleven requests")
        go_on.set()
        for stream in waiting:
            assert dict((await stream.all()).fields)[":status"] == "204"
        user.streams.clear()  # in the order they came, which is by chance


@scenario("3.12")
async def h2c_nobody_listens_on_the_user_port(world: World) -> None:
    await world.user.stop()
    side = await connected(world)
    await tell(world, "answer", await side.stream(ask()))
    side.close()


@scenario("3.8")
async def h2c_to_a_user_container_of_HTTP_1_only(world: World) -> None:
    async def answer_in_http_1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n400 Bad Request")
        await writer.drain()
        writer.close()

    await world.user.stop()
    server = await asyncio.start_server(answer_in_http_1, sock=world.place.listen(USER))
    side = await connected(world)
    got = await (await side.stream(ask())).all()
    world.note("status", dict(got.fields).get(":status"))
    side.close()
    server.close()


@scenario("3.12")
async def h2c_the_user_container_resets_before_an_answer(world: World) -> None:
    async def reset(stream: Stream) -> None:
        await stream.reset(2)

    async with speaking(world) as (side, user):
        user.on("/", reset)
        got = await (await side.stream(ask("/", method="POST"))).all()
        world.note("status", dict(got.fields).get(":status"))
        world.note("reset", got.reset)
        await tell(world, "the next", await side.stream(ask("/next")))


@scenario("3.12")
async def h2c_the_user_container_resets_within_an_answer(world: World) -> None:
    async def half(stream: Stream) -> None:
        await stream.headers([(":status", "200"), ("content-type", "a/b")])
        await stream.data(b"abc")
        await asyncio.sleep(0.1)
        await stream.reset(2)

    async with speaking(world) as (side, user):
        user.on("/", half)
        await tell(world, "answer", await side.stream(ask("/")))
        await tell(world, "the next", await side.stream(ask("/next")))


@scenario("3.12")
async def h2c_a_client_that_resets_ends_its_request(world: World) -> None:
    async def hang(stream: Stream) -> None:
        await stream.ended.wait()
        await stream.side.lost.wait()

    async with speaking(world) as (side, user):
        user.on("/hang", hang)
        stream = await side.stream(ask("/hang", method="POST"), end=False)
        await world.until(lambda: bool(user.streams), "a request")
        await stream.reset(8)
        async with asyncio.timeout(5):
            await user.streams[0].ended.wait()
        await tell(world, "the next", await side.stream(ask("/next")))


@scenario("3.12")
async def h2c_a_client_that_leaves_ends_its_requests(world: World) -> None:
    async with speaking(world) as (side, user):

        async def hang(stream: Stream) -> None:
            await stream.side.lost.wait()

        user.on("/hang", hang)
        await side.stream(ask("/hang", method="POST"), end=False)
        await world.until(lambda: bool(user.streams), "a request")
        side.close()
        async with asyncio.timeout(5):
            await user.streams[0].ended.wait()


@scenario("3.12")
async def h2c_the_user_container_goes_away_between_requests(world: World) -> None:
    async with speaking(world) as (side, user):
        await tell(world, "before", await side.stream(ask()))
        await user.connections[0].go_away()
        user.connections[0].close()
        await asyncio.sleep(0.2)
        await tell(world, "after", await side.stream(ask()))


@scenario("3.7", REVISION_TIMEOUT_SECONDS="1", SERVING_REQUEST_METRICS_BACKEND="")
async def h2c_no_answer_within_the_timeout(world: World) -> None:
    """Without metrics: whether upstream counts it as a 500 or a 502 is a race."""

    async def hang(stream: Stream) -> None:
        await stream.side.lost.wait()

    async with speaking(world) as (side, user):
        user.on("/hang", hang)
        await tell(world, "answer", await side.stream(ask("/hang")), due=1.0)
        async with asyncio.timeout(5):
            while user.streams[0].got.reset is None:
                await asyncio.sleep(0.01)
        await tell(world, "the next", await side.stream(ask("/next")))


@scenario("3.7", REVISION_IDLE_TIMEOUT_SECONDS="1")
async def h2c_a_response_that_stalls(world: World) -> None:
    async def stall(stream: Stream) -> None:
        path = dict(stream.got.fields)[":path"]
        length = [("content-length", "10")] if path == "/length" else []
        await stream.headers([(":status", "200"), ("content-type", "a/b"), *length])
        await stream.data(b"abc")
        await stream.side.lost.wait()

    async with speaking(world) as (side, user):
        user.on("/length", stall)
        user.on("/open", stall)
        await tell(world, "without a length", await side.stream(ask("/open")), due=1.0)
        got = await (await side.stream(ask("/length"))).all()
        world.note("with a length: fails", got.reset is not None)
        world.note("with a length: by RST_STREAM", (got.reset or -1) >= 0)
        for stream in user.streams:  # how it is cut off is between the two of them
            stream.got.reset = None


@scenario("3.6", CONTAINER_CONCURRENCY="1")
async def h2c_streams_queue_as_well(world: World) -> None:
    async def hang(stream: Stream) -> None:
        await stream.side.lost.wait()

    async with speaking(world) as (side, user):
        user.on("/hang", hang)
        streams = [await side.stream(ask("/hang")) for _ in range(11)]
        while (await world.windows(1))[0]["average_concurrent_requests"] < 11:
            pass
        await tell(world, "refused", await side.stream(ask()))
        world.note("at the user container", len(user.streams))
        for stream in reversed(streams):
            await stream.reset(8)
        await world.until(lambda: all(s.ended.is_set() for s in user.streams), "the end of it")
        await tell(world, "the next", await side.stream(ask("/next")))
        user.streams.clear()


@scenario("3.2")
async def h2c_probes(world: World) -> None:
    async with speaking(world) as (side, _):
        kubelet = [*ask()[:4], ("user-agent", "kube-probe/1.33")]
        for name, fields in {
            "health check": [*kubelet, ("k-network-probe", "queue")],
            "unknown probe": [*kubelet, ("k-network-probe", "nonsense")],
            "network probe": ask("/", ("k-network-probe", "probe"), ("k-network-hash", "beef")),
            "network probe without a hash": ask("/", ("k-network-probe", "probe")),
        }.items():
            await tell(world, name, await side.stream(fields))


@scenario("3.11")
async def h2c_early_hints(world: World) -> None:
    async def hints(stream: Stream) -> None:
        await stream.headers([(":status", "103"), ("link", "</a.css>")])
        await stream.headers([(":status", "404"), ("content-type", "a/b")], end=True)

    async with speaking(world) as (side, user):
        user.on("/", hints)
        await tell(world, "answer", await side.stream(ask()))


@scenario("3.9")
async def a_preface_that_is_cut_short(world: World) -> None:
    client = await world.client()
    await client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r")
    client.close()
    await world.ask("the next", get("/"))
