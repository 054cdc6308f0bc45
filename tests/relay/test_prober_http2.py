"""Probes over HTTP/2: the search for it, and gRPC health checks (contract 4.3)."""

import asyncio
import struct

import pytest

from tests.relay.http2_script import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    RESET,
    SETTINGS,
    Answer,
    Conversation,
    Http2Server,
    block,
    frame,
    headers,
    saying,
    settings,
)
from tests.relay.rig import UserContainer, ok
from weir.proxy.contract import GrpcCheck, HttpGet, Probe, RevisionSettings
from weir.proxy.probes import Prober
from weir.proxy.wire.dial import dial_here

READY = saying(headers((":status", "200"), end=True))
GRPC = (":status", "200"), ("content-type", "application/grpc")


def prober(port: int, http: HttpGet | None = None, grpc: GrpcCheck | None = None) -> Prober:
    probe = Probe(port=port, http=http, grpc=grpc, period=10, timeout=1.0)
    return Prober(RevisionSettings(user_port=port, probes=(probe,)), dial_here)


def detecting(path: str = "/", fields: tuple[tuple[str, str], ...] = ()) -> HttpGet:
    return HttpGet(path, fields, detect_http2=True)


def message(status: int) -> bytes:
    """HealthCheckResponse with gRPC's prefix."""
    body = bytes([0x08, status]) if status else b""
    return b"\0" + len(body).to_bytes(4, "big") + body


def health(status: int, *trailers: tuple[str, str]) -> Answer:
    return saying(
        headers(*GRPC),
        frame(DATA, message(status)),
        headers(*(trailers or (("grpc-status", "0"),)), end=True),
    )


class TestDetection:
    async def test_http2_is_asked_first_without_then_with_the_headers(self) -> None:
        async with Http2Server(READY) as server:
            get = detecting("/healthz?x", (("X-Token", "s"), ("Host", "no"), ("connection", "no")))
            assert await prober(server.port, get).ready()
        first, second = server.conversations
        plain = [
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", f"127.0.0.1:{server.port}"),
            (":path", "/healthz?x"),
            ("user-agent", "kube-probe//"),
        ]
        assert first.fields == [*plain, ("accept-encoding", "gzip")]
        assert second.fields == [*plain, ("x-token", "s"), ("accept-encoding", "gzip")]
        # no table for our decoder, nothing pushed
        assert first.others == [(SETTINGS, 0, struct.pack("!HIHI", 1, 0, 2, 0))]

    async def test_what_the_answer_with_headers_says_decides(self) -> None:
        unready = saying(headers((":status", "503"), end=True))
        async with Http2Server(READY, unready) as server:
            http = prober(server.port, detecting())
            assert not await http.ready()
        assert http.last_error == "HTTP probe did not respond Ready, got status code: 503"

    async def test_a_container_of_http1_is_asked_once_without_the_headers(self) -> None:
        user = UserContainer()
        await user.start()
        user.on("*", ok(status="400 Bad Request"))  # to PRI * HTTP/2.0
        assert await prober(user.port, detecting("/up", (("X-Token", "s"),))).ready()
        assert [got.line for got in user.requests] == ["PRI * HTTP/2.0", "GET /up HTTP/1.1"]
        assert user.requests[1].field("x-token") is None
        user.on("/up", ok(status="500 Oh"))
        http = prober(user.port, detecting("/up"))
        assert not await http.ready()
        assert "status code: 500" in http.last_error
        await user.stop()

    async def test_a_container_that_leaves_the_question_unanswered_is_asked_in_http1(self) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            start = await reader.readuntil(b"\r\n\r\n")
            if start.startswith(b"GET /"):
                writer.write(ok())
            await reader.read(-1)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        assert await prober(server.sockets[0].getsockname()[1], detecting()).ready()
        server.close()

    async def test_an_unready_answer_over_http2_leaves_it_to_http1(self) -> None:
        async with Http2Server(saying(headers((":status", "503"), end=True))) as server:
            http = prober(server.port, detecting())
            assert not await http.ready()
        assert len(server.conversations) == 2  # the second was no preface

    async def test_nothing_is_remembered(self) -> None:
        async with Http2Server(READY) as server:
            http = prober(server.port, detecting())
            assert await http.ready()
            assert await http.ready()
        assert len(server.conversations) == 4

    async def test_without_the_feature_http2_is_not_tried(self) -> None:
        async with Http2Server(READY) as server:
            assert not await prober(server.port, HttpGet()).ready()
        assert len(server.conversations) == 1


class TestReading:
    """Whatever an HTTP/2 server may do that is not wrong."""

    @pytest.mark.parametrize(
        ("header_block", "ready"),
        [
            (b"\x88", True),  # :status 200, of the static table
            (b"\x8b", True),  # 304
            (b"\x8e", False),  # 500
            (b"\x20\x88", True),  # the table is given up first
            (b"\x48\x03" + b"307", True),  # name of the static table
            (b"\x08\x82\x64\x02", True),  # 302 in Huffman code (RFC 7541, C.6.1)
            (b"\x18\x03" + b"500", False),  # never indexed
            (b"\x88\x0f\x0d\x01" + b"0" + b"\x61\x03" + b"abc", True),  # fields that say nothing
        ],
    )
    async def test_header_blocks(self, header_block: bytes, ready: bool) -> None:
        answer = saying(frame(HEADERS, header_block, END_HEADERS | END_STREAM))
        async with Http2Server(answer) as server:
            http = prober(server.port, detecting())
            assert await http.ready() is ready
            assert len(server.conversations) == 2

    async def test_padding_priority_and_continuation(self) -> None:
        header_block = block((":status", "200"), ("x", "y" * 100))
        async with Http2Server(
            saying(
                frame(HEADERS, b"\x03" + bytes(5) + header_block[:5] + bytes(3), 0x28),
                frame(CONTINUATION, header_block[5:50]),
                frame(CONTINUATION, header_block[50:], END_HEADERS),
                frame(DATA, b"\x02ab" + bytes(2), END_STREAM | 0x8),
            )
        ) as server:
            assert await prober(server.port, detecting()).ready()

    async def test_an_interim_response_is_not_the_answer(self) -> None:
        early = headers((":status", "103"))
        async with Http2Server(saying(early, headers((":status", "200"), end=True))) as server:
            assert await prober(server.port, detecting()).ready()

    async def test_frames_may_come_byte_by_byte(self) -> None:
        async def slowly(conversation: Conversation) -> None:
            for byte in settings() + headers((":status", "204"), end=True):
                conversation.say(bytes([byte]))
                await conversation.writer.drain()
                await asyncio.sleep(0)

        async with Http2Server(slowly) as server:
            assert await prober(server.port, detecting()).ready()

    async def test_settings_and_pings_are_acknowledged(self) -> None:
        seen: list[tuple[int, int, bytes]] = []

        async def ask(conversation: Conversation) -> None:
            conversation.say(settings(), frame(PING, b"12345678", stream=0))
            for _ in range(2):
                kind, flags, _stream, payload = await conversation.frame()
                seen.append((kind, flags, payload))
            conversation.say(headers((":status", "200"), end=True))

        async with Http2Server(ask) as server:
            assert await prober(server.port, detecting()).ready()
        assert seen[:2] == [(SETTINGS, 1, b""), (PING, 1, b"12345678")]

    async def test_frames_of_other_kinds_and_streams_are_passed_over(self) -> None:
        async with Http2Server(
            saying(
                frame(8, struct.pack("!I", 1000), stream=0),
                frame(0x55, b"unknown"),
                frame(GOAWAY, struct.pack("!II", 1, 0), stream=0),
                headers((":status", "200"), end=True),
            )
        ) as server:
            assert await prober(server.port, detecting()).ready()

    async def test_a_long_path_is_sent_in_several_frames(self) -> None:
        async with Http2Server(READY) as server:
            path = "/" + "x" * 40_000
            assert await prober(server.port, detecting(path)).ready()
            assert server.conversations[0].field(":path") == path


class TestGrpc:
    async def test_serving_is_ready(self) -> None:
        async with Http2Server(health(1)) as server:
            assert await prober(server.port, grpc=GrpcCheck()).ready()
        (asked,) = server.conversations
        assert asked.fields == [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", f"127.0.0.1:{server.port}"),
            (":path", "/grpc.health.v1.Health/Check"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            ("grpc-timeout", "1000m"),
            ("user-agent", "kube-probe//"),
        ]
        assert asked.body == b"\0\0\0\0\0"

    async def test_the_service_is_named(self) -> None:
        async with Http2Server(health(1)) as server:
            assert await prober(server.port, grpc=GrpcCheck("eggs")).ready()
            assert await prober(server.port, grpc=GrpcCheck("x" * 300)).ready()
        short, long = server.conversations
        assert short.body == b"\0\0\0\0\x06\x0a\x04eggs"
        assert long.body == b"\0" + (303).to_bytes(4, "big") + b"\x0a\xac\x02" + b"x" * 300

    @pytest.mark.parametrize(
        ("status", "name"),
        [(0, "UNKNOWN"), (2, "NOT_SERVING"), (3, "SERVICE_UNKNOWN"), (9, "9")],
    )
    async def test_any_other_status_is_not(self, status: int, name: str) -> None:
        async with Http2Server(health(status)) as server:
            grpc = prober(server.port, grpc=GrpcCheck())
            assert not await grpc.ready()
        assert grpc.last_error == f"service unhealthy (responded with {name})"

    async def test_fields_of_later_versions_are_passed_over(self) -> None:
        body = b"\x12\x03abc\x18\x96\x01\x08\x01"
        answer = saying(
            headers(*GRPC),
            frame(DATA, b"\0\0\0\0\x0a" + body[:4]),
            frame(DATA, body[4:]),
            headers(("grpc-status", "0"), end=True),
        )
        async with Http2Server(answer) as server:
            assert await prober(server.port, grpc=GrpcCheck()).ready()

    @pytest.mark.parametrize(
        ("answer", "words"),
        [
            (health(1, ("grpc-status", "14"), ("grpc-message", "going")), "code 14: going"),
            (
                saying(headers(*GRPC, ("grpc-status", "12"), end=True)),
                "does not implement grpc.health.v1.Health",
            ),
            (saying(headers((":status", "404"), end=True)), "HTTP status 404"),
            (saying(headers(*GRPC, end=True)), "no gRPC"),
            (saying(headers(*GRPC), frame(DATA, b"", END_STREAM)), "no gRPC"),
            (
                saying(
                    headers(*GRPC),
                    frame(DATA, b"\x01\0\0\0\x02\x08\x01"),
                    headers(("grpc-status", "0"), end=True),
                ),
                "cut or compressed",
            ),
            (
                saying(
                    headers(*GRPC),
                    frame(DATA, b"\0\0\0\0\x01\x08"),
                    headers(("grpc-status", "0"), end=True),
                ),
                "cut",
            ),
            (saying(headers(*GRPC), frame(RESET, struct.pack("!I", 8))), "stream reset, error 8"),
            (saying(frame(GOAWAY, struct.pack("!II", 0, 11), stream=0)), "GOAWAY, error 11"),
            (saying(headers(("x", "y"), end=True)), "without status"),
            (saying(frame(DATA, b"", END_STREAM)), "without status"),
            (saying(frame(CONTINUATION, b"\x88")), "CONTINUATION of nothing"),
            (saying(frame(HEADERS, b"\x88"), frame(DATA, b"x")), "interrupted"),
            (saying(frame(HEADERS, b"\xbe", END_HEADERS)), "refused"),
            (saying(frame(HEADERS, b"\x7e\x01a", END_HEADERS)), "refused"),
            (saying(frame(HEADERS, b"\xff\xff\xff\xff\xff\xff", END_HEADERS)), "without end"),
            (saying(frame(HEADERS, b"\x08\x05ab", END_HEADERS)), "without end"),
            (saying(frame(HEADERS, b"\x08\x84\xff\xff\xff\xff", END_HEADERS)), "Huffman"),
            (saying(frame(HEADERS, b"\x08\x81\x00", END_HEADERS)), "Huffman"),
            (saying(frame(HEADERS, b"\x08", END_HEADERS)), "malformed"),
            (saying(frame(GOAWAY, b"x", stream=0)), "malformed"),
            (saying(*(frame(DATA, bytes(16384)) for _ in range(5))), "too much"),
            (saying(frame(HEADERS, b""), *[frame(CONTINUATION, bytes(16384))] * 5), "too many"),
            (saying(frame(DATA, bytes(16385))), "no HTTP/2"),
        ],
    )
    async def test_every_failure_has_words(self, answer: Answer, words: str) -> None:
        async with Http2Server(answer) as server:
            grpc = prober(server.port, grpc=GrpcCheck())
            assert not await grpc.ready()
        assert words in grpc.last_error

    async def test_a_server_of_http1_is_not_ready(self) -> None:
        user = UserContainer()
        await user.start()
        grpc = prober(user.port, grpc=GrpcCheck())
        assert not await grpc.ready()
        assert "no HTTP/2" in grpc.last_error
        await user.stop()

    async def test_a_server_that_hangs_up_is_not_ready(self) -> None:
        async def hang_up(conversation: Conversation) -> None:
            conversation.say(settings())
            conversation.writer.close()

        async with Http2Server(hang_up) as server:
            grpc = prober(server.port, grpc=GrpcCheck())
            assert not await grpc.ready()
        assert "EOF" in grpc.last_error or "reset" in grpc.last_error

    async def test_a_server_that_says_nothing_runs_into_the_limit(self) -> None:
        async def silent(conversation: Conversation) -> None:
            conversation.say(settings())

        async with Http2Server(silent) as server:
            grpc = prober(server.port, grpc=GrpcCheck())
            assert not await grpc.ready()
            assert "no answer within 1 s" in grpc.last_error
            conversation = server.conversations[0]
            async with asyncio.timeout(20):  # and its connection is dropped
                while not conversation.writer.is_closing():
                    await asyncio.sleep(0.001)

    async def test_nobody_listening_is_not_ready(self) -> None:
        async with Http2Server(READY) as server:
            port = server.port
        grpc = prober(port, grpc=GrpcCheck())
        assert not await grpc.ready()
        assert grpc.last_error.endswith("connect: connection refused")
