"""What a pod's other ports answer: 8022 (drain hook), 9090 (autoscaler), 9091 (Prometheus).

Owns paths, methods and content types (contract sections 1.5, 5.1, 6). Each is a Service of
`wire.server`; what is said in the answers comes from outside.
"""

from __future__ import annotations

from collections.abc import Callable

from weir.proxy import contract
from weir.proxy.wire import answers
from weir.proxy.wire.head import RequestHead
from weir.proxy.wire.server import ServerConnection, Service
from weir.proxy.wire.waiting import Waiting


def autoscaler(stat: Callable[[], bytes]) -> Service:
    """9090: the `Stat` of the last period, to any method and whatever is accepted."""

    def serve(client: ServerConnection, head: RequestHead, piece: bytes, ended: bool) -> None:
        if _path(head) != contract.METRICS_PATH:
            client.answer(head, answers.error(404, contract.BODY_NOT_FOUND))
        else:
            client.answer(head, answers.reply(200, stat(), kind=contract.PROTOBUF))

    return serve


def prometheus(render: Callable[[], bytes]) -> Service:
    """9091: GET and HEAD only."""

    def serve(client: ServerConnection, head: RequestHead, piece: bytes, ended: bool) -> None:
        if _path(head) != contract.METRICS_PATH:
            client.answer(head, answers.error(404, contract.BODY_NOT_FOUND))
        elif head.method not in (b"GET", b"HEAD"):
            client.answer(head, answers.error(405, contract.BODY_METHOD_NOT_ALLOWED))
        else:
            client.answer(head, answers.reply(200, render(), kind=contract.PROMETHEUS_TEXT))

    return serve


class DrainHook:
    """8022: callers of the hook wait until `release`; `called` hears of each of them."""

    def __init__(self, called: Callable[[], None]) -> None:
        self._called = called
        self._waiting: list[Waiting] = []
        self.open = False
        """Nobody has to wait (any more)."""

    def __call__(
        self, client: ServerConnection, head: RequestHead, piece: bytes, ended: bool
    ) -> None:
        if _path(head) != contract.DRAIN_PATH:
            client.answer(head, answers.error(404, contract.BODY_NOT_FOUND))
            return
        self._called()
        if self.open:
            client.answer(head, answers.reply(200))
        else:
            self._waiting.append(Waiting(client, head))

    def release(self) -> None:
        waiting, self._waiting = self._waiting, []
        for caller in waiting:
            caller.answer(answers.reply(200))


def _path(head: RequestHead) -> bytes:
    return head.target.partition(b"?")[0]
