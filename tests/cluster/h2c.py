"""One HTTP/2 request over cleartext, on a connection of its own, answered as a whole.

For the test gateway, which speaks HTTP/2 to Services whose port is named `h2c`.
"""

import asyncio
from dataclasses import dataclass, field

import h2.connection
import h2.events

from tests.cluster.streams import client_connection

HTTP2_PORT = 81
"""The port of a revision's Service that asks for HTTP/2 (contract 2.7)."""


class Lost(ConnectionError):
    """The stream or its connection ended before the answer was complete."""


@dataclass
class Answer:
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)


async def ask(
    address: str, port: int, method: str, path: str, headers: dict[str, str], body: bytes
) -> Answer:
    """Send a request whose `headers` name a Host. Raises OSError."""
    reader, writer = await asyncio.open_connection(address, port)
    try:
        connection = client_connection("utf-8")
        connection.initiate_connection()
        fields = {name.lower(): value for name, value in headers.items()}
        host = fields.pop("host")
        pseudo = [(":method", method), (":scheme", "http"), (":authority", host), (":path", path)]
        connection.send_headers(1, [*pseudo, *fields.items()], end_stream=not body)
        answer = Answer()
        left = memoryview(body)
        while True:
            while left and (room := _room(connection)):
                connection.send_data(1, left[:room], end_stream=room >= len(left))
                left = left[room:]
            writer.write(connection.data_to_send())
            data = await reader.read(1 << 16)
            if not data:
                raise Lost("the connection was closed")
            if _taken(connection, connection.receive_data(data), answer):
                return answer
    finally:
        writer.close()


def _room(connection: h2.connection.H2Connection) -> int:
    return min(connection.local_flow_control_window(1), connection.max_outbound_frame_size)


def _taken(
    connection: h2.connection.H2Connection, events: list[h2.events.Event], answer: Answer
) -> bool:
    """Add `events` to the answer. Returns whether it is complete."""
    for event in events:
        match event:
            case h2.events.ResponseReceived():
                fields = [(str(name), str(value)) for name, value in event.headers or ()]
                answer.status = int(dict(fields)[":status"])
                answer.headers = [pair for pair in fields if not pair[0].startswith(":")]
            case h2.events.DataReceived():
                answer.body += event.data or b""
                connection.acknowledge_received_data(event.flow_controlled_length or 0, 1)
            case h2.events.StreamEnded():
                return True
            case h2.events.StreamReset():
                raise Lost(f"ended by {event!r}")
            case h2.events.ConnectionTerminated() if event.error_code or not event.last_stream_id:
                raise Lost(f"ended by {event!r}")
    return False
