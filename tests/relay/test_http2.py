"""HTTP/2 through the relay (contract sections 3.2 to 3.9, 3.11), both ends by hand."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable

import pytest

from tests.relay.h2pair import Gate, Pair
from tests.relay.h2rig import (
    CANCEL,
    PROTOCOL_ERROR,
    SETTINGS,
    WINDOW_UPDATE,
    Message,
    Speaker,
    never,
    request,
    reset,
)
from weir.proxy.exchange import Client, Exchange, Head

MakePair = Callable[..., Awaitable[Pair]]
INITIAL_WINDOW = 4


# ---- requests and responses ------------------------------------------------------------------


async def test_a_request_passes_with_its_body_and_so_does_the_answer(pair: MakePair) -> None:
    made = await pair()
    client = await made.client()
    client.ask(1, request("/a//b?c=%2F", "POST", ("x-y", "z")), b"hello")
    answer = await client.message(1)
    assert (answer.status, answer.body) == (200, b"hello")
    assert answer.final["content-type"] == "text/plain"
    assert "date" in answer.final
    (got,) = made.user.requests
    head = got.heads[0]
    assert (head[":method"], head[":path"]) == ("POST", "/a//b?c=%2F")
    assert (head[":authority"], head["x-y"]) == ("a.b", "z")
    await made.settled()
    counters = made.relay.counters()
    assert (counters.requests, counters.statuses) == (1, (0, 1, 0, 0, 0))


async def test_headers_are_rewritten_as_for_http_1(pair: MakePair) -> None:
    made = await pair()
    client = await made.client()
    await client.get(
        1,
        ("knative-serving-revision", "r"),
        ("knative-serving-namespace", "n"),
        ("k-original-host", "true.example"),
        ("x-forwarded-for", "1.2.3.4"),
        ("x-forwarded-proto", "https"),
        ("te", "trailers"),
        ("cookie", "a=b"),
        ("cookie", "c=d"),
    )
    (got,) = made.user.requests
    fields = got.fields[0]
    head = got.heads[0]
    assert head[":authority"] == "true.example"
    assert head["x-forwarded-for"] == "1.2.3.4, 127.0.0.1"
    assert head["forwarded"] == "for=1.2.3.4;proto=https"
    assert head["te"] == "trailers"
    assert [value for name, value in fields if name == "cookie"] == ["a=b", "c=d"]
    assert not {"knative-serving-revision", "knative-serving-namespace", "k-original-host"} & {
        *head
    }


async def test_a_second_request_with_the_same_head_gets_its_own_answer(pair: MakePair) -> None:
    made = await pair()
    client = await made.client()
    for stream in (1, 3, 5, 7):
        client.ask(stream, request("/", "POST"), b"%d" % stream)
        assert (await client.message(stream)).body == b"%d" % stream
    assert [message.body for message in made.user.requests] == [b"1", b"3", b"5", b"7"]
    assert len(made.user.connections) == 1


async def test_two_clients_have_two_connections_to_the_user_container(pair: MakePair) -> None:
    made = await pair()
    one, two = await made.client(), await made.client()
    assert (await one.get(1)).status == (await two.get(1)).status == 200
    assert len(made.user.connections) == 2
    one.abort()
    await made.user.gone(1)
    assert (await two.get(3)).status == 200


async def test_streams_are_answered_in_any_order(pair: MakePair) -> None:
    made = await pair()
    gate = Gate()
    made.user.on("/slow", gate)
    client = await made.client()
    client.ask(1, request("/slow"))
    assert (await client.get(3)).status == 200
    assert not client.messages.get(1)
    gate.open()
    assert (await client.message(1)).body == b"held"


async def test_trailers_pass_both_ways(pair: MakePair) -> None:
    async def answer(speaker: Speaker, stream: int, message: Message) -> None:
        trailers = speaker.headers(stream, [("grpc-status", "0")], True)
        head = speaker.headers(stream, [(":status", "200")])
        speaker.send(head, speaker.data(stream, b"body"), trailers)

    made = await pair()
    made.user.on("/", answer)
    client = await made.client()
    client.send(
        client.headers(1, request("/", "POST")),
        client.data(1, b"x"),
        client.headers(1, [("x-sum", "1")], True),
    )
    got = await client.message(1)
    assert (got.body, got.trailers) == (b"body", {"grpc-status": "0"})
    assert made.user.requests[0].heads[1] == {"x-sum": "1"}


async def test_a_response_of_trailers_only_passes(pair: MakePair) -> None:
    async def answer(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, [(":status", "200"), ("grpc-status", "5")], True))

    made = await pair()
    made.user.on("/", answer)
    got = await (await made.client()).get(1)
    assert (got.status, got.final["grpc-status"], got.body) == (200, "5", b"")


async def test_interim_responses_pass_and_the_final_status_is_the_true_one(pair: MakePair) -> None:
    async def answer(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, [(":status", "103"), ("link", "</a>")]))
        speaker.send(speaker.headers(stream, [(":status", "404")], True))

    made = await pair()
    made.user.on("/", answer)
    got = await (await made.client()).get(1)
    assert [head[":status"] for head in got.heads] == ["103", "404"]
    await made.settled()
    assert made.relay.counters().statuses == (0, 0, 0, 1, 0)


async def test_both_sides_stream_at_once(pair: MakePair) -> None:
    """Each piece comes back before the next one is sent."""

    async def echo(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, [(":status", "200")]))
        sent = 0
        while not (message.ended and sent == len(message.body)):
            if sent < len(message.body):
                piece, sent = message.body[sent:], len(message.body)
                speaker.send(speaker.data(stream, piece))
            await asyncio.sleep(0.001)
        speaker.send(speaker.data(stream, b"", True))

    made = await pair()
    made.user.on("/", echo, early=True)
    client = await made.client()
    client.send(client.headers(1, request("/", "POST")))
    for number in range(1, 21):
        client.send(client.data(1, b"p" * 1000))
        await client.until(lambda: 1 in client.messages and bool(client.messages[1].heads))
        await client.until(lambda n=number: len(client.messages[1].body) == n * 1000)  # type: ignore[misc]
    client.send(client.data(1, b"", True))
    assert len((await client.message(1)).body) == 20_000


async def in_pieces(speaker: Speaker, stream: int, message: Message) -> None:
    """The body that came, as fast as the relay gives credit for it."""

    def credit(of: int, first: int) -> int:
        updates = [got for got in speaker.frames if (got.kind, got.stream) == (WINDOW_UPDATE, of)]
        return first + sum(int.from_bytes(got.payload, "big") for got in updates)

    speaker.send(speaker.headers(stream, [(":status", "200")]))
    sent = 0
    while sent < len(message.body):
        room = min(credit(0, 65535), credit(stream, 256 << 10)) - sent
        piece = message.body[sent : sent + min(room, 16384)] if room > 0 else b""
        speaker.send(speaker.data(stream, piece) if piece else b"")
        sent += len(piece)
        await asyncio.sleep(0 if piece else 0.001)
    speaker.send(speaker.data(stream, b"", True))


async def test_large_bodies_pass_whole_in_both_directions(pair: MakePair) -> None:
    made = await pair()
    made.user.on("/", in_pieces)
    client = await made.client()
    body = bytes(range(256)) * 8000
    client.send(client.headers(1, request("/", "POST")))
    sent, credit = 0, {0: 65535, 1: 65535}
    while sent < len(body):
        room = min(*credit.values(), 16384, len(body) - sent)
        if room > 0:
            client.send(client.data(1, body[sent : sent + room]))
            sent += room
            credit = {stream: left - room for stream, left in credit.items()}
            continue
        got = await client.frame()
        if got.kind == WINDOW_UPDATE:
            credit[got.stream] += int.from_bytes(got.payload, "big")
        elif got.kind == SETTINGS and got.payload:
            credit[1] += dict(struct.iter_unpack(">HI", got.payload))[INITIAL_WINDOW] - 65535
    client.send(client.data(1, b"", True))
    assert (await client.message(1)).body == body


async def test_observers_are_told_of_streams_as_of_other_requests(pair: MakePair) -> None:
    seen: list[tuple[object, ...]] = []

    class Watcher:
        def begun(self, exchange: Exchange) -> None:
            exchange.head.replace({b"x-trace": b"1", b"x-old": b""})

        def over(self, exchange: Exchange, now: float) -> None:
            head = exchange.head
            seen.append((head.version, head.method, head.target, head.length, exchange.status))
            seen.append((exchange.user_status, exchange.received, exchange.sent, exchange.failure))

        def probed(
            self, client: Client, head: Head, status: int, size: int, seconds: float
        ) -> None:
            seen.append((head.version, status, size))

    made = await pair()
    made.relay.observers.append(Watcher())
    client = await made.client()
    await client.get(1, ("x-old", "gone"), path="/a")
    client.ask(3, request("/b", "POST"), b"12345")
    await client.message(3)
    await client.get(5, ("k-network-probe", "probe"), ("k-network-hash", "h"))
    await made.settled()
    assert seen == [
        (b"HTTP/2.0", b"GET", b"/a", 0, 200),
        (200, 0, 0, ""),
        (b"HTTP/2.0", b"POST", b"/b", None, 200),
        (200, 5, 5, ""),
        (b"HTTP/2.0", 200, 0),
    ]
    head = made.user.requests[0].heads[0]
    assert (head["x-trace"], head.get("x-old")) == ("1", None)


# ---- probes ----------------------------------------------------------------------------------


async def test_probes_are_answered_on_a_stream_and_never_reach_the_user(pair: MakePair) -> None:
    made = await pair()
    client = await made.client()
    ready = await client.get(
        1, ("user-agent", "Knative-Activator-Probe"), ("k-network-probe", "queue")
    )
    assert (ready.status, ready.body) == (200, b"queue")
    network = await client.get(3, ("k-network-probe", "probe"), ("k-network-hash", "h"))
    assert (network.status, network.final["k-network-hash"]) == (200, "h")
    without = await client.get(5, ("k-network-probe", "probe"))
    assert (without.status, without.final["x-content-type-options"]) == (400, "nosniff")
    made.relay.start_draining()
    assert (await client.get(7, ("user-agent", "kube-probe/1"))).status == 503
    assert (await client.get(9)).status == 200, "traffic goes on"
    assert len(made.user.requests) == 1
    assert made.relay.counters().requests == 1


# ---- breaker and timers ----------------------------------------------------------------------


async def test_streams_wait_for_their_turn_and_the_twelfth_gets_503(pair: MakePair) -> None:
    made = await pair(container_concurrency=1)
    gate = Gate()
    made.user.on("/", gate)
    client = await made.client()
    for stream in range(1, 25, 2):
        client.ask(stream, request())
    refused = await client.message(23)
    assert (refused.status, refused.body) == (503, b"pending request queue full\n")
    await made.user.received(1)
    assert gate.waiting == 1
    gate.open()
    for stream in range(1, 23, 2):
        assert (await client.message(stream)).status == 200


async def test_a_waiting_stream_that_is_reset_gives_up_its_place(pair: MakePair) -> None:
    made = await pair(container_concurrency=1)
    gate = Gate()
    made.user.on("/", gate)
    client = await made.client()
    for stream in (1, 3, 5):
        client.ask(stream, request("/", "POST"), b"x" * 100)
    await made.counted(3)
    client.send(reset(3))
    await made.settled(2)
    gate.open()
    assert (await client.message(5)).status == 200
    assert len(made.user.requests) == 2


async def test_without_an_answer_in_time_it_is_504(pair: MakePair) -> None:
    made = await pair(timeout=0.2)
    made.user.on("/", never)
    client = await made.client()
    got = await client.get(1)
    assert (got.status, got.body) == (504, b"request timeout")
    await made.user.was_reset(0)
    assert made.user.requests[0].reset == CANCEL
    assert (await client.get(3, path="/other")).status == 200, "the connection is still good"


@pytest.mark.parametrize("sized", [False, True])
async def test_a_timer_after_the_begin_ends_the_response(pair: MakePair, sized: bool) -> None:
    async def begin(speaker: Speaker, stream: int, message: Message) -> None:
        more = [("content-length", "100")] if sized else []
        speaker.send(speaker.headers(stream, [(":status", "200"), *more]))
        speaker.send(speaker.data(stream, b"some"))

    made = await pair(timeout=0.2)
    made.user.on("/", begin)
    got = await (await made.client()).get(1)
    if sized:
        assert (got.body, got.reset) == (b"some", PROTOCOL_ERROR)
    else:
        assert (got.body, got.ended, got.reset) == (b"somerequest timeout", True, None)
