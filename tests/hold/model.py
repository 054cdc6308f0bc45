"""Hold, the sidecar and agents as one state space, to be walked whole.

Hold obeys the table of hold/lease.h, agents run proxy/policy/lease.py itself; this file adds only
what the kernel does: queues, copies of sockets, the fence, and what a kill closes.

A stopped process is one whose next step comes later than everybody else's, and silence may be
noticed at any time, so SIGSTOP and SIGCONT at every point are among the orders walked. An agent
rings once: one that starts anew, or tries again, is another agent.

An agent is two processes: the supervisor has the lease, a worker has the copies and outlives a
killed supervisor for as long as it likes ("orphan").

A copy is "live" while a connection can come out of it, "dead" once it was fenced.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from tests.hold.table import Row
from weir.proxy.policy.lease import Action, Event, Lease, Phase

HoldTable = Mapping[tuple[str, str], Row]
AgentTable = Mapping[tuple[Phase, Event], tuple[Phase, tuple[Action, ...]]]
_FROM_AGENT = {"released": "RELEASED", "done": "DONE", "EOF": "BROKEN"}


class Agent(NamedTuple):
    """`inbox` is from hold, `outbox` to it: one lease has one pair of queues."""

    state: str = "new"  # new, alive, orphan, dead
    phase: Phase = Phase.WAITING
    todo: tuple[Action, ...] = ()
    copy: str = ""
    accepting: bool = False
    inbox: tuple[str, ...] = ()
    outbox: tuple[str, ...] = ()

    @property
    def listener(self) -> str:
        """What it has, or is about to receive."""
        if self.copy:
            return self.copy
        return next((m.partition(":")[2] for m in self.inbox if m.startswith("grant:")), "")

    def fenced(self) -> Agent:
        return self._replace(
            copy="dead" if self.copy else "",
            inbox=tuple("grant:dead" if m == "grant:live" else m for m in self.inbox),
        )


class World(NamedTuple):
    """`hold`: a state of the table, YIELDING (a sidecar that lets go) or KILLED."""

    agents: tuple[Agent, ...]
    hold: str = "WAITING"
    after: str = ""
    todo: tuple[str, ...] = ()
    lease: int = -1
    rings: tuple[int, ...] = ()
    terms: int = 0
    kills: int = 1

    def owners(self) -> list[str]:
        """Everybody a connection can come to, now or without anybody else's doing."""
        found = [f"agent {i}" for i, a in enumerate(self.agents) if a.listener == "live"]
        return found + (["sidecar"] if self.hold == "SIDECAR" else [])

    def agent(self, index: int, agent: Agent) -> World:
        return self._replace(agents=(*self.agents[:index], agent, *self.agents[index + 1 :]))


Step = tuple[str, World]


class Model:
    def __init__(self, hold: HoldTable, agent: AgentTable) -> None:
        self._hold, self._agent = hold, agent
        self.rows_taken: set[tuple[str, str]] = set()
        self.events_taken: set[tuple[Phase, Event]] = set()

    def steps(self, world: World) -> Iterator[Step]:
        yield from self.holds(world)
        for index, agent in enumerate(world.agents):
            yield from self._agents(world, index, agent)

    # --- hold, and the sidecar it becomes -------------------------------------------------------
    def holds(self, world: World) -> Iterator[Step]:
        if world.hold == "GONE":
            return
        if world.hold == "KILLED":
            # the container comes back; binding fails while any copy listens
            if all(a.listener != "live" for a in world.agents):
                yield "hold starts", world._replace(hold="WAITING")
            return
        if world.todo:
            yield self._acts(world)
        else:
            yield from self._hears(world)
        if world.kills:
            yield "hold is killed", _closed(world._replace(kills=world.kills - 1), "KILLED")

    def _hears(self, world: World) -> Iterator[Step]:
        if world.terms < 2:
            told = world._replace(terms=world.terms + 1)
            if (world.hold, "SIGTERM_") in self._hold:
                yield self._event(told, "SIGTERM_")
            else:
                yield "the sidecar is told to stop", told
        if world.hold == "SIDECAR":
            if world.terms:
                yield "the sidecar has drained", _closed(world, "GONE")
            elif world.rings:
                yield "the sidecar lets go", world._replace(hold="YIELDING")
        elif world.hold == "YIELDING":
            yield "the sidecar execs hold", world._replace(hold="WAITING")
            yield "the sidecar goes on", world._replace(hold="SIDECAR")
        if world.hold == "WAITING" and world.rings:
            first, *rest = world.rings
            yield self._event(world._replace(lease=first, rings=tuple(rest)), "RING")
        if world.lease >= 0:
            agent = world.agents[world.lease]
            if agent.outbox:
                word, *left = agent.outbox
                heard = world.agent(world.lease, agent._replace(outbox=tuple(left)))
                yield self._event(heard, _FROM_AGENT[word])
        for event in ("SILENCE", "BOUND"):
            if (world.hold, event) in self._hold:
                yield self._event(world, event)

    def _event(self, world: World, event: str) -> Step:
        self.rows_taken.add((world.hold, event))
        after, actions = self._hold[world.hold, event]
        return f"hold: {event}", world._replace(after=after, todo=actions)

    def _acts(self, world: World) -> Step:
        action, *rest = world.todo
        done = world._replace(todo=tuple(rest))
        to = world.lease
        if action == "FENCE":
            done = done._replace(agents=tuple(a.fenced() for a in done.agents))
        elif action == "GRANT":
            done = _sent(done, to, "grant:live")
        elif action == "TELL":
            done = _sent(done, to, "end")
        elif action == "HANG_UP":
            done = _sent(done, to, "EOF")._replace(lease=-1)
        elif action == "CLOSE":
            done = _closed(done, "GONE")._replace(todo=())
            done = done._replace(agents=tuple(a.fenced() for a in done.agents))
        if not done.todo and done.hold != "GONE":
            done = done._replace(hold=done.after, after="")
        return f"hold does {action}", done

    # --- an agent -------------------------------------------------------------------------------
    def _agents(self, world: World, index: int, agent: Agent) -> Iterator[Step]:
        name = f"agent {index}"
        if agent.state == "dead":
            return
        if agent.state == "orphan":
            yield f"{name}'s worker ends", world.agent(index, Agent("dead", outbox=agent.outbox))
            return
        if agent.state == "new":
            if world.hold not in ("KILLED", "GONE"):
                ringing = world._replace(rings=(*world.rings, index))
                yield f"{name} rings", ringing.agent(index, agent._replace(state="alive"))
            return
        ended = (*agent.outbox, "EOF")
        left_over = Agent("orphan", copy=agent.copy, accepting=agent.accepting, outbox=ended)
        yield f"{name}'s supervisor is killed", world.agent(index, left_over)
        if agent.todo:
            yield f"{name}: {agent.todo[0].value}", world.agent(index, _does(agent))
            return
        if agent.inbox:
            word, *left = agent.inbox
            told = agent._replace(inbox=tuple(left))
            if word.startswith("grant:"):
                told = told._replace(copy=word.partition(":")[2])
            event = {"EOF": Event.HUNG_UP, "end": Event.TOLD_TO_END}.get(word, Event.GRANTED)
            yield f"{name} hears {word}", world.agent(index, self._happened(told, event))
        for event in (Event.GIVE_UP, Event.DRAINED):
            if (agent.phase, event) in self._agent:
                after = self._happened(agent, event)
                yield f"{name}: {event.value}", world.agent(index, after)

    def _happened(self, agent: Agent, event: Event) -> Agent:
        lease = Lease(agent.phase, self._agent)
        if (agent.phase, event) in self._agent:
            self.events_taken.add((agent.phase, event))
        return agent._replace(todo=lease.happened(event, 0.0), phase=lease.phase)


def _does(agent: Agent) -> Agent:
    action, *rest = agent.todo
    done = agent._replace(todo=tuple(rest))
    if action is Action.ACCEPT:
        return done._replace(accepting=True)
    if action is Action.STOP_ACCEPTING:
        return done._replace(accepting=False)
    if action is Action.CLOSE_COPIES:
        return done._replace(copy="")
    if action in (Action.SAY_RELEASED, Action.SAY_DONE):
        return done._replace(outbox=(*done.outbox, action.value))
    if action is Action.HANG_UP:  # what was not read yet goes with the socket, listeners included
        return done._replace(outbox=(*done.outbox, "EOF"), inbox=())
    return done


def _sent(world: World, index: int, word: str) -> World:
    """Into the agent's queue; to one that has hung up it is lost (EPIPE), and its EOF is next."""
    agent = world.agents[index]
    if agent.state != "alive" or "EOF" in agent.outbox:
        return world
    return world.agent(index, agent._replace(inbox=(*agent.inbox, word)))


def _closed(world: World, state: str) -> World:
    """Hold's process is gone: all its sockets close, rings that nobody read as well."""
    for index in {*world.rings, world.lease} - {-1}:
        world = _sent(world, index, "EOF")
    return world._replace(hold=state, after="", todo=(), lease=-1, rings=())


def walk(
    start: World, steps: Callable[[World], Iterator[Step]]
) -> Iterator[tuple[World, Callable[[], list[str]]]]:
    """Every world that can be reached, nearest first, with how it is reached."""
    came: dict[World, tuple[World, str] | None] = {start: None}
    queue = deque([start])

    def path(world: World) -> list[str]:
        names = []
        while (step := came[world]) is not None:
            world = step[0]
            names.append(step[1])
        return names[::-1]

    while queue:
        world = queue.popleft()
        yield world, lambda world=world: path(world)  # type: ignore[misc]
        for name, after in steps(world):
            if after not in came:
                came[after] = (world, name)
                queue.append(after)
