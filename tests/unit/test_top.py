"""`weir top`: rows out of two looks at a status, and what is said when no agent answers."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from weir.proxy.top import SORTS, Look, record, rows
from weir.proxy.topview import KEYS, NoAgent, draw, look


def pod(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "lease": "own",
        "ready": True,
        "draining": False,
        "direct": {"open": True, "reason": ""},
        "relayed": {},
        "worker_restarts": 0,
    } | more


def at(seconds: float, *pods: dict[str, Any]) -> Look:
    return Look(seconds, {"supervisor": 1, "workers": [2], "kernel": "ok", "pods": list(pods)})


def direct(**counters: float) -> dict[str, Any]:
    return {"open": True, "reason": "", "p50": 0.001, "p99": 0.002, **counters}


def test_rates_are_what_was_counted_between_the_two_looks() -> None:
    before = at(10, pod("a", direct=direct(started=100), relayed={"requests": 7}))
    now = at(12, pod("a", direct=direct(started=150), relayed={"requests": 8}))
    (row,) = rows(before, now)
    assert (row.direct_rate, row.relayed_rate) == (25, 0.5)


def test_without_an_earlier_look_at_this_pod_there_are_no_rates() -> None:
    now = at(12, pod("a", direct=direct(started=150), relayed={"requests": 8}))
    for before in (None, at(11, pod("other")), at(12, *now.status["pods"])):
        (row,) = rows(before, now)
        assert (row.direct_rate, row.relayed_rate) == (None, None)


def test_counters_that_began_anew_give_no_rate_below_zero() -> None:
    (row,) = rows(
        at(1, pod("a", direct=direct(started=9))), at(2, pod("a", direct=direct(started=1)))
    )
    assert row.direct_rate is None


def test_the_first_report_of_a_worker_counts_from_zero() -> None:
    (row,) = rows(at(1, pod("a")), at(2, pod("a", relayed={"requests": 3})))
    assert row.relayed_rate == 3


def test_both_paths_are_in_flight_and_aborted() -> None:
    (row,) = rows(
        None,
        at(
            0,
            pod(
                "a",
                direct=direct(started=9, finished=2, in_flight=3, aborted=4),
                relayed={"in_flight": 5.0, "aborted": 6.0, "waiting": 7.0, "p50": 0.1, "p99": 0.2},
                worker_restarts=8,
            ),
        ),
    )
    assert (row.in_flight, row.aborted, row.waiting, row.restarts) == (8, 10, 7, 8)
    assert (row.direct_p50, row.direct_p99) == (0.001, 0.002)
    assert (row.relayed_p50, row.relayed_p99) == (0.1, 0.2)


def test_latencies_are_unknown_before_the_first_response() -> None:
    (row,) = rows(
        None, at(0, pod("a", direct=direct(finished=0), relayed={"p50": 0.0, "p99": 0.0}))
    )
    assert (row.direct_p50, row.direct_p99, row.relayed_p50, row.relayed_p99) == (None,) * 4


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({}, "ready"),
        ({"lease": "held"}, "ready"),
        ({"ready": False}, "not ready"),
        ({"ready": True, "draining": True}, "draining"),
        ({"lease": "looking for hold", "ready": False}, "not held"),
    ],
)
def test_the_state_of_a_pod(facts: dict[str, Any], state: str) -> None:
    assert rows(None, at(0, pod("a", **facts)))[0].state == state


def test_a_pod_that_is_not_direct_says_why() -> None:
    closed = {"open": False, "reason": "containerConcurrency is 3"}
    assert rows(None, at(0, pod("a", direct=closed)))[0].direct == "containerConcurrency is 3"
    assert "containerConcurrency is 3" in text(None, at(0, pod("a", direct=closed)))


BUSY = {
    "direct": pod("z", direct=direct(started=50)),
    "relayed": pod("z", relayed={"requests": 50}),
    "in-flight": pod("z", relayed={"in_flight": 1}),
    "latency": pod("z", relayed={"p50": 1.0, "p99": 2.0}),
    "aborted": pod("z", direct=direct(aborted=1)),
    "waiting": pod("z", relayed={"waiting": 1}),
    "restarts": pod("z", worker_restarts=1),
}


def test_every_order_but_the_one_by_name_has_its_case_here_and_a_key() -> None:
    assert set(BUSY) | {"pod"} == set(SORTS) == set(KEYS.values())


@pytest.mark.parametrize("sort", BUSY)
def test_the_largest_stands_first_and_equals_by_name(sort: str) -> None:
    before = at(0, pod("b"), pod("a"), pod("z"))
    now = at(1, pod("b"), pod("a"), BUSY[sort])
    assert [row.pod for row in rows(before, now, sort)] == ["z", "a", "b"]
    assert [row.pod for row in rows(before, now)] == ["a", "b", "z"]


def test_a_record_is_the_rows_as_json() -> None:
    now = at(3, pod("a", direct=direct(started=4)))
    found = json.loads(json.dumps(record(at(1, pod("a", direct=direct(started=0))), now)))
    assert found["seconds"] == 2
    assert found["kernel"] == "ok"
    assert found["pods"][0]["pod"] == "a"
    assert found["pods"][0]["direct_rate"] == 2


def text(before: Look | None, now: Look) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(draw(before, now, "pod"))
    return out.getvalue()


def test_names_are_drawn_as_they_are_and_not_as_markup() -> None:
    assert "[red]x[/blue]" in text(None, at(0, pod("[red]x[/blue]")))


@contextmanager
def answering(path: Path, *answers: bytes) -> Iterator[None]:
    """A server that has so many answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def test_no_socket_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "none.sock"
    with pytest.raises(NoAgent, match=re.escape(f"weir agent --status {path}")):
        look(path)


def test_the_socket_of_a_dead_agent_is_told_from_none(tmp_path: Path) -> None:
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with pytest.raises(NoAgent, match="has ended"):
        look(path)


@pytest.mark.parametrize("answer", [b"", b"not json", b"[]", b'{"sinks": []}', b'{"pods": []}'])
def test_what_does_not_answer_like_an_agent_is_none(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "other.sock"
    with answering(path, answer), pytest.raises(NoAgent, match=re.escape(str(path))):
        look(path)


def weir_top(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "weir", "top", *options], capture_output=True, text=True
    )


def test_the_command_without_an_agent_fails_in_one_line(tmp_path: Path) -> None:
    result = weir_top("--status", str(tmp_path / "none.sock"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert str(tmp_path / "none.sock") in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_agent_that_goes_away_meanwhile_is_an_error_of_once(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with answering(path, json.dumps(at(0, pod("a")).status).encode(), b""):
        result = weir_top("--status", str(path), "--once", "--interval", "0.01")
    assert (result.returncode, result.stdout) == (2, "")


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf"])
def test_an_interval_is_a_time(tmp_path: Path, interval: str) -> None:
    result = weir_top("--status", str(tmp_path / "x"), "--interval", interval)
    assert result.returncode == 2
    assert "--interval" in result.stderr
