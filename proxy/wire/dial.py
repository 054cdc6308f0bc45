"""Opening a TCP connection where the dialler says: in our namespace, or in a pod's.

Owns the order in which addresses and timeouts are tried and what an error reads like. Errors are
worded as the queue-proxy's are, because they become the body of a 502 (contract section 3.12).
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable

from weir.proxy import contract

Dial = Callable[[], Awaitable[socket.socket | None]]
"""An unconnected, non-blocking TCP socket made where it shall connect; None: make one here."""


class DialError(OSError):
    """No connection. `str()` is one line; `refused` tells that nobody listens."""

    def __init__(self, text: str, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


async def dial_here() -> socket.socket | None:
    """The Dial of our own network namespace."""
    return None


async def connect_once(dial: Dial, host: str, port: int, limit: float) -> socket.socket:
    """One try of at most `limit` seconds. Raises DialError, or TimeoutError when that is over.

    A name may stand for several addresses: the first that connects is taken.
    """
    async with asyncio.timeout(limit):
        addresses = [host] if _is_literal(host) else await _resolve(host, port)
        for address in addresses[:-1]:
            try:
                return await _connect(dial, address, port)
            except DialError:
                continue
        return await _connect(dial, addresses[-1], port)


async def _connect(dial: Dial, address: str, port: int) -> socket.socket:
    sock: socket.socket | None = None
    try:
        sock = await dial()
        if sock is None:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await _connected(sock, address, port)
    except OSError as error:
        if sock is not None:
            sock.close()
        text = os.strerror(error.errno).lower() if error.errno else str(error)
        where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        refused = error.errno == errno.ECONNREFUSED
        raise DialError(f"dial tcp {where}: connect: {text}", refused) from error
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    return sock


async def _connected(sock: socket.socket, address: str, port: int) -> None:
    """uvloop's sock_connect gives even a literal address to the resolver's few threads, where it
    would stand behind the lookups of names that nobody answers for."""
    try:
        sock.connect((address, port))
    except OverflowError as error:
        raise OSError(errno.EADDRNOTAVAIL, str(error)) from None
    except BlockingIOError:
        loop = asyncio.get_running_loop()
        writable = asyncio.Event()
        loop.add_writer(sock, writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code)) from None


def _is_literal(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except (OSError, ValueError):
        return False
    return True


async def _resolve(host: str, port: int) -> list[str]:
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(info[4][0]) for info in infos]


async def connect_patiently(dial: Dial, host: str, port: int) -> socket.socket:
    """Connect as the queue-proxy does (contract section 3.8): a full backlog gets more tries.

    Only a connect that times out is tried again, about 20 seconds in all. Raises DialError.
    """
    started = time.monotonic()
    timeout = contract.DIAL_FIRST_TIMEOUT_SECONDS
    for attempt in range(contract.DIAL_RETRIES + 1):
        try:
            return await connect_once(dial, host, port, timeout)
        except TimeoutError:
            if attempt < contract.DIAL_RETRIES:
                await asyncio.sleep(random.uniform(*contract.DIAL_PAUSE_SECONDS))
            timeout *= contract.DIAL_TIMEOUT_GROWTH
    raise DialError(f"timed out dialing after {time.monotonic() - started:.2f}s")
