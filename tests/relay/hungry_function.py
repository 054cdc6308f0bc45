"""A program: the function of a pod with hostile callers, in HTTP/1.1 and HTTP/2.

It prints its port. By the path: /deaf is never answered, /unread stops reading, /sink reads and
says nothing, /large sends what the windows allow, /goaway takes no more streams on a connection.
"""

from __future__ import annotations

import asyncio
import resource
import struct
from typing import cast

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
OK = b"\x88"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class Function(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.rest = b""
        self.http2: bool | None = None
        self.window = 65535
        self.silent = False

    def data_received(self, data: bytes) -> None:
        if self.silent:
            return
        self.rest += data
        if self.http2 is None:
            if len(self.rest) < len(PREFACE) and PREFACE.startswith(self.rest):
                return
            self.http2 = self.rest.startswith(PREFACE)
            if self.http2:
                self.rest = self.rest[len(PREFACE) :]
                self.transport.write(frame(4, 0, 0, struct.pack(">HI", 4, 1 << 30)))
                self.transport.write(frame(8, 0, 0, struct.pack(">I", 1 << 30)))
        if self.http2:
            self.frames()
        else:
            self.requests()

    def quiet(self, path: bytes) -> bool:
        if b"/unread" in path:
            self.transport.pause_reading()
        elif b"/sink" not in path:
            return False
        self.silent, self.rest = True, b""
        return True

    def requests(self) -> None:
        while b"\r\n\r\n" in self.rest:
            head, _, self.rest = self.rest.partition(b"\r\n\r\n")
            if self.quiet(head.split(b" ")[1]):
                return
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    def frames(self) -> None:
        data, at = self.rest, 0
        while len(data) - at >= 9:
            stop = at + 9 + int.from_bytes(data[at : at + 3], "big")
            if stop > len(data):
                break
            kind = data[at + 3]
            stream = int.from_bytes(data[at + 5 : at + 9], "big")
            payload = data[at + 9 : stop]
            at = stop
            if kind == 8 and not stream:
                self.window += int.from_bytes(payload, "big")
            elif kind == 1 and self.asked(stream, payload):
                return
        self.rest = data[at:]

    def asked(self, stream: int, head: bytes) -> bool:
        if b"/goaway" in head:
            self.transport.write(frame(7, 0, 0, struct.pack(">II", stream, 0)))
        elif b"/large" in head:
            size = min(self.window, 256 << 10)
            self.window -= size
            sizes = [min(16384, size - at) for at in range(0, size, 16384)]
            pieces = [frame(0, 0, stream, b"x" * each) for each in sizes]
            self.transport.write(b"".join([frame(1, 4, stream, OK), *pieces]))
        elif b"/deaf" not in head and not self.quiet(head):
            self.transport.write(frame(1, 4, stream, OK) + frame(0, 1, stream, b"hello"))
        return self.silent


async def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Function, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
