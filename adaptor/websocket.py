"""A byte stream over a websocket, for MQTT (MQTT 5 section 6): binary frames, subprotocol `mqtt`.

Stands between a TCP or TLS transport and a protocol that knows only bytes, and looks to each like
the other. Frames are `websockets`' business (its sans-I/O protocol); a packet may span frames, and
a frame may hold several packets. Imported only where a broker's URL says ws:// or wss://.
"""

from __future__ import annotations

import asyncio
from typing import cast

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

LARGEST_FRAME = 32 << 20
"""Bytes; twice the largest packet."""


class WebSocket(asyncio.Protocol):
    """Give it to `create_connection`; `inner` gets its `connection_made` once `opened` is done."""

    def __init__(self, inner: asyncio.Protocol, uri: str) -> None:
        self._inner = inner
        self._protocol = ClientProtocol(
            parse_uri(uri), subprotocols=[Subprotocol("mqtt")], max_size=LARGEST_FRAME
        )
        self._transport: asyncio.Transport | None = None
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._protocol.send_request(self._protocol.connect())
        self._flush()

    def data_received(self, data: bytes) -> None:
        protocol = self._protocol
        protocol.receive_data(data)
        self._flush()  # pongs, and the answer to a close
        for event in protocol.events_received():
            if isinstance(event, Response):
                self._answered(event)
            elif isinstance(event, Frame) and event.opcode in (Opcode.BINARY, Opcode.CONT):
                self._inner.data_received(bytes(event.data))
        if self._transport is not None and protocol.state is not State.OPEN:
            self._transport.close()

    def _answered(self, response: Response) -> None:
        refusal = self._protocol.handshake_exc
        if refusal is None and self._protocol.subprotocol != "mqtt":
            refusal = InvalidHandshake("the server does not speak the subprotocol `mqtt`")
        if refusal is not None:
            text = f"{refusal} (HTTP {response.status_code} {response.reason_phrase})"
            self._failed(ConnectionError(f"no websocket: {text}"))
            self.abort()
            return
        if not self.opened.done():
            self._inner.connection_made(cast(asyncio.BaseTransport, self))
            self.opened.set_result(None)

    def eof_received(self) -> None:
        self._protocol.receive_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._failed(exc or ConnectionError("the server closed the connection unasked")):
            return
        reason = self._protocol.close_rcvd
        if exc is None and reason is not None and reason.reason:
            exc = ConnectionError(f"closed with {reason.code} {reason.reason}")
        self._inner.connection_lost(exc)

    def _failed(self, error: Exception) -> bool:
        if self.opened.done():
            return False
        self.opened.set_exception(error)
        self.opened.exception()  # whoever waited may have gone
        return True

    # --- the inner protocol's side: what it uses of a transport ---

    def write(self, data: bytes) -> None:
        if self._protocol.state is State.OPEN:
            self._protocol.send_binary(data)
            self._flush()

    def pause_reading(self) -> None:
        assert self._transport is not None
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        assert self._transport is not None
        self._transport.resume_reading()

    def close(self) -> None:
        if self._protocol.state is State.OPEN:
            self._protocol.send_close(1000)
            self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        if self._transport is not None:
            data = b"".join(self._protocol.data_to_send())
            if data:
                self._transport.write(data)
