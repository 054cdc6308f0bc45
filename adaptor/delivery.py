"""The way of an event from its message to the sink: the one place that composes the rules.

A pipeline serves one sink and one session. The rule above all others: a message's ticket is settled
only when the sink has answered 2xx for each of its events, or the route's policy has put the event
somewhere safe (spool, quarantine) or was told to drop it. Everything else ends in another attempt.

    receive -> start -> answered -> delivered
                  ^         |-----> retry timer (backoff), back to the front
                  |         |-----> given up: quarantine | drop | block
                  |         '-----> the sink is down: blocked, everything waits, one event probes
                  '--- waiting <----'

Bounded by construction: QoS 1 by the session's window, QoS 0 by lines.BEST_EFFORT. No task per
event: requests are futures, and their callbacks drive the pipeline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from mqtt5 import PublishPacket

from weir.adaptor import replies
from weir.adaptor.broker import Ticket
from weir.adaptor.deadletter import Caller
from weir.adaptor.events import Event, MalformedEvent
from weir.adaptor.journal import Journal
from weir.adaptor.lastresort import Keeper, LastResort
from weir.adaptor.lines import BEST_EFFORT_BYTES, Lines
from weir.adaptor.mapping import minted_ids, publisher_id
from weir.adaptor.outage import Outage
from weir.adaptor.outgoing import Failure, Flow, Outgoing, refusal, silence, subscribed
from weir.adaptor.quarantine import LONGEST_ANSWER
from weir.adaptor.retry import BREAK_AFTER, Verdict
from weir.adaptor.spool import Entry
from weir.adaptor.topics import TopicTable
from weir.adaptor.tracecontext import passed_on
from weir.proxy.wire.client import Response

log = logging.getLogger("weir.adaptor")

TOO_OLD = Failure(Verdict.REJECTED, "it has lain in the spool for longer than the route allows")


class Pipeline:
    """Delivers to one sink. Single-threaded; every method is called on the event loop."""

    def __init__(
        self,
        sink: str,
        request_line: bytes,
        caller: Caller,
        keeper: Keeper,
        flows: Sequence[Flow],
        *,
        limit: int,
        url: str = "",
    ) -> None:
        """`sink`: its name for people and the quarantine; `url`: where that is, for dead letters;
        `limit`: requests at a time."""
        self._loop = asyncio.get_running_loop()
        self.sink = sink
        self._misses = 0
        self._request_line, self._caller = request_line, caller
        self._all_flows = tuple(flows)
        self._flows = TopicTable((flow.route.filter, flow) for flow in flows)
        self._with_extras = tuple(flow for flow in flows if flow.batcher or flow.replies)
        self._lines = Lines(flows, self._pump, self._overflowed)
        self._last_resort = LastResort(sink, url or sink, keeper, flows, self._gone)
        self._limit = limit
        self._mint = minted_ids()
        self.journal: Journal | None = None
        self.settle: Callable[[Ticket], None] = lambda _: None
        self._in_flight = 0
        self._held = 0
        self._best_effort_bytes = 0
        self._taken = 0
        self._quiet: asyncio.Future[None] | None = None
        self._stopped = False
        self._outage = Outage(sink, self._send_probe)
        self.unrouted = 0
        self.skip_retained = False
        """3.1.1 can't ask for no retained messages, so those come and are let go here."""

    # --- in ---

    def receive(self, message: PublishPacket, ticket: Ticket | None) -> None:
        """A message of the session; it is settled through `settle` and nothing else."""
        flows = self._flows.matching(message.topic)
        if self.skip_retained and message.retain and flows:
            flows = tuple(flow for flow in flows if flow.route.retained != "never")
            if not flows:
                if ticket is not None:
                    self.settle(ticket)
                return
        if len(flows) != 1:
            flows = subscribed(flows, message.subscription_ids)
            if not flows:
                self._unrouted(message, ticket)
                return
            if ticket is not None:
                ticket.open = len(flows)
        if self.journal is not None and ticket is not None:
            self.journal.arriving(message)
        event_id = publisher_id(message.user_properties) or self._mint()
        self._accept(flows[0], message, ticket, event_id)
        for flow in flows[1:]:
            # two events of one message may share their source, so never their id
            self._accept(flow, message, ticket, self._mint())

    def _unrouted(self, message: PublishPacket, ticket: Ticket | None) -> None:
        """The session still holds a subscription that the routes no longer have."""
        self.unrouted += 1
        if self.unrouted == 1:
            log.warning("no route takes `%s` any more; such messages are let go", message.topic)
        if ticket is not None:
            self.settle(ticket)

    def deliver(self, flow: Flow, message: PublishPacket, entry: Entry) -> None:
        """A message that its feed has in the spool; `feed.gone` is called instead of `settle`."""
        self._accept(flow, message, None, entry.event_id, entry)

    def _accept(
        self,
        flow: Flow,
        message: PublishPacket,
        ticket: Ticket | None,
        event_id: str,
        entry: Entry | None = None,
    ) -> None:
        now, arrived = time.time(), time.monotonic()
        if entry is not None:
            arrived -= max(0.0, now - entry.at)
            now = entry.at
        elif flow.feed is not None:
            flow.feed.take(message, ticket, event_id)
            return
        else:
            if ticket is not None:
                ticket.received = now
            flow.counters.received += 1
        self._held += 1
        malformed = None
        try:
            lines, body = flow.mapper.encode(message, event_id, now)
        except MalformedEvent as error:
            lines, body = flow.mapper.encode_plain(message, event_id, now)
            malformed = Failure(Verdict.REJECTED, f"no CloudEvent: {error}")
        if message.user_properties and flow.batcher is None:
            lines += self._context(message.user_properties)
        head = self._request_line + lines
        outgoing = Outgoing(flow, message, ticket, event_id, now, arrived, head, body, entry)
        if not outgoing.firm:
            self._best_effort_bytes += len(body)
            if self._best_effort_bytes > BEST_EFFORT_BYTES:
                self._overflowed(outgoing)
                return
        lifetime = message.message_expiry_interval
        if lifetime is not None:
            outgoing.expires = outgoing.arrived + lifetime
        if malformed is not None:
            self._give_up(outgoing, malformed)
        elif entry is not None and flow.feed is not None and flow.feed.outlived(outgoing):
            self._give_up(outgoing, TOO_OLD)
        elif flow.order is not None and not self._lines.has_turn(outgoing):
            pass
        elif self._in_flight < self._limit and self._outage.reason is None and flow.gate is None:
            self._start(outgoing)
        elif flow.gate is not None:
            self._lines.put(outgoing)
            self._pump()
        else:
            self._lines.put(outgoing)

    def _context(self, user_properties: list[tuple[str, str]]) -> bytes:
        return passed_on(user_properties)

    def _overflowed(self, outgoing: Outgoing) -> None:
        outgoing.flow.counters.overflowed += 1
        self._gone(outgoing)

    # --- out ---

    def _start(self, outgoing: Outgoing) -> bool:
        """Whether it is on its way now; not so if its time is over."""
        if outgoing.expires is not None and time.monotonic() >= outgoing.expires:
            self._expired(outgoing)
            return False
        self._in_flight += 1
        gate = outgoing.flow.gate
        if gate is not None:
            gate.enter(time.monotonic())
        if outgoing.mark < 0:
            outgoing.mark = self._taken
        timeout = outgoing.flow.route.delivery.timeout
        answer = self._caller_of(outgoing).request(outgoing.head, outgoing.body, timeout)
        answer.add_done_callback(partial(self._answered, outgoing))
        return True

    def _caller_of(self, outgoing: Outgoing) -> Caller:
        """A probe has no company, and neither has a last attempt: whatever the others of its batch
        did, no event is given up for them."""
        batcher = outgoing.flow.batcher
        if batcher is None or self._outage.reason is not None:
            return self._caller
        last = 0 < outgoing.attempts >= outgoing.flow.route.delivery.retry
        return self._caller if last else batcher

    def _answered(self, outgoing: Outgoing, answer: asyncio.Future[Response]) -> None:
        self._in_flight -= 1
        if outgoing.flow.gate is not None:
            outgoing.flow.gate.leave()
        if answer.cancelled():
            self._failed(outgoing, Failure(Verdict.UNAVAILABLE, "the request was given up"))
        elif (error := answer.exception()) is not None:
            self._failed(outgoing, silence(error))
        else:
            response = answer.result()
            if 200 <= response.status <= 299:
                self._taken_by_sink(outgoing, response)
            else:
                self._failed(outgoing, refusal(response, time.time()))
        lines = self._lines
        if lines.waiting or lines.best_effort or lines.gated:
            self._pump()

    def _expired(self, outgoing: Outgoing) -> None:
        """Its publisher said that nobody wants it any more by now (MQTT 5, Message Expiry)."""
        outgoing.flow.counters.expired += 1
        self._gone(outgoing)

    def _pump(self) -> None:
        while self._outage.reason is None and self._in_flight < self._limit and not self._stopped:
            outgoing = self._lines.take()
            if outgoing is None:
                return
            self._start(outgoing)

    def _taken_by_sink(self, outgoing: Outgoing, response: Response) -> None:
        wanted = outgoing.flow.replies
        if wanted is None or not wanted.welcome(outgoing.message):
            self._delivered(outgoing)
            return
        try:
            reply = replies.read(response)
        except MalformedEvent as error:
            failure = Failure(
                Verdict.REJECTED,
                f"the sink's reply is no CloudEvent: {error}",
                response.status,
                response.body[:LONGEST_ANSWER],
            )
            self._failed(outgoing, failure)
        else:
            self._delivered(outgoing, reply)

    def _delivered(self, outgoing: Outgoing, reply: Event | None = None) -> None:
        """With a reply, the message waits until the broker has that."""
        self._taken += 1
        self._misses = 0
        counters = outgoing.flow.counters
        counters.delivered += 1
        counters.latency.record(time.monotonic() - outgoing.arrived)
        if self._outage.reason is not None:
            self._outage.ends()
        replying = outgoing.flow.replies
        if reply is None or replying is None or not replying.has_room(firm=outgoing.firm):
            self._gone(outgoing)
            return
        sent = replying.send(outgoing.message, reply)
        sent.add_done_callback(partial(self._replied, outgoing))

    def _replied(self, outgoing: Outgoing, sent: asyncio.Future[None]) -> None:
        if sent.cancelled():
            return  # we stop; unacknowledged, it comes again
        if (error := sent.exception()) is not None:
            log.error("a reply failed in an unforeseen way; its message waits", exc_info=error)
            return
        self._gone(outgoing)

    def _gone(self, outgoing: Outgoing) -> None:
        """The event needs us no more; its message may be acknowledged as far as it goes."""
        self._held -= 1
        if outgoing.ticket is not None:
            self.settle(outgoing.ticket)
        elif outgoing.entry is None:
            self._best_effort_bytes -= len(outgoing.body)
        elif outgoing.flow.feed is not None:
            outgoing.flow.feed.gone(outgoing.entry)
        if outgoing.key is not None and self._lines.leave_order(outgoing):
            self._loop.call_soon(self._pump)
        if self._quiet is not None:
            self._check_quiet()

    # --- failures ---

    def _failed(self, outgoing: Outgoing, failure: Failure) -> None:
        if self._stopped:
            return  # unacknowledged: the broker keeps it for the next time
        verdict = failure.verdict
        answered = verdict in (Verdict.REJECTED, Verdict.FAILED)
        self._misses = 0 if answered else self._misses + 1
        if verdict is Verdict.REJECTED:
            self._give_up(outgoing, failure)
        elif self._outage.reason is not None and verdict is not Verdict.FAILED:
            # a probe without an answer may be that event's fault: let another one try next
            self._lines.put(outgoing, first=verdict is Verdict.UNAVAILABLE)
            self._still_down(outgoing, failure)
        elif self._misses >= BREAK_AFTER and verdict is Verdict.UNAVAILABLE:
            self._block(outgoing, failure)  # the retries of each would only be more of the same
        elif outgoing.attempts < outgoing.flow.route.delivery.retry:
            self._retry(outgoing, failure)
        elif verdict is Verdict.FAILED or self._proven_alive(outgoing, verdict):
            self._give_up(outgoing, failure)
        else:
            self._block(outgoing, failure)

    def _proven_alive(self, outgoing: Outgoing, verdict: Verdict) -> bool:
        return verdict is Verdict.UNANSWERED and self._taken > outgoing.mark

    def _retry(self, outgoing: Outgoing, failure: Failure) -> None:
        if self._outage.reason is not None:
            self._outage.ends()  # it answered, if only with an error
        wait = outgoing.flow.route.delivery.backoff(outgoing.attempts, failure.retry_after)
        outgoing.attempts += 1
        outgoing.flow.counters.retried += 1
        if self._lines.step_aside(outgoing):
            self._loop.call_later(wait, self._again, outgoing)
        else:
            self._overflowed(outgoing)

    def _again(self, outgoing: Outgoing) -> None:
        self._lines.step_back(outgoing)
        if self._stopped:
            return
        self._lines.put(outgoing, first=True)
        self._pump()

    def _give_up(self, outgoing: Outgoing, failure: Failure) -> None:
        """What no retry can deliver: the route's policy takes it."""
        if outgoing.flow.route.on_failure == "block":
            self._block(outgoing, failure)
            return
        if self._outage.reason is not None and failure.status is not None:
            self._outage.ends()
        self._last_resort.take(outgoing, failure)

    def give_up_old(self, flow: Flow) -> None:
        """However blocked the sink is, what is too old for the spool goes the way of onFailure."""
        feed = flow.feed
        if feed is not None:
            for outgoing in self._lines.pull(
                lambda each: each.flow is flow and feed.outlived(each)
            ):
                self._give_up(outgoing, TOO_OLD)

    # --- a sink that is down ---

    def _block(self, outgoing: Outgoing, failure: Failure) -> None:
        """Nothing is sent but one probe at a time; the events wait unacknowledged."""
        outgoing.attempts = 0
        self._lines.put(outgoing, first=failure.verdict is not Verdict.UNANSWERED)
        self._still_down(outgoing, failure)

    def _still_down(self, outgoing: Outgoing, failure: Failure) -> None:
        self._outage.goes_on(failure, outgoing.flow.route.delivery)
        if self._quiet is not None:
            self._check_quiet()

    def _send_probe(self) -> None:
        while not self._stopped and self._outage.reason is not None:
            outgoing = self._lines.take_any()
            if outgoing is None:
                self._outage.look_again()
                return
            if self._start(outgoing):
                return

    # --- beginning and end ---

    def start(self) -> None:
        """Deliver what lies in the spool from before."""
        for flow in self._all_flows:
            if flow.feed is not None:
                flow.feed.start()

    async def drain(self, seconds: float) -> None:
        """Deliver what was received, for at most `seconds`; returns early when the sink is down.
        Call it when nothing more is received."""
        self._quiet = self._loop.create_future()
        for flow in self._all_flows:
            if flow.feed is not None:
                flow.feed.stop()
        for flow in self._with_extras:
            if flow.batcher is not None:
                flow.batcher.hurry()
        self._check_quiet()
        await asyncio.wait((self._quiet,), timeout=seconds)

    def _check_quiet(self) -> None:
        quiet = self._held == 0 or (self._outage.reason is not None and self._in_flight == 0)
        if quiet and self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)

    def stop(self) -> None:
        """No more attempts. What was not delivered stays unacknowledged."""
        self._stopped = True
        self._outage.stop()
        self._lines.stop()
        self._last_resort.stop()
        for flow in self._with_extras:
            if flow.replies is not None:
                flow.replies.stop()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def blocked(self) -> str | None:
        """Why nothing is sent but a probe now and then."""
        return self._outage.reason

    @property
    def unsafe(self) -> str | None:
        """Why events that were given up can't be quarantined, or replies not published; their
        messages wait unacknowledged."""
        waiting = [
            *(flow.replies.waiting for flow in self._with_extras if flow.replies is not None),
            *(flow.feed.blocked for flow in self._all_flows if flow.feed is not None),
        ]
        return self._last_resort.unsafe or next((why for why in waiting if why is not None), None)

    def snapshot(self) -> dict[str, object]:
        reason = self.blocked or self.unsafe
        return {
            "state": "up" if reason is None else "blocked",
            "reason": reason,
            "since": self._outage.since,
            "in_flight": self._in_flight,
            "waiting": len(self._lines),
            "unacknowledged": self._held,
            "unrouted": self.unrouted,
        }
