"""Input that is no HTTP, or could be read in two ways (contract section 3.12)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tests.contract.scenario import Scenario, add, scenario
from tests.contract.world import World
from tests.relay.rig import get


@dataclass(frozen=True)
class Case:
    """Bytes, as they are sent; `reset`s are as good as an end here."""

    name: str
    data: bytes

    async def play(self, world: World) -> None:
        client = await world.client()
        await world.ask("answer", self.data, client=client)
        rest = await world.rest(client)
        world.note("another answer", rest.split(b"\r\n")[0].decode("latin-1"))


HOST = b"Host: bench.example.com\r\n"
CASES = [
    Case("no_Host", b"GET / HTTP/1.1\r\n\r\n"),
    Case("two_Hosts", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    Case("a_Host_that_is_none", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    Case("a_header_without_a_colon", b"GET / HTTP/1.1\r\n" + HOST + b"Bad Header\r\n\r\n"),
    Case("a_blank_before_the_colon", b"GET / HTTP/1.1\r\n" + HOST + b"X-A : 1\r\n\r\n"),
    Case("an_empty_header_name", b"GET / HTTP/1.1\r\n" + HOST + b": 1\r\n\r\n"),
    Case("a_folded_header", b"GET / HTTP/1.1\r\n" + HOST + b"X-A: 1\r\n 2\r\n\r\n"),
    Case("a_header_folded_at_once", b"GET / HTTP/1.1\r\n X: 1\r\n" + HOST + b"\r\n"),
    Case("a_NUL_in_a_value", b"GET / HTTP/1.1\r\n" + HOST + b"X-A: a\0b\r\n\r\n"),
    Case("a_bare_CR_in_a_value", b"GET / HTTP/1.1\r\n" + HOST + b"X-A: a\rb\r\n\r\n"),
    Case("lines_that_end_in_LF_only", b"GET / HTTP/1.1\nHost: x\nUser-Agent: y\n\n"),
    Case(
        "two_lengths_that_differ",
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    ),
    Case(
        "two_lengths_that_agree",
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nab",
    ),
    Case("a_list_of_lengths", b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 2, 2\r\n\r\nab"),
    Case("a_negative_length", b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n"),
    Case("a_length_with_a_sign", b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: +2\r\n\r\nab"),
    Case("a_length_that_is_empty", b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length:\r\n\r\n"),
    Case(
        "a_length_and_chunks",
        b"POST / HTTP/1.1\r\n"
        + HOST
        + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
    ),
    Case(
        "an_encoding_we_dont_know",
        b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n",
    ),
    Case(
        "chunks_within_gzip",
        b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    ),
    Case(
        "chunked_twice",
        b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    Case(
        "chunked_in_HTTP_1_0",
        b"POST / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
    ),
    Case("HTTP_1_2", b"GET / HTTP/1.2\r\n" + HOST + b"\r\n"),
    Case("HTTP_3_0", b"GET / HTTP/3.0\r\n" + HOST + b"\r\n"),
    Case("no_version", b"GET /\r\n\r\n"),
    Case("a_version_in_lower_case", b"GET / http/1.1\r\n" + HOST + b"\r\n"),
    Case("two_blanks_in_the_request_line", b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n"),
    Case("a_target_that_is_no_path", b"GET x HTTP/1.1\r\n" + HOST + b"\r\n"),
    Case("a_method_that_is_no_token", b"G(T / HTTP/1.1\r\n" + HOST + b"\r\n"),
    Case("an_empty_line_before_the_request", b"\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n"),
    Case("a_TLS_hello_on_a_plain_port", bytes.fromhex("16030100500100004c0303") + b"\r\n\r\n"),
    Case("an_Expect_we_dont_know", b"GET / HTTP/1.1\r\n" + HOST + b"Expect: wonders\r\n\r\n"),
]
IN_PIECES = [
    Case("HTTP_0_9", b"GET /\r\n"),
    Case("HTTP_0_9_in_pieces", b"GE|T /|\r|\n"),
    Case("HTTP_0_9_that_ends_in_LF", b"GET /|\n"),
    Case("no_version_in_pieces", b"GET /\r\n|\r\n"),
    Case("no_target", b"GET\r\n|\r\n"),
    Case("HTTP_3_0_in_pieces", b"GET / HTTP/3.0\r\n|" + HOST + b"\r\n"),
    Case("HTTP_1_1_in_pieces", b"G|ET| /| HT|TP/1.|1\r|\n" + HOST + b"\r|\n"),
    Case("HTTP_1_0_in_pieces", b"GET / HTTP/1|.0\r\n\r|\n"),
]
"""Sent with a moment at each bar."""


class InPieces(Case):
    async def play(self, world: World) -> None:
        client = await world.client()
        *first, last = self.data.split(b"|")
        for piece in first:
            await client.send(piece)
            await asyncio.sleep(0.05)
        await world.ask("answer", last, client=client)
        world.note("another answer", (await world.rest(client)).split(b"\r\n")[0].decode("latin-1"))


for case in [*CASES, *(InPieces(case.name, case.data) for case in IN_PIECES)]:
    add(Scenario(case.name, "3.12", case.play))


@scenario("3.12")
async def a_chunk_size_that_is_no_number(world: World) -> None:
    await broken_body(world, b"xyz\r\nab\r\n0\r\n\r\n")


@scenario("3.12")
async def a_chunk_longer_than_it_says(world: World) -> None:
    await broken_body(world, b"1\r\nab\r\n0\r\n\r\n")


@scenario("3.12")
async def a_chunk_size_beyond_64_bits(world: World) -> None:
    await broken_body(world, b"11111111111111111\r\nab\r\n0\r\n\r\n")


async def broken_body(world: World, body: bytes) -> None:
    """How much of it the user container sees is a race; that it never sees its end is not."""
    client = await world.client()
    data = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + body
    await world.ask("answer", data, client=client)
    await world.rest(client)


@scenario("3.12")
async def a_head_of_more_than_1_MiB(world: World) -> None:
    client = await world.client()
    client.writer.write(get("/", f"X-Big: {'a' * 1_200_000}"))
    await world.answer("answer", client)


@scenario("3.12")
async def a_client_that_ends_within_its_head(world: World) -> None:
    client = await world.client()
    await client.send(b"GET / HTTP/1.1\r\nHos")
    world.note("the rest", (await world.rest(client)).split(b"\r\n")[0])


@scenario("3.12")
async def a_client_that_ends_within_its_body(world: World) -> None:
    client = await world.client()
    await client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 10\r\n\r\nabc")
    world.note("the rest", (await world.rest(client)).split(b"\r\n")[0])
