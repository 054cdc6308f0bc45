"""Which fields HTTP/2 lets through, and how they arrive (contract 3.3, 3.9; RFC 9113, 8.2)."""

from __future__ import annotations

from dataclasses import dataclass

from tests.contract.http2 import Fields, Stream
from tests.contract.scenario import Scenario, add
from tests.contract.scenarios.http2 import ask, speaking, tell
from tests.contract.world import World


@dataclass(frozen=True)
class Case:
    """A request with these fields, and a response."""

    name: str
    request: tuple[tuple[str, str], ...] = ()
    response: tuple[tuple[str, str], ...] = ()
    pseudo: tuple[tuple[str, str], ...] = ()

    async def play(self, world: World) -> None:
        async def answer(stream: Stream) -> None:
            await stream.all()
            await stream.headers([(":status", "200"), ("content-type", "a/b"), *self.response])
            await stream.data(b"hello", end=True)

        fields: Fields = ask("/", *self.request)
        for name, value in self.pseudo:
            fields = [(key, value if key == name else old) for key, old in fields]
        async with speaking(world) as (side, user):
            user.on("/", answer)
            await tell(world, "answer", await side.stream(fields))
            await tell(world, "the next", await side.stream(ask("/next")))


CASES = [
    Case("h2c_blanks_around_values", (("x-a", " b"), ("x-b", "c\t"), ("x-c", "  "))),
    Case("h2c_blanks_around_values_of_a_response", (), (("x-a", " b"), ("x-b", "c\t"))),
    Case("h2c_blanks_around_a_probe", (("k-network-probe", " probe"), ("k-network-hash", "x"))),
    Case("h2c_blanks_around_forwarded", (("x-forwarded-for", " 10.0.0.1 "),)),
    Case("h2c_a_control_character_in_a_value", (("x-a", "a\x01b"),)),
    Case("h2c_a_control_character_in_a_response", (), (("x-a", "a\x01b"),)),
    Case("h2c_a_NUL_in_a_value", (("x-a", "a\0b"),)),
    Case("h2c_a_line_end_in_a_value", (("x-a", "a\r\nx-b: c"),)),
    Case("h2c_a_line_end_in_a_response", (), (("x-a", "a\r\nx-b: c"),)),
    Case("h2c_latin_letters_in_a_value", (("x-a", "\xe4\xf6"),), (("x-a", "\xe4\xf6"),)),
    Case("h2c_a_name_in_capitals", (("X-A", "b"),)),
    Case("h2c_a_name_with_a_blank", (("x a", "b"),)),
    Case("h2c_a_Connection_field", (("connection", "close"),)),
    Case("h2c_a_TE_that_is_not_trailers", (("te", "gzip"),)),
    Case("h2c_a_Host_beside_the_authority", (("host", "other.example.com"),)),
    Case("h2c_a_path_that_is_none", pseudo=((":path", "x"),)),
    Case("h2c_an_authority_that_is_none", pseudo=((":authority", "a b"),)),
    Case("h2c_another_scheme", pseudo=((":scheme", "gopher"),)),
]
for case in CASES:
    add(Scenario(case.name, "3.9", case.play))
