"""Back-pressure: reading from a connection stops for as long as anyone has a reason.

Owns which reasons hold and nothing else. The rule of a relay: when writing to one side is paused,
reading from the other side is held, so what is in memory stays bounded by the two write buffers.
"""

from __future__ import annotations

import asyncio

OTHER_SIDE = 1
"""The connection that what we read is written to is full."""
MEMORY = 4
"""There is too little memory to read anything, for a moment."""
TURN = 8
"""There is more than is done at a time, and others of the pod come first."""
BACKLOG = 2
"""What we read can't be used yet: a pipelined request, or a body whose way is not open."""


class Flow:
    """Reading of one transport, held while at least one reason holds."""

    __slots__ = ("_transport", "held")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.held = 0
        """The reasons, 0 for none."""

    def hold(self, reason: int) -> None:
        if not self.held and not self._transport.is_closing():
            self._transport.pause_reading()
        self.held |= reason

    def release(self, reason: int) -> None:
        if self.held & reason:
            self.held &= ~reason
            if not self.held and not self._transport.is_closing():
                self._transport.resume_reading()
