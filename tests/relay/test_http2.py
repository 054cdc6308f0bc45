"""HTTP/2 through the relay (contract sections 3.2 to 3.9, 3.11, 3.12), both ends by hand."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable

import pytest

from tests.relay.h2pair import Gate, Pair
from tests.relay.h2rig import (
    CANCEL,
    GOAWAY,
    INTERNAL_ERROR,
    NO_ERROR,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    RST,
    SETTINGS,
    WINDOW_UPDATE,
    Message,
    Speaker,
    frame,
    never,
    request,
    reset,
    settings,
    told,
    window,
)
from tests.relay.rig import UserContainer
from weir.proxy.exchange import Client, Exchange, Head

MakePair = Callable[..., Awaitable[Pair]]
INITIAL_WINDOW, MAX_STREAMS, TABLE_SIZE = 4, 3, 1


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


# ---- resets and lost connections -------------------------------------------------------------


async def test_a_client_that_resets_its_stream_ends_it_at_the_user_container(
    pair: MakePair,
) -> None:
    made = await pair()
    made.user.on("/", never)
    client = await made.client()
    client.ask(1, request())
    await made.user.received(1)
    client.send(reset(1, CANCEL))
    user = made.user.connections[0]
    await asyncio.wait_for(made.settled(), 20)
    await made.user.was_reset(0)
    assert made.user.requests[0].reset == CANCEL
    assert made.relay.counters().aborted == 1
    assert (await client.get(3, path="/next")).status == 200
    assert made.user.connections == [user]


async def test_a_client_that_disconnects_ends_all_its_streams(pair: MakePair) -> None:
    made = await pair()
    made.user.on("/", never)
    client = await made.client()
    for stream in (1, 3, 5):
        client.ask(stream, request())
    await made.user.received(3)
    client.abort()
    await made.settled()
    assert made.relay.counters().aborted == 3


async def test_a_reset_before_the_response_is_502_and_after_it_a_reset(pair: MakePair) -> None:
    async def before(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(reset(stream, INTERNAL_ERROR))

    async def after(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, [(":status", "200")]), reset(stream, 0x77))

    made = await pair()
    made.user.on("/before", before)
    made.user.on("/after", after)
    client = await made.client()
    assert (await client.get(1, path="/before")).status == 502
    got = await client.get(3, path="/after")
    assert (got.status, got.reset) == (200, 0x77)


async def test_a_response_before_the_end_of_the_request_stops_the_upload(pair: MakePair) -> None:
    made = await pair()
    made.user.on("/", told, early=True)
    client = await made.client()
    client.send(client.headers(1, request("/", "POST")))
    await client.until(lambda: any(got.kind == RST for got in client.frames))
    got = client.messages[1]
    assert (got.status, got.ended, got.reset) == (200, True, NO_ERROR)
    client.send(client.data(1, b"late", True))  # it had not heard yet
    assert (await client.get(3)).status == 200
    await made.settled()


@pytest.mark.parametrize("begun", [False, True])
async def test_a_user_container_that_dies_is_502_or_a_reset(pair: MakePair, begun: bool) -> None:
    async def perish(speaker: Speaker, stream: int, message: Message) -> None:
        if begun:
            speaker.send(speaker.headers(stream, [(":status", "200")]))
            await speaker.writer.drain()
        speaker.writer.close()

    made = await pair()
    made.user.on("/", perish)
    client = await made.client()
    client.ask(1, request("/", "POST"), b"x")
    got = await client.message(1)
    if begun:
        assert (got.status, got.reset) == (200, INTERNAL_ERROR)
    else:
        assert (got.status, got.body) == (502, b"EOF\n")
    assert (await client.get(3, path="/alive")).status == 200, "on a new connection"


async def test_a_refused_user_port_is_502(pair: MakePair) -> None:
    made = await pair(user_port=1)
    got = await (await made.client()).get(1)
    assert got.status == 502
    assert got.body == b"dial tcp 127.0.0.1:1: connect: connection refused\n"


async def test_a_user_container_of_http_1_is_502(pair: MakePair) -> None:
    old = UserContainer()
    await old.start()
    old.on("*", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    made = await pair(user_port=old.port)
    got = await (await made.client()).get(1)
    assert got.status == 502
    assert got.body.startswith(b"http2: failed reading the frame payload")
    await old.stop()


async def test_a_get_on_a_connection_that_died_unnoticed_is_sent_once_more(pair: MakePair) -> None:
    async def once(speaker: Speaker, stream: int, message: Message) -> None:
        if len(made.user.connections) == 1:
            speaker.writer.close()
        else:
            await told(speaker, stream, message)

    made = await pair()
    made.user.on("/again", once)
    client = await made.client()
    assert (await client.get(1)).status == 200
    assert (await client.get(3, path="/again")).status == 200
    assert len(made.user.connections) == 2


async def test_a_post_is_not_sent_twice(pair: MakePair) -> None:
    async def close(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.writer.close()

    made = await pair()
    made.user.on("/again", close)
    client = await made.client()
    assert (await client.get(1)).status == 200
    client.ask(3, request("/again", "POST"), b"x")
    assert (await client.message(3)).status == 502
    assert [message.heads[0][":path"] for message in made.user.requests] == ["/", "/again"]


async def test_requests_that_a_goaway_disowns_go_to_a_new_connection(pair: MakePair) -> None:
    async def leave(speaker: Speaker, stream: int, message: Message) -> None:
        if len(made.user.connections) == 1:
            speaker.send(frame(GOAWAY, 0, 0, (stream - 2).to_bytes(4, "big") + bytes(4)))
        else:
            await told(speaker, stream, message)

    made = await pair()
    gate = Gate()
    made.user.on("/slow", gate)
    made.user.on("/moved", leave)
    client = await made.client()
    client.ask(1, request("/slow"))
    await made.user.received(1)
    assert (await client.get(3, path="/moved")).status == 200
    gate.open()
    assert (await client.message(1)).body == b"held", "what was begun is answered"
    assert len(made.user.connections) == 2


async def test_a_refused_stream_is_tried_once_more(pair: MakePair) -> None:
    times = 0

    async def refuse(speaker: Speaker, stream: int, message: Message) -> None:
        nonlocal times
        times += 1
        if times == 1:
            speaker.send(reset(stream, REFUSED_STREAM))
        else:
            await told(speaker, stream, message)

    made = await pair()
    made.user.on("/", refuse)
    assert (await (await made.client()).get(1)).status == 200
    assert times == 2


# ---- what the two peers set ------------------------------------------------------------------


async def test_streams_beyond_the_user_containers_limit_wait(pair: MakePair) -> None:
    made = await pair()
    made.user.settings = [(MAX_STREAMS, 2)]
    gate = Gate()
    made.user.on("/slow", gate)
    client = await made.client()
    assert (await client.get(1)).status == 200  # its settings are known from here
    for stream in (3, 5, 7, 9):
        client.ask(stream, request("/slow"))
    await made.user.received(3)
    await made.settled(4)
    assert gate.waiting == 2
    gate.open()
    for stream in (3, 5, 7, 9):
        assert (await client.message(stream)).status == 200


async def test_the_user_containers_windows_are_kept(pair: MakePair) -> None:
    made = await pair()
    made.user.settings = [(INITIAL_WINDOW, 10)]
    made.user.credits = False
    client = await made.client()
    assert (await client.get(1)).status == 200
    client.ask(3, request("/", "POST"), b"0123456789abcdef")
    user = made.user.connections[0]
    while 3 not in user.messages or len(user.messages[3].body) < 10:
        await asyncio.sleep(0.002)
    assert user.messages[3].body == b"0123456789"
    user.send(window(3, 4))
    while len(user.messages[3].body) < 14:
        await asyncio.sleep(0.002)
    user.send(settings((INITIAL_WINDOW, 100)))
    assert (await client.message(3)).body == b"0123456789abcdef"


async def test_a_client_that_gives_no_credit_holds_up_only_its_own_stream(pair: MakePair) -> None:
    async def large(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, [(":status", "200")]))
        for _ in range(4):
            speaker.send(speaker.data(stream, b"x" * 10_000))
        speaker.send(speaker.headers(stream, [("x-end", "1")], True))

    made = await pair()
    made.user.on("/large", large)
    client = await made.client((INITIAL_WINDOW, 1000))
    client.credits = False
    client.ask(1, request("/large"))
    await client.until(lambda: 1 in client.messages and len(client.messages[1].body) == 1000)
    assert (await client.get(3)).status == 200
    client.send(window(1, 500))
    await client.until(lambda: len(client.messages[1].body) == 1500)
    client.send(window(1, 100_000))
    got = await client.message(1)
    assert (len(got.body), got.trailers) == (40_000, {"x-end": "1"})


async def test_the_users_flood_is_held_back_by_windows(pair: MakePair) -> None:
    """An answer without end to a client that takes nothing: the relay buffers a window of it."""

    async def flood(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, [(":status", "200")]))
        room = 256 << 10  # of the stream, as the relay sets it
        while room:
            size = min(room, 16384)
            speaker.send(speaker.data(stream, b"x" * size))
            room -= size

    made = await pair()
    made.user.on("/", flood)
    client = await made.client((INITIAL_WINDOW, 0))
    client.credits = False
    client.ask(1, request())
    await client.until(lambda: 1 in client.messages and bool(client.messages[1].heads))
    user = made.user.connections[0]
    assert not [got for got in user.frames if got.kind == 8 and got.stream == 1], "no credit"
    client.send(window(1, 1 << 20), window(0, 1 << 20))
    await client.until(lambda: len(client.messages[1].body) == 256 << 10)


async def test_a_peer_that_wants_no_table_is_told_that_there_is_none(pair: MakePair) -> None:
    made = await pair()
    made.user.settings = [(TABLE_SIZE, 0)]
    client = await made.client((TABLE_SIZE, 0))
    client.decoder.max_allowed_table_size = 0
    for stream in (1, 3, 5):
        assert (await client.get(stream)).status == 200


# ---- the end ---------------------------------------------------------------------------------


async def test_a_drained_relay_says_goaway_to_idle_clients_and_closes(pair: MakePair) -> None:
    made = await pair()
    client = await made.client()
    assert (await client.get(1)).status == 200
    await made.relay.drained()
    goaway = await client.closed()
    assert goaway is not None
    assert (goaway.payload[:4], goaway.code) == (b"\0\0\0\1", NO_ERROR)


async def test_blanks_around_values_are_passed_on_as_they_came(pair: MakePair) -> None:
    async def blank(speaker: Speaker, stream: int, message: Message) -> None:
        speaker.send(speaker.headers(stream, [(":status", "200"), ("x-b", " c\t")], True))

    made = await pair()
    made.user.on("/", blank)
    client = await made.client()
    got = await client.get(1, ("x-a", " b "), ("user-agent", " kube-probe/1"))
    assert got.final["x-b"] == " c\t"
    assert made.user.requests[0].final["x-a"] == " b ", "and a blank before it makes no probe"


async def test_http_1_clients_are_served_as_before(pair: MakePair) -> None:
    old = UserContainer()
    await old.start()
    made = await pair(user_port=old.port)
    client = await made.bare()
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (await client.reader.readline()) == b"HTTP/1.1 200 OK\r\n"
    await old.stop()


async def test_a_user_container_that_dies_while_it_is_idle_is_dialled_anew(pair: MakePair) -> None:
    made = await pair()
    client = await made.client()
    assert (await client.get(1)).status == 200
    made.user.connections[0].writer.close()
    await made.user.gone(1)
    client.ask(3, request("/", "POST"), b"x")
    assert (await client.message(3)).status == 200
    assert len(made.user.connections) == 2
