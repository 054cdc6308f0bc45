"""usage: agent.py PID NETNS NAME: borrow from that hold and answer every request with NAME.

The worst agent there is: it accepts whenever a listener is readable, without a look at its lease.
Orders are lines on stdin (release, done, and freeze: take nothing more, end what was taken, keep
everything, say nothing to hold), what happened are lines on stdout.
"""

import os
import selectors
import socket
import sys
import time
from pathlib import Path

from weir.proxy import lease as wire
from weir.proxy.policy.lease import Action, Event, Lease, Phase

pid, namespace, name = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
ANSWER = f"HTTP/1.1 200 OK\r\nContent-Length: {len(name)}\r\n\r\n{name}".encode()
selector = selectors.DefaultSelector()
policy = Lease()
listeners: list[socket.socket] = []
clients: set[socket.socket] = set()
frozen = False


def tell(*words: object) -> None:
    print(*words, flush=True)


def do(actions: tuple[Action, ...], lease: socket.socket) -> None:
    for action in actions:
        if action is Action.ACCEPT:
            for listener in listeners:
                selector.register(listener, selectors.EVENT_READ, "accept")
        elif action is Action.STOP_ACCEPTING:
            for listener in listeners:
                if listener in selector.get_map():
                    selector.unregister(listener)
        elif action is Action.CLOSE_COPIES:
            for listener in listeners:
                listener.close()
            listeners.clear()
        elif action in (Action.BEAT, Action.SAY_RELEASED, Action.SAY_DONE):
            wire.say(lease, action)
        elif action is Action.HANG_UP:
            selector.unregister(lease)
            lease.close()
        elif action is Action.DRAIN:
            tell("drain")
    if actions and policy.phase is not Phase.WAITING:
        tell(policy.phase.value)


def accept(listener: socket.socket) -> None:
    try:
        client, _ = listener.accept()
    except BlockingIOError:
        return
    except OSError as error:
        tell("accept:", error.strerror)
        try:
            listener.listen(16)
            tell("listens again")  # must never be
        except OSError as again:
            tell("listen:", again.strerror)
        selector.unregister(listener)
        return
    client.settimeout(20.0)
    clients.add(client)
    selector.register(client, selectors.EVENT_READ, "answer")


def answer(client: socket.socket) -> None:
    try:
        data = client.recv(65536)
        if data:
            client.sendall(ANSWER)
    except OSError:
        data = b""
    if not data or b"close" in data:
        selector.unregister(client)
        clients.discard(client)
        client.close()


wire.allow_fences(namespace)
process = wire.find([pid])
if process is None:
    sys.exit(f"{pid} is no hold")
lease = wire.ring(process)
selector.register(lease, selectors.EVENT_READ, "lease")
selector.register(sys.stdin, selectors.EVENT_READ, "order")
tell("rung")
while True:
    for beat in policy.look(time.monotonic()):
        wire.say(lease, beat)
    if frozen and not clients:
        tell("frozen")
        frozen = False
    wait = min(policy.due - time.monotonic(), 60.0)
    # listeners first: the lease is only looked at when there is nothing to take
    events = sorted(selector.select(max(wait, 0.0)), key=lambda event: str(event[0].data))
    for key, _ in events:
        sock = key.fileobj
        if key.data == "order":
            order = os.read(0, 100).decode().strip()
            if not order:
                sys.exit(0)
            if order == "freeze":
                frozen = True
                for listener in listeners:
                    selector.unregister(listener)
                continue
            event = {"release": Event.GIVE_UP, "done": Event.DRAINED}[order]
            do(policy.happened(event, time.monotonic()), lease)
        elif isinstance(sock, socket.socket) and key.data == "accept":
            accept(sock)
        elif isinstance(sock, socket.socket) and key.data == "answer":
            answer(sock)
        elif isinstance(sock, socket.socket) and sock.fileno() >= 0:
            heard = wire.hear(sock)
            if heard is not None:
                listeners += heard.listeners
                do(policy.happened(heard.event, time.monotonic()), sock)
