"""`Upgrade: h2c`: a request of HTTP/1.1 goes on as stream 1 of HTTP/2 (contract 1.5 and 3.9)."""

from __future__ import annotations

import asyncio
import re

from tests.contract.http2 import Http2User, Side, Stream
from tests.contract.scenario import scenario
from tests.contract.scenarios.http2 import ask, note, tell
from tests.contract.user import ok
from tests.contract.world import USER, Caller, World
from tests.relay.h2rig import PREFACE, settings
from tests.relay.rig import Peer, Request, get, post

FIELDS = (
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "HTTP2-Settings: AAMAAABkAAQAAP__",
)


async def switched(world: World, asked: bytes) -> tuple[Side | None, Stream | None, Caller]:
    """Ask, and note what is said at once; the connection and its first stream after a 101."""
    client = await world.client()
    await client.send(asked)
    head = await client.head()
    world.note("switch", re.sub(rb"Date: [^\r]+", b"Date: -", head))
    if not head.startswith(b"HTTP/1.1 101"):
        return None, None, client
    side = Side(client.reader, client.writer, client=True)
    side.connection.initiate_upgrade_connection()
    # without the size of its table: upstream, that may end up in the middle of a header block
    side.connection.data_to_send()
    client.writer.write(PREFACE + settings())
    stream = side.streams[1] = Stream(side, 1)
    world.keep(asyncio.create_task(side.pump()))
    await side.flush()
    return side, stream, client


async def first(world: World, asked: bytes, due: float = 0.0) -> None:
    side, stream, _ = await switched(world, asked)
    if side is not None and stream is not None:
        await tell(world, "answer", stream, due)
        side.close()


@scenario("3.9")
async def HTTP_1_upgrades_to_h2c(world: World) -> None:
    """The request that asks for it stays HTTP/1.1 behind the sidecar; the answer is stream 1's."""
    await first(world, get("/a?b=%zz", *FIELDS, "X-Y: z", "X-Forwarded-For: 10.0.0.1"))


@scenario("3.9", QUEUE_SERVING_PORT="8013")
async def HTTP_1_upgrades_on_the_port_named_h2c(world: World) -> None:
    """Where the user container knows HTTP/2 only."""
    await world.user.stop()
    user = Http2User()
    await user.start(world.place.listen(USER))
    await first(world, get("/", *FIELDS))
    for number, stream in enumerate(user.streams):
        note(world, f"user {number}", stream.got)


@scenario("3.9", QUEUE_SERVING_PORT="8013")
async def HTTP_1_upgrades_on_the_port_named_h2c_before_HTTP_1(world: World) -> None:
    """Where the user container knows HTTP/1.1 only, against its port's name."""
    await first(world, get("/", *FIELDS))


@scenario("3.9")
async def an_upgrade_to_h2c_with_a_body(world: World) -> None:
    await first(world, post("/", b"body", *FIELDS))


@scenario("3.9")
async def an_upgrade_to_h2c_with_a_body_that_comes_later(world: World) -> None:
    client = await world.client()
    asked = post("/", b"body", *FIELDS)
    await client.send(asked[:-2])
    probe = get("/", "K-Network-Probe: probe", "K-Network-Hash: beef")
    await world.ask("meanwhile", probe)  # so the head has been read by now
    await client.send(asked[-2:])
    world.note("switch", re.sub(rb"Date: [^\r]+", b"Date: -", await client.head()))


@scenario("3.9")
async def an_upgrade_to_h2c_with_chunks(world: World) -> None:
    await first(world, get("/", *FIELDS, "Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\n\r\n")


@scenario("3.9")
async def an_upgrade_to_h2c_without_naming_its_settings(world: World) -> None:
    await first(world, get("/", "Connection: Upgrade", *FIELDS[1:]))


@scenario("3.9")
async def an_upgrade_to_h2c_without_naming_itself(world: World) -> None:
    await first(world, get("/", "Connection: HTTP2-Settings", *FIELDS[1:]))


@scenario("3.9")
async def an_upgrade_to_h2c_or_something_else(world: World) -> None:
    await first(world, get("/", FIELDS[0], "Upgrade: websocket, h2c", FIELDS[2]))


@scenario("3.9")
async def an_upgrade_to_h2c_with_settings_that_are_none(world: World) -> None:
    await first(world, get("/", *FIELDS[:2], "HTTP2-Settings: !"))


@scenario("3.9")
async def an_upgrade_to_h2c_without_settings(world: World) -> None:
    await first(world, get("/", *FIELDS[:2]))


@scenario("3.9")
async def an_upgrade_to_h2c_of_a_health_check(world: World) -> None:
    probe = get("/", *FIELDS, "K-Network-Probe: queue").replace(b"curl/8", b"kube-probe/1.33")
    await first(world, probe)


@scenario("3.9")
async def an_upgrade_to_h2c_of_HEAD(world: World) -> None:
    await first(world, get("/", *FIELDS).replace(b"GET", b"HEAD", 1))


@scenario("3.9")
async def an_upgrade_to_h2c_before_chunks_and_trailers(world: World) -> None:
    head = b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n"
    kind = b"Content-Type: text/plain\r\n\r\n"
    world.user.on("/", head + kind + b"3\r\nabc\r\n0\r\nX-T: v\r\n\r\n")
    await first(world, get("/", *FIELDS))


@scenario("3.9")
async def an_upgrade_to_h2c_that_the_user_container_takes_up(world: World) -> None:
    world.user.on(
        "/",
        ok(status="101 Switching Protocols", kind="").replace(
            b"Content-Length: 0", b"Connection: Upgrade\r\nUpgrade: h2c"
        ),
    )
    await first(world, get("/", *FIELDS))


@scenario("3.12")
async def an_upgrade_to_h2c_of_a_request_that_is_lost(world: World) -> None:
    async def die(peer: Peer, _: Request) -> None:
        peer.close()

    world.user.on("/", die)
    await first(world, get("/", *FIELDS))


@scenario("3.7", REVISION_TIMEOUT_SECONDS="1", SERVING_REQUEST_METRICS_BACKEND="")
async def an_upgrade_to_h2c_of_a_request_that_takes_too_long(world: World) -> None:
    """Without metrics: whether upstream counts it as a 500 or a 502 is a race."""
    world.user.on("/", world.user.hang)
    await first(world, get("/", *FIELDS), due=1.0)


@scenario("3.6", CONTAINER_CONCURRENCY="1")
async def an_upgrade_to_h2c_queues_as_well(world: World) -> None:
    """Its request holds the only place until it is answered."""
    world.user.on("/held", world.user.slow(1.0))
    side, stream, _ = await switched(world, get("/held", *FIELDS))
    if side is None or stream is None:
        return
    await world.user.received(1)
    await world.ask("the next", get("/"), due=1.0)
    await tell(world, "answer", stream)
    side.close()


@scenario("3.9", QUEUE_SERVING_PORT="8013")
async def streams_after_an_upgrade_to_h2c(world: World) -> None:
    await world.user.stop()
    user = Http2User()
    await user.start(world.place.listen(USER))
    probe = get("/", *FIELDS, "K-Network-Probe: probe", "K-Network-Hash: beef")
    side, stream, _ = await switched(world, probe)
    if side is None or stream is None:
        return
    await tell(world, "first", stream)
    await tell(world, "second", await side.stream(ask("/second")))
    for number, seen in enumerate(user.streams):
        note(world, f"user {number}", seen.got)
    side.close()
