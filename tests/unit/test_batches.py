"""Events gathered into batches: when they go, and what each of them is told."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weir.adaptor.batches import SMALLEST_LIMIT, Batcher, to_be_halved
from weir.adaptor.sending import Batch
from weir.proxy.wire.client import Response, TransportError

NEVER = 60.0
HEAD = b"POST / HTTP/1.1\r\n"


class Client:
    """Keeps what it is asked; answers when told, or at once by `rule`."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.answers: list[asyncio.Future[Response]] = []
        self.bad: set[int] = set()
        self.most = 10**9
        self.at_once = False

    def request(self, head: bytes, body: bytes, timeout: float) -> asyncio.Future[Response]:
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        events = json.loads(body)
        self.asked.append([event if isinstance(event, int) else event["n"] for event in events])
        self.answers.append(answer)
        if self.at_once:
            answer.set_result(Response(self._status(len(body)), (), b""))
        return answer

    def _status(self, size: int) -> int:
        if size > self.most:
            return 413
        return 400 if self.bad & set(self.asked[-1]) else 202


def ask(batcher: Batcher, number: int) -> asyncio.Future[Response]:
    return batcher.request(HEAD, b"[%d]" % number, 1.0)


async def settled(*answers: asyncio.Future[Response]) -> list[int]:
    return [each.status for each in await asyncio.gather(*answers)]


async def test_a_batch_goes_when_it_has_its_number_of_events() -> None:
    client = Client()
    batcher = Batcher(Batch(3, 1000, NEVER), client)
    first, second = ask(batcher, 1), ask(batcher, 2)
    assert client.asked == []
    third = ask(batcher, 3)
    assert client.asked == [[1, 2, 3]]
    client.answers[0].set_result(Response(200, (), b""))
    assert await settled(first, second, third) == [200, 200, 200]


async def test_a_batch_goes_when_its_first_event_has_waited_long_enough() -> None:
    client = Client()
    client.at_once = True
    batcher = Batcher(Batch(100, 1000, 0.001), client)
    assert await settled(ask(batcher, 1), ask(batcher, 2)) == [202, 202]
    assert client.asked == [[1, 2]]
    assert await settled(ask(batcher, 3)) == [202]


async def test_no_batch_is_larger_than_its_limit_but_one_event_that_is() -> None:
    client = Client()
    batcher = Batcher(Batch(100, 12, NEVER), client)
    for number in (111, 222, 333):  # [111,222] has 9 bytes, a third one would make it 13
        ask(batcher, number)
    assert client.asked == [[111, 222]]
    ask(batcher, 10**20)
    assert client.asked == [[111, 222], [333], [10**20]]


async def test_events_that_are_gathered_go_at_once_when_we_stop() -> None:
    client = Client()
    batcher = Batcher(Batch(100, 1000, NEVER), client)
    ask(batcher, 1)
    batcher.hurry()
    ask(batcher, 2)
    assert client.asked == [[1], [2]]


async def test_one_bad_event_has_its_refusal_to_itself() -> None:
    client = Client()
    client.at_once, client.bad = True, {5}
    batcher = Batcher(Batch(8, 1000, NEVER), client)
    answers = [ask(batcher, number) for number in range(8)]
    assert await settled(*answers) == [202, 202, 202, 202, 202, 400, 202, 202]
    assert client.asked[0] == list(range(8))
    assert len(client.asked) == 7  # 8, two of 4, two of 2, two of 1


async def test_a_batch_that_is_too_large_goes_in_smaller_ones_from_then_on() -> None:
    client = Client()
    client.at_once, client.most = True, 3 * SMALLEST_LIMIT
    batcher = Batcher(Batch(8, 100 * SMALLEST_LIMIT, NEVER), client)

    def large(number: int) -> asyncio.Future[Response]:
        event = json.dumps({"n": number, "data": "x" * (SMALLEST_LIMIT // 2)}).encode()
        return batcher.request(HEAD, b"[%s]" % event, 1.0)

    assert await settled(*[large(number) for number in range(8)]) == [202] * 8
    assert client.asked == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7]]
    later = [large(number) for number in range(8, 16)]
    batcher.hurry()
    assert await settled(*later) == [202] * 8
    assert max(len(each) for each in client.asked[3:]) <= 4


async def test_an_event_too_large_for_the_sink_keeps_its_413() -> None:
    client = Client()
    client.at_once, client.most = True, 3
    batcher = Batcher(Batch(2, 1000, NEVER), client)
    assert await settled(ask(batcher, 1), ask(batcher, 22)) == [202, 413]


@pytest.mark.parametrize("status", [200, 202, 301, 401, 404, 408, 409, 410, 415, 429, 500, 503])
async def test_what_a_smaller_batch_would_not_change_is_told_to_every_event(status: int) -> None:
    client = Client()
    batcher = Batcher(Batch(2, 1000, NEVER), client)
    answers = [ask(batcher, number) for number in (1, 2)]
    client.answers[0].set_result(Response(status, (), b""))
    assert await settled(*answers) == [status, status]
    assert len(client.asked) == 1


@pytest.mark.parametrize("status", [400, 406, 413, 422, 451])
def test_a_refusal_of_the_content_is_looked_into(status: int) -> None:
    assert to_be_halved(status)


async def test_a_lost_connection_is_every_events_failure() -> None:
    client = Client()
    batcher = Batcher(Batch(2, 1000, NEVER), client)
    answers = [ask(batcher, number) for number in (1, 2)]
    client.answers[0].set_exception(TransportError("reset", sent=True))
    for each in answers:
        with pytest.raises(TransportError, match="reset"):
            await each


@settings(deadline=None)
@given(
    bad=st.sets(st.integers(0, 19)),
    count=st.integers(1, 20),
    events=st.integers(1, 20),
)
def test_every_event_gets_the_answer_that_it_would_get_alone(
    bad: set[int], count: int, events: int
) -> None:
    async def scenario() -> None:
        client = Client()
        client.at_once, client.bad = True, bad
        batcher = Batcher(Batch(events, 1000, NEVER), client)
        answers = [ask(batcher, number) for number in range(count)]
        batcher.hurry()
        assert await settled(*answers) == [400 if n in bad else 202 for n in range(count)]
        assert len(client.asked) <= 2 * count

    asyncio.run(scenario())
