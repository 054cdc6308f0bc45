"""When an event is tried again: the pipeline against Knative's formula, on a clock of our own."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from email.utils import formatdate
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import mqtt5
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.adaptor.delivery import Pipeline
from weir.adaptor.mapping import Mapper
from weir.adaptor.outgoing import Flow
from weir.adaptor.quarantine import Quarantine, QuarantineWriter
from weir.adaptor.retry import LONGEST_BACKOFF, LONGEST_RETRY_AFTER, Delivery, retry_after
from weir.adaptor.routes import parse
from weir.proxy.wire.client import Response, TransportError

NOW = 1_700_000_000


def formula(policy: str, delay: Fraction, attempt: int) -> Fraction:
    """delay * 2^n or delay * n, with n from 0, as Knative's HTTP library counts."""
    return delay * (2**attempt if policy == "exponential" else attempt)


@given(
    st.sampled_from(["linear", "exponential"]),
    st.fractions(0, 100, max_denominator=1000),
    st.integers(0, 200),
    st.sampled_from([429, 503, 500, 404]),
    st.none() | st.integers(0, 10**7),
    st.booleans(),
    st.none() | st.integers(0, 10**6),
)
def test_a_wait_is_what_the_specification_says(
    policy: str,
    delay: Fraction,
    attempt: int,
    status: int,
    asked: int | None,
    as_date: bool,
    longest: int | None,
) -> None:
    """With retryAfterMax: max(backoff, min(Retry-After, max)), on 429 and 503 only; 0 disables."""
    delivery = Delivery(
        policy="linear" if policy == "linear" else "exponential",
        delay=float(delay),
        retry_after_max=LONGEST_RETRY_AFTER if longest is None else float(longest),
    )
    value = None
    if asked is not None:
        value = (formatdate(NOW + asked, usegmt=True) if as_date else str(asked)).encode()
    heard = retry_after(status, value, NOW)
    wanted = min(formula(policy, delay, attempt), Fraction(LONGEST_BACKOFF))
    if asked is not None and status in (429, 503):
        cap = LONGEST_RETRY_AFTER if longest is None else longest
        wanted = max(wanted, Fraction(min(asked, cap)))
    assert delivery.backoff(attempt, heard) == pytest.approx(float(wanted))


# --- the pipeline on a clock of our own -------------------------------------------------------


class _Instant(selectors.SelectSelector):
    """Waits for no time at all, and moves the clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.instant = _Instant()
        super().__init__(self.instant)

    def time(self) -> float:
        return self.instant.now


class _Sink:
    """Answers at once. `attempts`: when it was asked."""

    def __init__(self, loop: _Loop, answer: Callable[[int], Response | TransportError]) -> None:
        self._loop, self._answer = loop, answer
        self.attempts: list[float] = []

    def request(self, head: bytes, body: bytes, timeout: float) -> asyncio.Future[Response]:
        self.attempts.append(self._loop.time())
        made: asyncio.Future[Response] = self._loop.create_future()
        answer = self._answer(len(self.attempts))
        if isinstance(answer, Response):
            made.set_result(answer)
        else:
            made.set_exception(answer)
        return made


def attempts_of(
    delivery: str, answer: Callable[[int], Response | TransportError], folder: Path, until: int
) -> list[float]:
    """When one event was tried, until it is gone or there were so many."""
    loop = _Loop()

    async def main() -> list[float]:
        keeper = QuarantineWriter(Quarantine(folder / "q.db"))
        (route,) = parse(f"routes: [{{filter: a, sink: 'http://s/', delivery: {delivery}}}]")
        sink = _Sink(loop, answer)
        flow = Flow(route, Mapper(route, "b"), 1)
        pipeline = Pipeline("s", b"POST / HTTP/1.1\r\n", sink, keeper, [flow], limit=4)
        pipeline.receive(mqtt5.PublishPacket("a", b"1", qos=mqtt5.QoS.AT_MOST_ONCE), None)
        while flow.counters.pending and len(sink.attempts) < until:
            await asyncio.sleep(0.001)
        pipeline.stop()
        keeper.close()
        return sink.attempts

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main())


def answers(status: int, *headers: tuple[bytes, bytes]) -> Callable[[int], Response]:
    return lambda _: Response(status, headers, b"")


@pytest.mark.parametrize("policy", ["linear", "exponential"])
@pytest.mark.parametrize("retry", [0, 1, 7])
def test_an_event_is_tried_exactly_as_often_and_when_its_route_says(
    tmp_path: Path, policy: str, retry: int
) -> None:
    delivery = f"{{retry: {retry}, backoffPolicy: {policy}, backoffDelay: PT0.5S}}"
    found = attempts_of(delivery, answers(500), tmp_path, retry + 2)
    waits = [formula(policy, Fraction(1, 2), n) for n in range(retry)]
    expected = [float(sum(waits[:n])) for n in range(retry + 1)]
    assert found == pytest.approx(expected, abs=0.02)


def test_retry_after_makes_a_wait_longer_and_never_shorter(tmp_path: Path) -> None:
    delivery = "{retry: 5, backoffPolicy: exponential, backoffDelay: PT1S, retryAfterMax: PT6S}"
    four = answers(429, (b"retry-after", b"4"))
    found = attempts_of(delivery, four, tmp_path, 6)
    assert found == pytest.approx([0, 4, 8, 12, 20, 36], abs=0.05)
    much = answers(503, (b"retry-after", b"1000"))
    assert attempts_of(delivery, much, tmp_path, 4) == pytest.approx([0, 6, 12, 18], abs=0.05)


def test_a_sink_that_is_down_is_probed_more_and_more_slowly_and_for_ever(tmp_path: Path) -> None:
    delivery = "{retry: 2, backoffDelay: PT1S}"

    def nobody(_: int) -> TransportError:
        return TransportError("refused", sent=False)

    found = attempts_of(delivery, nobody, tmp_path, 14)
    waits = [later - earlier for earlier, later in pairwise(found)]
    retries, probes = waits[:2], waits[2:]
    assert retries == pytest.approx([1, 2], abs=0.02)
    assert probes == pytest.approx([min(2.0**n, 30) for n in range(len(probes))], abs=0.02)


def test_an_answer_ends_it(tmp_path: Path) -> None:
    def third_time(attempt: int) -> Response:
        return Response(204 if attempt == 3 else 500, (), b"")

    found = attempts_of("{retry: 9, backoffDelay: PT1S}", third_time, tmp_path, 9)
    assert found == pytest.approx([0, 1, 3], abs=0.02)
