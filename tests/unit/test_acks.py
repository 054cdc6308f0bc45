"""Acknowledgements in order of arrival, against a model that knows nothing of efficiency."""

from __future__ import annotations

import mqtt5
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weir.adaptor.acks import AckLine, Ticket


def message(body: str, *, duplicate: bool = False) -> mqtt5.PublishPacket:
    return mqtt5.PublishPacket(
        "t", body.encode(), qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=1, duplicate=duplicate
    )


def test_a_slow_first_message_holds_back_the_others() -> None:
    line: AckLine[mqtt5.PublishPacket] = AckLine()
    first, second = (line.arrive(number, message(str(number)))[0] for number in (1, 2))
    assert not line.settle(second)
    assert line.ready() == []
    assert line.settle(first)
    assert line.ready() == [1, 2]
    assert len(line) == 0


def test_a_message_of_two_events_waits_for_both() -> None:
    line: AckLine[mqtt5.PublishPacket] = AckLine()
    ticket, _ = line.arrive(1, message("x"))
    ticket.open = 2
    assert not line.settle(ticket)
    assert line.settle(ticket)


def test_after_a_disconnect_an_old_ticket_acknowledges_nothing() -> None:
    line: AckLine[mqtt5.PublishPacket] = AckLine()
    ticket, _ = line.arrive(1, message("x"))
    line.disconnected()
    assert not line.settle(ticket)
    assert line.ready() == []


def test_a_repeat_after_the_reconnect_finds_its_delivery_under_way_or_done() -> None:
    line: AckLine[mqtt5.PublishPacket] = AckLine()
    done, _ = line.arrive(1, message("a"))
    under_way, _ = line.arrive(2, message("b"))
    line.disconnected()
    line.settle(done)
    assert line.arrive(1, message("a", duplicate=True)) == (done, False)
    assert line.ready() == [1]
    assert line.arrive(2, message("b", duplicate=True)) == (under_way, False)
    assert line.ready() == []


def test_another_message_with_a_known_packet_id_is_new() -> None:
    line: AckLine[mqtt5.PublishPacket] = AckLine()
    for body, duplicate in (("other", True), ("same", False)):
        line.arrive(1, message("same"))
        line.disconnected()
        assert line.arrive(1, message(body, duplicate=duplicate))[1]
        line.disconnected()
        line.session_lost()


def test_after_a_lost_session_every_message_is_new() -> None:
    line: AckLine[mqtt5.PublishPacket] = AckLine()
    line.arrive(1, message("x"))
    line.disconnected()
    line.session_lost()
    assert line.arrive(1, message("x", duplicate=True))[1]


def test_what_is_under_way_from_a_lost_session_counts_in_the_window_until_it_is_done() -> None:
    line: AckLine[mqtt5.PublishPacket] = AckLine()
    under_way, _ = line.arrive(1, message("x"))
    done, _ = line.arrive(2, message("y"))
    line.settle(done)
    line.disconnected()
    line.session_lost()
    assert (len(line), line.bytes) == (1, 1)
    assert line.settle(under_way)
    assert (len(line), line.bytes) == (0, 0)
    assert line.ready() == []


class Line(RuleBasedStateMachine):
    """A broker that repeats what is unacknowledged, in order, after every reconnect."""

    def __init__(self) -> None:
        super().__init__()
        self.line: AckLine[mqtt5.PublishPacket] = AckLine()
        self.sent: list[int] = []
        self.tickets: dict[int, Ticket[mqtt5.PublishPacket]] = {}
        self.settled: set[int] = set()
        self.acknowledged: list[int] = []
        self.deliveries: dict[int, int] = {}
        self.next = 1

    def _arrive(self, number: int, *, duplicate: bool) -> None:
        ticket, new = self.line.arrive(number, message(str(number), duplicate=duplicate))
        self.tickets[number] = ticket
        if new:
            self.deliveries[number] = self.deliveries.get(number, 0) + 1

    @rule()
    def publish(self) -> None:
        self._arrive(self.next, duplicate=False)
        self.sent.append(self.next)
        self.next += 1

    @precondition(lambda self: self.tickets.keys() - self.settled)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.tickets.keys() - self.settled)))
        self.settled.add(number)
        self.line.settle(self.tickets[number])

    @rule()
    def acknowledge(self) -> None:
        ready = self.line.ready()
        assert ready == self.sent[: len(ready)]
        self.acknowledged += ready
        del self.sent[: len(ready)]

    @rule()
    def reconnect(self) -> None:
        self.line.disconnected()
        for number in self.sent:
            self._arrive(number, duplicate=True)

    @invariant()
    def nothing_is_acknowledged_before_it_is_settled(self) -> None:
        assert set(self.acknowledged) <= self.settled

    @invariant()
    def acknowledgements_follow_the_order_of_arrival(self) -> None:
        assert self.acknowledged == sorted(self.acknowledged)

    @invariant()
    def nothing_is_delivered_twice(self) -> None:
        assert set(self.deliveries.values()) <= {1}

    @invariant()
    def the_line_is_what_the_broker_waits_for(self) -> None:
        assert len(self.line) == len(self.sent)
        assert self.line.bytes == sum(len(str(number)) for number in self.sent)


TestLine = Line.TestCase
TestLine.settings = settings(max_examples=60, stateful_step_count=40)
