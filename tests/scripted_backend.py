"""A server process that does exactly what a test tells it, over a pipe, one order at a time.

Run by tests.pods.Backend inside a pod. Orders and results are pickles: (number, method, args).
"""

from __future__ import annotations

import os
import pickle
import select
import socket
import struct
import sys
from typing import Any


class Server:
    def __init__(self) -> None:
        self.sockets: dict[int, socket.socket] = {}

    def listen(self, number: int, host: str, port: int, options: dict[str, Any]) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM, options.get("protocol", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if options.get("reuse_port"):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, options.get("v6only", 0))
        if options.get("defer_accept"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
        listener.bind((host, port))
        listener.listen(128)
        self.sockets[number] = listener

    def accept(self, number: int, accepted: int, timeout: float) -> Any:
        self.sockets[number].settimeout(timeout)
        connection, peer = self.sockets[number].accept()
        connection.settimeout(10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sockets[accepted] = connection
        return peer

    def readable(self, number: int, timeout: float) -> bool:
        return bool(select.select([self.sockets[number]], [], [], timeout)[0])

    def recv(self, number: int, size: int) -> bytes:
        return self.sockets[number].recv(size)

    def recv_exactly(self, number: int, size: int) -> bytes:
        parts = []
        while size:
            part = self.sockets[number].recv(min(size, 1 << 20))
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def discard(self, number: int, size: int) -> int:
        buffer, got = bytearray(1 << 20), 0
        while got < size:
            n = self.sockets[number].recv_into(buffer, min(size - got, len(buffer)))
            if not n:
                break
            got += n
        return got

    def produce(self, number: int, size: int) -> None:
        block = b"HTTP/1.1 200 OK\r\n\r\n" * 50_000
        while size:
            part = block[:size]
            self.sockets[number].sendall(part)
            size -= len(part)

    def sendall(self, number: int, data: bytes) -> None:
        self.sockets[number].sendall(data)

    def send_nonblocking(self, number: int, data: bytes) -> int:
        self.sockets[number].setblocking(False)
        try:
            return self.sockets[number].send(data)
        except BlockingIOError:
            return 0
        finally:
            self.sockets[number].settimeout(10)

    def setsockopt(self, number: int, level: int, option: int, value: int) -> None:
        self.sockets[number].setsockopt(level, option, value)

    def getpeername(self, number: int) -> Any:
        return self.sockets[number].getpeername()

    def shutdown(self, number: int, how: int) -> None:
        self.sockets[number].shutdown(how)

    def close(self, number: int) -> None:
        connection = self.sockets.pop(number, None)
        if connection is not None:
            connection.close()

    def reset(self, number: int) -> None:
        self.sockets[number].setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self.close(number)


def main() -> None:
    server = Server()
    with os.fdopen(int(sys.argv[1]), "r+b", buffering=0) as raw:
        orders = os.fdopen(os.dup(raw.fileno()), "rb")
        while True:
            try:
                number, method, arguments = pickle.load(orders)
            except EOFError:
                return
            try:
                result: Any = getattr(server, method)(number, *arguments)
            except OSError as error:
                result = error
            raw.write(pickle.dumps(result))


if __name__ == "__main__":
    main()
