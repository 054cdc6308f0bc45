"""`weir top`: asks the agent every few seconds and draws the rows, or prints them as JSON.

Owns the socket, the terminal and its keys. What a row holds is proxy/top.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from weir.proxy.top import SORTS, Look, record, rows
from weir.proxy.wire.status import read_status

KEYS = {name[0]: name for name in SORTS if name != "restarts"} | {"s": "restarts"}
_HELP = "keys: " + ", ".join(f"{key} {name}" for key, name in KEYS.items()) + "; q quits"


class NoAgent(Exception):
    """Nobody answers at the socket, or not an agent; says which socket and what to do."""


def top(socket: Path, *, sort: str, interval: float, once: bool, as_json: bool) -> int:
    """Until Ctrl-C, or `once`. Raises NoAgent if there is none at the start; one that goes away
    later is waited for, since an agent may be replaced."""
    before: Look | None = look(socket)
    try:
        if once:
            time.sleep(interval)  # rates are between two looks
            return _once(before, look(socket), sort, as_json)
        if as_json or not sys.stdout.isatty():
            return _lines(socket, before, sort, interval, as_json)
        return _live(socket, before, sort, interval)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def look(socket: Path) -> Look:
    """Ask now. Raises NoAgent."""
    try:
        return Look(time.monotonic(), read_status(socket))
    except FileNotFoundError:
        fix = f"start one with `weir agent --status {socket} ...`, or name its socket: --status"
        raise NoAgent(f"no agent at {socket}: there is no such socket; {fix}") from None
    except PermissionError:
        raise NoAgent(f"no access to {socket}: run `sudo weir top`") from None
    except ConnectionRefusedError:
        raise NoAgent(
            f"no agent answers at {socket}: the one that made it has ended; start it again"
        ) from None
    except TimeoutError:
        raise NoAgent(f"the agent at {socket} does not answer: is it stopped?") from None
    except (OSError, ValueError) as error:
        raise NoAgent(f"no agent answers at {socket}: {error}; name its socket: --status") from None


def draw(before: Look | None, now: Look, sort: str) -> RenderableType:
    """The table, below a line on the agent."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("pod", overflow="fold")
    table.add_column("state")
    table.add_column("direct", overflow="fold")
    for name in (
        *("direct/s", "relayed/s", "in flight", "waiting"),
        *("p50 ms", "p99 ms", "aborted", "restarts"),
    ):
        table.add_column(name, justify="right")
    for row in rows(before, now, sort):
        table.add_row(
            Text(row.pod),
            Text(row.state, style="green" if row.state == "ready" else "yellow"),
            Text(row.direct, style="yellow") if row.direct else Text("open", style="green"),
            *(_number(row.direct_rate), _number(row.relayed_rate)),
            *(str(row.in_flight), str(row.waiting)),
            f"{_ms(row.direct_p50)} / {_ms(row.relayed_p50)}",
            f"{_ms(row.direct_p99)} / {_ms(row.relayed_p99)}",
            *(str(row.aborted), str(row.restarts)),
        )
    status = now.status
    head = f"agent {status['supervisor']}, {len(status.get('workers', ()))} workers, "
    head += f"{len(status['pods'])} pods, kernel: {status.get('kernel', '?')}; "
    return Group(Text(head + "latencies: direct / relayed, since the start"), table)


def _once(before: Look | None, now: Look, sort: str, as_json: bool) -> int:
    if as_json:
        print(json.dumps(record(before, now, sort)), flush=True)
    else:
        _console().print(draw(before, now, sort))
        sys.stdout.flush()
    return 0


def _console() -> Console:
    """Into a file or a pipe a line may be as long as it is."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _lines(socket: Path, before: Look | None, sort: str, interval: float, as_json: bool) -> int:
    while True:
        time.sleep(interval)
        try:
            now = look(socket)
        except NoAgent as error:
            before = None
            text = json.dumps({"error": str(error)}) if as_json else f"weir: {error}"
            print(text, flush=True)
            continue
        _once(before, now, sort, as_json)
        before = now


def _live(socket: Path, before: Look | None, sort: str, interval: float) -> int:
    now = before
    with _keys() as keys, Live(console=_console(), screen=True, auto_refresh=False) as live:
        wake = time.monotonic()
        while True:
            lost = ""
            if time.monotonic() >= wake:
                wake = time.monotonic() + interval
                try:
                    before, now = now, look(socket)
                except NoAgent as error:
                    before = now = None
                    lost = str(error)
            if now is not None:
                help_line = Text(f"by {sort}; {_HELP}", style="dim")
                live.update(Group(draw(before, now, sort), help_line), refresh=True)
            elif lost:
                live.update(Text(f"{lost}; looking again", style="yellow"), refresh=True)
            ready, _, _ = select.select(keys, [], [], max(0.0, wake - time.monotonic()))
            if ready:
                key = os.read(keys[0], 1).decode("ascii", "replace")
                if key in ("q", ""):
                    return 0
                sort = KEYS.get(key, sort)


@contextlib.contextmanager
def _keys() -> Iterator[list[int]]:
    """Keys one by one instead of lines, if there is a keyboard; given back as it was."""
    if not sys.stdin.isatty():
        yield []
        return
    fd = sys.stdin.fileno()
    earlier = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield [fd]
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, earlier)


def _number(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"
