"""What a broker sends again is recognised, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mqtt5 import PublishPacket, QoS

from weir.adaptor.journal import Journal, digest
from weir.adaptor.spool import Mark


class File:
    """Notes what the journal has written."""

    def __init__(self) -> None:
        self.gone: list[object] = []
        self.waiting: list[Callable[[], None]] = []

    def unmark(self, session: str, packet_id: int, done: Callable[[], None] | None) -> None:
        self.gone.append(packet_id)
        if done is not None:
            self.waiting.append(done)

    def end(self, session: str) -> None:
        self.gone.append(session)


def message(
    packet_id: int, payload: bytes = b"21.5", *, again: bool = False, qos: QoS = QoS.AT_LEAST_ONCE
) -> PublishPacket:
    return PublishPacket("plant/x", payload, qos=qos, packet_id=packet_id, duplicate=again)


def taken(journal: Journal, first: PublishPacket) -> Mark:
    journal.arriving(first)
    return journal.note(first, "all")


@pytest.fixture
def file() -> File:
    return File()


@pytest.fixture
def journal(file: File) -> Journal:
    return Journal("s", file, [])


def test_a_message_that_comes_again_is_known(journal: Journal) -> None:
    taken(journal, message(1))
    journal.disconnected()
    again = message(1, again=True)
    journal.arriving(again)
    assert journal.knows(again, "all")


def test_it_is_known_after_a_restart_from_what_was_written(file: File) -> None:
    mark = taken(Journal("s", file, []), message(1))
    journal = Journal("s", file, [mark])
    assert journal.knows(message(1, again=True), "all")


def test_it_is_new_for_another_route(journal: Journal) -> None:
    taken(journal, message(1))
    assert not journal.knows(message(1, again=True), "other")


def test_an_equal_message_that_comes_for_the_first_time_is_new(journal: Journal) -> None:
    taken(journal, message(1))
    journal.acknowledged([1])
    assert not journal.knows(message(1), "all")


def test_another_message_with_the_packet_id_is_new(journal: Journal) -> None:
    taken(journal, message(1))
    assert not journal.knows(message(1, b"22.0", again=True), "all")


def test_what_differs_in_a_user_property_only_is_another_message() -> None:
    one = PublishPacket("t", b"x", user_properties=[("n", "1")])
    other = PublishPacket("t", b"x", user_properties=[("n", "2")])
    assert digest(one) != digest(other)


def test_a_lifetime_that_has_become_shorter_meanwhile_makes_no_other_message() -> None:
    one = PublishPacket("t", b"x", message_expiry_interval=60)
    other = PublishPacket("t", b"x", message_expiry_interval=59)
    assert digest(one) == digest(other)


def test_a_proven_acknowledgement_ends_the_note(journal: Journal, file: File) -> None:
    taken(journal, message(1))
    journal.acknowledged([1])
    assert file.gone == [1]
    assert len(journal) == 0


def test_at_qos_2_only_pubrel_ends_it_and_pubcomp_waits_for_that(
    journal: Journal, file: File
) -> None:
    taken(journal, message(1, qos=QoS.EXACTLY_ONCE))
    journal.acknowledged([1])  # this was PUBREC
    assert journal.knows(message(1, again=True, qos=QoS.EXACTLY_ONCE), "all")
    completed: list[int] = []
    journal.released(1, lambda: completed.append(1))
    assert file.gone == [1]
    assert not completed
    file.waiting[0]()
    assert completed == [1]


def test_what_did_not_come_again_before_something_new_never_will(
    journal: Journal, file: File
) -> None:
    for packet_id in (1, 2):
        taken(journal, message(packet_id))
    taken(journal, message(3, qos=QoS.EXACTLY_ONCE))
    journal.disconnected()
    journal.arriving(message(2, again=True))
    journal.arriving(message(4))
    assert file.gone == [1, 2]  # at QoS 2 the PUBREL is still to come
    assert not journal.knows(message(1, again=True), "all")


def test_a_packet_id_that_is_used_again_takes_the_note_with_it(
    journal: Journal, file: File
) -> None:
    taken(journal, message(1))
    taken(journal, message(1, b"22.0"))
    assert file.gone == [1]
    assert not journal.knows(message(1, again=True), "all")
    assert journal.knows(message(1, b"22.0", again=True), "all")


def test_with_the_session_all_notes_end(journal: Journal, file: File) -> None:
    taken(journal, message(1))
    journal.session_lost()
    assert file.gone == ["s"]
    assert not journal.knows(message(1, again=True), "all")
