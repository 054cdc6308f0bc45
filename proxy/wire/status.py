"""Status of a process as one JSON object over a unix socket: connect, read to EOF, done.

Owns the transport only; what a snapshot holds is up to the process that serves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

READ_SECONDS = 5.0


async def serve_status(path: Path, snapshot: Callable[[], dict[str, object]]) -> asyncio.Server:
    """Answer every connection with one JSON line, then EOF. Replaces a socket left by the dead."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(json.dumps(snapshot(), default=str).encode() + b"\n")
            writer.write_eof()
            await writer.drain()
        writer.close()

    path.unlink(missing_ok=True)
    return await asyncio.start_unix_server(answer, path)


def read_status(path: Path) -> dict[str, Any]:
    """Ask once, blocking. Raises OSError when nobody serves, ValueError when it is not JSON."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(READ_SECONDS)
        sock.connect(str(path))
        with sock.makefile("rb") as stream:
            text = stream.read()
    status = json.loads(text)
    if not isinstance(status, dict):
        raise ValueError(f"{path} answered {type(status).__name__}, wanted a JSON object")
    return status
