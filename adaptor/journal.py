"""Which messages of a session are in the spool though the broker may not know it yet.

A broker sends again what we have not acknowledged, and what we have, if our acknowledgement was
lost; after a crash we would take it for new. So a message is noted with its packet id in the commit
that spools it, and recognised when it comes again. A note ends when it is proven that the broker
has dealt with the acknowledgement: at QoS 2 by its PUBREL (before that the packet id can't be used
again, so the note is exact), at QoS 1 by whatever the session takes for a proof.

What this can't tell apart: at QoS 1 a broker may use a packet id again at once, and if then we
crash, or the connection, before we have seen the new message, and the two are equal to the last
byte, the new one is taken for the old. Brokers that count packet ids up don't come to that.

Knows the spool's writer, no files; packet ids and messages, no connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

from mqtt5 import PublishPacket, QoS

from weir.adaptor.spool import Mark


class Writer(Protocol):
    """What becomes durable in the order of the calls."""

    def unmark(self, session: str, packet_id: int, done: Callable[[], None] | None) -> None: ...

    def end(self, session: str) -> None: ...


@dataclass(slots=True)
class _Note:
    """`exactly`: came at QoS 2. `old`: from before this connection. `digests`: by route."""

    exactly: bool
    old: bool
    digests: dict[str, bytes] = field(default_factory=dict)


class Journal:
    """Of one session."""

    def __init__(self, session: str, writer: Writer, marks: Iterable[Mark]) -> None:
        """`session`: its name in the file; `marks`: what the file says of it."""
        self._session, self._writer = session, writer
        self._notes: dict[int, _Note] = {}
        for mark in marks:
            note = self._notes.setdefault(mark.packet_id, _Note(mark.exactly, old=True))
            note.digests[mark.route] = mark.digest
        self._any_old = bool(self._notes)

    def __len__(self) -> int:
        return len(self._notes)

    def arriving(self, message: PublishPacket) -> None:
        """Each message at QoS 1 or 2, before anything else is asked about it."""
        assert message.packet_id is not None
        if message.duplicate:
            return
        if self._any_old:  # what comes again comes first, and this is none of that
            self._forget_old()
        if message.packet_id in self._notes:
            self._forget(message.packet_id)

    def knows(self, message: PublishPacket, route: str) -> bool:
        """Whether it is in the spool for this route, or was and has been delivered."""
        if not message.duplicate or message.packet_id is None:
            return False
        note = self._notes.get(message.packet_id)
        return note is not None and note.digests.get(route) == digest(message)

    def note(self, message: PublishPacket, route: str) -> Mark:
        """What has to be committed together with the entry."""
        assert message.packet_id is not None
        exactly = message.qos is QoS.EXACTLY_ONCE
        note = self._notes.setdefault(message.packet_id, _Note(exactly, old=False))
        note.digests[route] = digest(message)
        return Mark(self._session, message.packet_id, route, note.digests[route], exactly)

    def acknowledged(self, packet_ids: Iterable[int]) -> None:
        """The broker has dealt with our PUBACKs of these; PUBRECs among them change nothing."""
        for packet_id in packet_ids:
            note = self._notes.get(packet_id)
            if note is not None and not note.exactly:
                self._forget(packet_id)

    def released(self, packet_id: int, done: Callable[[], None]) -> None:
        """PUBREL has come; `done` may send PUBCOMP, since the note is gone for good."""
        self._notes.pop(packet_id, None)
        self._writer.unmark(self._session, packet_id, done)

    def disconnected(self) -> None:
        for note in self._notes.values():
            note.old = True
        self._any_old = bool(self._notes)

    def session_lost(self) -> None:
        """Nothing of it comes again."""
        if self._notes:
            self._notes.clear()
            self._writer.end(self._session)
        self._any_old = False

    def _forget_old(self) -> None:
        self._any_old = False
        old = [each for each, note in self._notes.items() if note.old and not note.exactly]
        for packet_id in old:
            self._forget(packet_id)

    def _forget(self, packet_id: int) -> None:
        del self._notes[packet_id]
        self._writer.unmark(self._session, packet_id, None)


def digest(message: PublishPacket) -> bytes:
    """Of all that a broker sends unchanged a second time."""
    hashed = blake2b(message.payload, digest_size=12)
    properties = (message.content_type, message.response_topic, message.correlation_data)
    hashed.update(repr((message.topic, properties, message.user_properties)).encode())
    return hashed.digest()
