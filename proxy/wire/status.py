"""Status of a process as one JSON object over a unix socket: connect, read to EOF, done.

Owns the transport only; what a snapshot holds is up to the process that serves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

READ_SECONDS = 5.0


async def serve_status(path: Path, snapshot: Callable[[], Mapping[str, Any]]) -> asyncio.Server:
    """Answer every connection with one JSON line, then EOF. Replaces a socket left by the dead.

    What of a snapshot is an iterator becomes an array."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.writelines(_pieces(snapshot()))
            writer.write_eof()
            await writer.drain()
        writer.close()

    path.unlink(missing_ok=True)
    return await asyncio.start_unix_server(answer, path)


def _pieces(status: Mapping[str, Any]) -> Iterator[bytes]:
    """Of an array that is made on the way no more than one element is there as objects."""
    yield b"{"
    for number, (name, value) in enumerate(status.items()):
        yield b"%s%s:" % (b"," if number else b"", _json(name))
        if isinstance(value, Iterator):
            yield b"["
            yield from (
                b"," + _json(each) if index else _json(each) for index, each in enumerate(value)
            )
            yield b"]"
        else:
            yield _json(value)
    yield b"}\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, default=str).encode()


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
