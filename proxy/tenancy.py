"""One pod in the hands of one relay worker, from its adoption until nothing of it is in flight.

Owns what a worker is told at the adoption, and which of its answers are still to come. A pod that
is lent, lost and lent again has several tenancies, the older ones only ending their connections; a
tenancy survives its worker, and moves to another.
"""

from __future__ import annotations

import socket
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from weir.proxy.certificates import Pair
from weir.proxy.control import Message
from weir.proxy.counters import Shown
from weir.proxy.flag import Flag
from weir.proxy.holds import Hold
from weir.proxy.served import ServedPod

if TYPE_CHECKING:
    from weir.proxy.workers import WorkerProcess


class Tenancy:
    """`worker` is None while there is none to be had."""

    def __init__(self, pod: ServedPod, number: int, hold: Hold | None) -> None:
        self.pod = pod
        self.netns = pod.spec.netns
        """Of its own: what is in flight may need sockets when the pod is somebody else's."""
        self._hold = hold
        self.id = f"{pod.spec.name}/{number}"
        self.worker: WorkerProcess | None = None
        self.terminating = False
        """The pod was told to end; the worker drains it as a queue-proxy would."""
        self.leaving = False
        self.shown = Shown()
        self.drained = Flag()
        self.closed = Flag()
        """No worker has a listener of it (any more)."""
        self.released = Flag()
        """Nothing of it is in flight."""

    def adoption(self) -> tuple[Message, list[socket.socket]]:
        """The message for a worker and the listeners that go with it."""
        pod = self.pod
        roles = [role for role, listeners in pod.listeners.items() for _ in listeners]
        message: Message = {
            "op": "adopt",
            "pod": self.id,
            "roles": roles,
            "offer": pod.offer,
            "foreign": self.netns is not None,
            "terminating": self.terminating,
        }
        if pod.environment is None:
            message["settings"] = asdict(pod.spec.settings)
        else:  # the contract's own form of all settings, which is known to be readable
            message |= {"environment": pod.environment, "age": pod.age}
            message["certificate"] = pod.certificate
            message |= {"counted": pod.told(), "shown": self.shown.handed_on()}
        return message, [sock for listeners in pod.listeners.values() for sock in listeners]

    def renewed(self) -> Pair | None:
        """Another certificate than the one before, once."""
        found = self._hold.renewed() if self._hold is not None else None
        if found is not None and self._hold is not None:
            self._hold = replace(self._hold, certificate=found)
        return found

    def over(self) -> None:
        """Its worker ended, or said so. Idempotent."""
        if self._hold is not None:
            self._hold.close()
            self._hold = None
        self.pod.tenancy_ended(self.id)
        self.drained.set()
        self.closed.set()
        self.released.set()
