"""Port 8008: where a Go program has its profiles, this one has the stacks of what it is doing.

Go's pprof formats mean nothing for Python, so they are refused in words (a deviation, see
docs/deviations.md). The one page that is answered is the list of stacks, under Go's name for it.
"""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Protocol

from weir.proxy import contract
from weir.proxy.wire import answers
from weir.proxy.wire.head import RequestHead

_INDEX = b"/debug/pprof"
_STACKS = b"/debug/pprof/goroutine"
_REFUSAL = (
    b"This sidecar is written in Python: there are no profiles of Go's here.\n"
    b"/debug/pprof/goroutine has the stacks of its threads and tasks.\n"
    b"For a profile, attach py-spy to the process.\n"
)


class _Answers(Protocol):
    def answer(self, head: RequestHead, parts: list[bytes]) -> None: ...


def profiling() -> Callable[[_Answers, RequestHead, bytes, bool], None]:
    """The service of the profiling port."""

    def serve(client: _Answers, head: RequestHead, piece: bytes, ended: bool) -> None:
        path = head.target.partition(b"?")[0].rstrip(b"/")
        if path == _STACKS:
            client.answer(head, answers.reply(200, stacks().encode("utf-8", "replace")))
        elif path == _INDEX:
            client.answer(head, answers.reply(200, _REFUSAL))
        elif path.startswith(_INDEX + b"/"):
            client.answer(head, answers.error(501, _REFUSAL))
        else:
            client.answer(head, answers.error(404, contract.BODY_NOT_FOUND))

    return serve


def stacks() -> str:
    """What every thread and every task is at."""
    out = io.StringIO()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        out.write(f"thread {names.get(ident, ident)}\n")
        out.writelines(traceback.format_stack(frame))
        out.write("\n")
    for task in asyncio.all_tasks():
        out.write(f"task {task.get_name()}\n")
        task.print_stack(file=out)
        out.write("\n")
    return out.getvalue()
