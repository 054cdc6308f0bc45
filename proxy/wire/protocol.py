"""What an event loop calls, for classes that can't inherit it.

A compiled class has compiled bases only (docs/decisions/036), and event loops ask a protocol for
nothing but its methods.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, cast


class Handler(Protocol):
    """The methods of asyncio.Protocol."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...

    def data_received(self, data: bytes) -> None: ...

    def eof_received(self) -> bool | None: ...

    def connection_lost(self, error: Exception | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


def as_protocol(handler: Handler) -> asyncio.Protocol:
    """The handler itself, under the name that asyncio's signatures know."""
    return cast(asyncio.Protocol, handler)
