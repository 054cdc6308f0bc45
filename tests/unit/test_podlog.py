"""Log lines of a worker: whose they are, and how many."""

import asyncio
import logging

import pytest

from weir.proxy import podlog
from weir.proxy.podlog import Whose, context_of

LINE = "%(pod)s%(message)s"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a handler like the worker's says, while the test runs."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Lines()
    handler.addFilter(Whose())
    handler.setFormatter(logging.Formatter(LINE))
    logger = logging.getLogger("weir.test_podlog")
    logger.addHandler(handler)
    return lines


def say(text: str) -> None:
    logging.getLogger("weir.test_podlog").warning(text)


async def test_whatever_runs_for_a_pod_names_it_and_the_rest_names_none(log: list[str]) -> None:
    loop = asyncio.get_running_loop()

    async def work() -> None:
        say("in a task")
        loop.call_soon(say, "in a callback")
        await asyncio.sleep(0)

    context = context_of("one")
    context.run(say, "at once")
    await loop.create_task(work(), context=context)
    say("of nobody")
    assert log == ["pod one: at once", "pod one: in a task", "pod one: in a callback", "of nobody"]


def test_a_pod_that_says_too_much_is_cut_short_and_hides_no_other(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("weir.proxy.podlog.time.monotonic", lambda: now)
    loud, quiet = context_of("loud"), context_of("quiet")
    for _ in range(1000):
        loud.run(say, "!")
    quiet.run(say, "?")
    assert log.count("pod loud: !") == podlog.LINES_AT_ONCE == len(log) - 1
    assert log[-1] == "pod quiet: ?"
    now += 1.0
    loud.run(say, "!")
    assert log[-1] == "pod loud: (900 lines before were left out) !"
