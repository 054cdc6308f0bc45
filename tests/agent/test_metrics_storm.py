"""Pages that are read all the time while workers are killed under load: what went up stays up."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.agent.borrowed import Agent, Clients, HeldPod, closing
from tests.agent.promtext import Key, Page, read
from tests.hold.rig import HOLD
from tests.pods import DIRECT_PORT, needs_kernel, until

pytestmark = [
    needs_kernel,
    pytest.mark.skipif(not HOLD.exists(), reason="needs hold/weir-hold (make hold)"),
]

KILLS = 6


class Scraper:
    """Reads one page again and again, and keeps what went down."""

    def __init__(self, ask: Callable[[], bytes]) -> None:
        self._ask = ask
        self._last: dict[Key, float] = {}
        self.pages = 0
        self.down: list[tuple[Key, float, float]] = []
        self.failure: AssertionError | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._ended = True
        self._thread.join()

    def value(self, name: str) -> float:
        return sum(value for (found, _), value in self._last.items() if found == name)

    def _run(self) -> None:
        while not self._ended:
            with contextlib.suppress(OSError):
                text = self._ask()
                try:
                    self._look(read(text.decode()))
                except AssertionError as error:
                    self.failure = error
                    return

    def _look(self, page: Page) -> None:
        now = {key: v for key, v in page.counters().items() if not key[0].startswith("process_")}
        for key, before in self._last.items():
            if now.get(key, -1.0) < before:
                self.down.append((key, before, now.get(key, -1.0)))
        self._last = now
        self.pages += 1


def test_no_counter_goes_down_on_either_page_while_workers_are_killed_under_load(
    tmp_path: Path,
) -> None:
    random = Random(38)
    with socket.create_server(("127.0.0.1", 0)) as found:
        url = f"http://127.0.0.1:{found.getsockname()[1]}/metrics"
    where = url.removeprefix("http://").removesuffix("/metrics")

    def of_node() -> bytes:
        with urllib.request.urlopen(url, timeout=30) as answer:
            text: bytes = answer.read()
            return text

    with HeldPod() as pod, closing(agent := Agent(tmp_path, pod, options=("--metrics", where))):
        agent.until_held().until_open()
        direct, relayed = Clients(pod, 2, DIRECT_PORT), Clients(pod, 2)
        scrapers = (Scraper(of_node), Scraper(lambda: pod.get("/metrics", 9091)[1]))
        try:
            for _ in range(KILLS):
                seen = [scraper.pages for scraper in scrapers]
                until(
                    lambda: all(s.pages > n + 3 for s, n in zip(scrapers, seen, strict=True)),  # noqa: B023
                    "both pages are read on",
                    30.0,
                )
                relayed.more(random.randrange(1, 200))
                (worker,) = until(lambda: agent.workers, "there is a worker", 30.0)
                os.kill(worker, signal.SIGKILL)
                until(lambda: agent.workers not in ([], [worker]), "another one", 30.0)  # noqa: B023
            relayed.more()
        finally:
            direct.stop()
            relayed.stop()
        try:
            name = "weir_direct_requests_total"
            until(lambda: scrapers[1].value(name) >= direct.answers, "the pod's page has all")
            until(lambda: scrapers[0].value("weir_worker_restarts_total") == KILLS, "all kills")
        finally:
            for scraper in scrapers:
                scraper.stop()
        assert [scraper.failure for scraper in scrapers] == [None, None]
        assert [scraper.down for scraper in scrapers] == [[], []]
        # until a worker has found the pod ready again the direct port is closed
        assert all(failure.startswith("refused") for failure in direct.failures)
        assert scrapers[1].value(name) == direct.answers
