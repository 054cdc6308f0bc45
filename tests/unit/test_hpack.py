"""Header compression, with the `hpack` package as the witness (RFC 7541)."""

from __future__ import annotations

import hpack
import pytest
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hypothesis import given
from hypothesis import strategies as st

from weir.proxy.wire.h2 import huffman
from weir.proxy.wire.h2.hpack import TABLE_BYTES, Decoder, HpackError, TooLarge, encode

LIMIT = 1 << 20
ENCODER = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)

names = st.sampled_from([b":path", b":method", b"a", b"x-y", b"cookie", b"content-type", b"date"])
values = st.one_of(st.sampled_from([b"", b"/", b"GET", b"z" * 300]), st.binary(max_size=60))
fields = st.lists(st.tuples(names, values), max_size=12)


@given(st.binary(max_size=200))
def test_what_was_huffman_coded_is_decoded(text: bytes) -> None:
    assert huffman.decode(ENCODER.encode(text)) == text


@pytest.mark.parametrize(
    "coded",
    [
        b"\xff\xff\xff\xff",  # EOS, and more than a byte of padding
        b"\x1f\xff",  # a letter, then eleven bits of padding
        b"\x18",  # a letter, padded with zeros
    ],
)
def test_what_is_no_huffman_code_is_refused(coded: bytes) -> None:
    with pytest.raises(huffman.HuffmanError):
        huffman.decode(coded)


@given(st.lists(st.tuples(fields, st.sampled_from([None, None, None, 0, 64, 4096])), max_size=20))
def test_the_table_follows_that_of_the_encoder(
    blocks: list[tuple[list[tuple[bytes, bytes]], int | None]],
) -> None:
    encoder, decoder = hpack.Encoder(), Decoder(LIMIT)
    for block, room in blocks:
        if room is not None:
            encoder.header_table_size = room
        for _ in range(2):  # the second time it may be remembered
            assert decoder.decode(encoder.encode(block)).fields == tuple(block)


@given(fields)
def test_what_we_encode_needs_no_table(block: list[tuple[bytes, bytes]]) -> None:
    decoder = hpack.Decoder()
    decoder.header_table_size = 0
    coded = encode(block)
    assert [(bytes(n), bytes(v)) for n, v in decoder.decode(coded, raw=True)] == block
    assert decoder.header_table.dynamic_entries == type(decoder.header_table.dynamic_entries)()


@given(fields, fields)
def test_blocks_of_ours_can_be_joined(
    one: list[tuple[bytes, bytes]], two: list[tuple[bytes, bytes]]
) -> None:
    assert Decoder(LIMIT).decode(encode(one) + encode(two)).fields == (*one, *two)


def test_the_same_bytes_are_decoded_once_while_they_mean_the_same() -> None:
    decoder = Decoder(LIMIT)
    adds = b"\x40\x01a\x01b"
    decoder.decode(adds)
    first = decoder.decode(b"\xbe")
    assert first.fields == ((b"a", b"b"),)
    assert decoder.decode(b"\xbe") is first
    decoder.decode(b"\x40\x01c\x01d")
    assert decoder.decode(b"\xbe").fields == ((b"c", b"d"),)
    assert decoder.decode(b"\xbf").fields == ((b"a", b"b"),)


@pytest.mark.parametrize("name", [b"authorization", b"cookie", b"proxy-authorization"])
def test_secrets_are_never_to_be_indexed(name: bytes) -> None:
    assert encode([(name, b"secret")])[0] & 0xF0 == 0x10


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (b"\x80", "no entry 0"),
        (b"\xbe", "no entry 62"),
        (b"\xff\xff\xff\xff\xff\xff\x01", "too large"),
        (b"\x40\x05ab", "behind its block"),
        (b"\x40", "too early"),
        (b"\x82\x20", "changes its size within"),
        (b"\x3f\xe2\x1f", "larger than allowed"),
        (b"\x40\x81\x18\x01a", "padding"),
    ],
)
def test_a_block_that_cannot_be_decoded_is_an_error(block: bytes, why: str) -> None:
    with pytest.raises(HpackError, match=why):
        Decoder(LIMIT).decode(block)


def test_a_bomb_of_references_is_too_large_and_leaves_the_table_right() -> None:
    decoder = Decoder(10_000)
    decoder.decode(encode([]) + b"\x40\x01a\x7f\x81\x0f" + b"v" * 2048)
    with pytest.raises(TooLarge):
        decoder.decode(b"\xbe" * 1000 + b"\x40\x01c\x01d")
    assert decoder.decode(b"\xbe").fields == ((b"c", b"d"),)


@given(st.binary(max_size=300))
def test_garbage_is_an_error_or_fields(block: bytes) -> None:
    decoder = Decoder(LIMIT)
    try:
        decoder.decode(block)
    except HpackError:
        return
    assert decoder._size <= TABLE_BYTES


def test_a_block_of_literals_is_remembered_with_what_it_adds() -> None:
    decoder = Decoder(LIMIT)
    literals = b"\x88\x40\x01a\x01b"
    first = decoder.decode(literals)
    decoder.decode(b"\x40\x01c\x01d")
    assert decoder.decode(literals) is first
    assert decoder.decode(b"\xbe\xbf\xc0").fields == ((b"a", b"b"), (b"c", b"d"), (b"a", b"b"))


@given(st.lists(st.integers(0, 5), max_size=60))
def test_remembering_never_changes_what_is_read(order: list[int]) -> None:
    """The same few blocks in any order: literals, references, sizes; the witness forgets nothing
    and remembers nothing."""
    blocks = [
        b"\x82\x40\x01a\x7f\x81\x0f" + b"v" * 2048,
        b"\x40\x01b\x01c\x40\x01d\x01e",
        b"\x00\x01f\x01g\x86",
        b"\xbe",
        b"\xbf\x40\x01h\x01i",
        b"\x3f\xe1\x1f\x40\x01j\x01k",
    ]
    decoder, witness = Decoder(LIMIT), hpack.Decoder()
    for number in order:
        try:
            expected = witness.decode(blocks[number], raw=True)
        except hpack.HPACKError:
            with pytest.raises(HpackError):
                decoder.decode(blocks[number])
            return
        assert decoder.decode(blocks[number]).fields == tuple(
            (bytes(name), bytes(value)) for name, value in expected
        )
