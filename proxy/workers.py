"""The relay workers as their supervisor sees them: processes, and the channels to them.

Owns their start, their end, and the rights they start with. What they are told is the agent's
business.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Sequence

from weir.proxy.control import Channel, Message

STOP_SECONDS = 30.0
# a number of its own, above the ranges that distributions and systemd hand out
WORKER_UID = 64830
WORKER_MEMORY = 1 << 30


class WorkerProcess:
    """One relay worker and its channel; `ended` is called once when it is gone."""

    def __init__(self, receive: Callable[[Message], None], ended: Callable[[], None]) -> None:
        self.pid = 0
        self.serving = False  # it has dropped its privileges and said so
        self._receive = receive
        self._ended = ended
        self._channel: Channel | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Raises OSError when the interpreter can't be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-P", "-m", "weir.proxy.worker", "--channel", str(theirs.fileno())),
                *("--uid", str(WORKER_UID if os.geteuid() == 0 else 0)),
                *("--memory", str(WORKER_MEMORY)),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self.pid = self._process.pid
        self._channel = Channel(ours, self._message, self._ended)

    def send(self, message: Message, sockets: Sequence[socket.socket] = ()) -> None:
        """Nothing is sent to a worker that is gone."""
        if self._channel is not None:
            self._channel.send(message, sockets)

    def kill(self) -> None:
        """SIGKILL; `stop` reaps."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """Close the channel, which ends the worker, and reap it."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            except TimeoutError:
                self.kill()
                await self._process.wait()

    def _message(self, message: Message, descriptors: list[int]) -> None:
        for descriptor in descriptors:  # a worker has nothing to hand us
            os.close(descriptor)
        self.serving = True
        self._receive(message)
