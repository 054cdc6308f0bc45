"""A client whose answer comes from us, but later: a health check, a drain hook."""

from __future__ import annotations

from typing import Any


class Waiting:
    """`answer` it once; it may leave before, and then nobody is answered.

    `client` is a connection or a stream that has `exchange` and `answer`.
    """

    __slots__ = ("client", "head")

    def __init__(self, client: Any, head: Any) -> None:
        self.client: Any = client
        self.head = head
        client.exchange = self

    def answer(self, parts: list[bytes]) -> bool:
        """Was the client still there?"""
        client, self.client = self.client, None
        if client is None:
            return False
        client.answer(self.head, parts)
        return True

    def client_lost(self) -> None:
        self.client = None

    def request_more(self, piece: bytes, ended: bool) -> None:
        pass  # the body of such a request says nothing

    def client_tunnelled(self, data: bytes) -> None:
        pass  # cannot happen: nobody switched

    def response_hold(self) -> None:
        pass

    def response_release(self) -> None:
        pass
