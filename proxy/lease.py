"""The agent's end of the lease: find hold's door, ring, take the listeners, speak (decisions/022).

Owns the descriptors and the words. What follows from what is heard is `policy.lease`; who accepts
is the caller's business. Needs the right to trace hold (CAP_SYS_PTRACE) and to enter the pod's
network namespace.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from weir.proxy import listeners, netns, sysctl
from weir.proxy.policy.lease import Action, Event

BELL = 62
"""Hold's descriptor that is for borrowing (hold/lease.h)."""
RING = b"weir1 ring"
COMM = "weir-hold"
_PORTS = 8


class NoHold(Exception):
    """Nothing to borrow from; `str()` says why, for whoever reads the pod's status."""


class Heard(NamedTuple):
    """`listeners` come with a grant; who gets them closes them."""

    event: Event
    listeners: tuple[socket.socket, ...] = ()


def allow_fences(namespace: Path) -> None:
    """What waits at a closed listener moves to another one: hold lends only where that is on.

    Raises OSError.
    """
    netns.run_in(namespace, lambda: sysctl.put("net/ipv4/tcp_migrate_req", "1"))


def find(pids: Iterable[int]) -> int | None:
    """A pidfd of the hold, or of the sidecar it became, among a container's processes."""
    for pid in pids:
        try:
            process = os.pidfd_open(pid)
        except OSError:  # gone meanwhile
            continue
        if _is_hold(pid) and alive(process):  # alive now, so what was read was its own
            return process
        os.close(process)
    return None


def ring(process: int) -> socket.socket:
    """Ring at the process of this pidfd; our end of the lease. Raises NoHold."""
    try:
        copied = listeners.take(process, BELL)
    except OSError as error:
        hint = "(CAP_SYS_PTRACE? ptrace_scope, AppArmor, SELinux? `weir doctor` tells)"
        raise NoHold(f"borrowing hold's door: {error.strerror} {hint}") from None
    if not os.readlink(f"/proc/self/fd/{copied}").startswith("socket:"):  # noqa: PTH115
        os.close(copied)
        raise NoHold("the process has no door: it is not of this release")
    with socket.socket(fileno=copied) as bell:
        if (bell.family, bell.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            raise NoHold("the process has no door: it is not of this release")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            try:
                socket.send_fds(bell, [RING], [theirs.fileno()], socket.MSG_DONTWAIT)
            except OSError as error:
                ours.close()
                raise NoHold(f"ringing at hold's door: {error.strerror}") from error
    return ours


def hear(lease: socket.socket) -> Heard | None:
    """What hold says, None for nothing yet. Whatever can't be understood is a hang-up."""
    try:
        word, descriptors, _, _ = socket.recv_fds(lease, 64, _PORTS)
    except BlockingIOError:
        return None
    except OSError:
        return Heard(Event.HUNG_UP)
    listeners = tuple(socket.socket(fileno=descriptor) for descriptor in descriptors)
    for listener in listeners:
        listener.setblocking(False)
        os.set_inheritable(listener.fileno(), False)
    if word == Event.GRANTED.value.encode() and listeners:
        return Heard(Event.GRANTED, listeners)
    for listener in listeners:
        listener.close()
    ends = word == Event.TOLD_TO_END.value.encode()
    return Heard(Event.TOLD_TO_END if ends else Event.HUNG_UP)


def say(lease: socket.socket, action: Action) -> bool:
    """Whether it is said: if not, hold does not read. A beat may be dropped then; what ends the
    lease is to be said again."""
    try:
        lease.send(action.value.encode(), socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return False
    except (BrokenPipeError, ConnectionResetError):  # hold is gone: nobody to tell
        pass
    return True


def _is_hold(pid: int) -> bool:
    try:
        if Path(f"/proc/{pid}/comm").read_text().strip() == COMM:
            return True
        return b"\0WEIR_HOLD=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def alive(process: int) -> bool:
    import select

    poll = select.poll()
    poll.register(process, select.POLLIN)
    return not poll.poll(0)
