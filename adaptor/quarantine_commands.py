"""The commands `weir quarantine list|replay|discard`.

Owns their arguments, exit codes and what people read. Each is a function that takes parsed
arguments and returns an exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import uvloop

from weir.adaptor import sinks
from weir.adaptor.endpoints import Access
from weir.adaptor.httpbinding import Mode, encoded
from weir.adaptor.knative import Environment
from weir.adaptor.quarantine import Held, Quarantine, QuarantineError
from weir.adaptor.retry import Delivery, Verdict, judge
from weir.proxy.wire.client import TransportError


def default_quarantine() -> Path:
    """Where the quarantine is unless told otherwise: the machine's state folder or the user's."""
    if os.geteuid() == 0:
        return Path("/var/lib/weir/quarantine.db")
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "weir" / "quarantine.db"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands; each sets `call` to a function of the parsed arguments."""
    quarantine = subparsers.add_parser(
        "quarantine", help="list, replay or discard the events that could not be delivered"
    )
    actions = quarantine.add_subparsers(dest="action", required=True)
    for name, text in _ACTIONS.items():
        action = actions.add_parser(name, help=text)
        action.add_argument("numbers", nargs="*", type=int, help="only these (default: all)")
        action.add_argument("--quarantine", type=Path, default=default_quarantine())
        action.set_defaults(call=_COMMANDS[name])
    listing, replaying, discarding = (actions.choices[name] for name in _ACTIONS)
    listing.add_argument("--json", action="store_true", help="one JSON object per line")
    replaying.add_argument("--function-url", help="where the sink `function` is")
    replaying.add_argument("--sink-ca", type=Path, metavar="FILE", help="CA of https sinks (PEM)")
    replaying.add_argument("--sink-token-file", type=Path, metavar="FILE", help="for https sinks")
    replaying.add_argument(
        "--mode", choices=get_args(Mode), default="binary", help="of the requests (default binary)"
    )
    discarding.add_argument("--all", action="store_true", help="needed to discard without numbers")


_ACTIONS = {
    "list": "show the events and why they are here",
    "replay": "deliver events to their sinks again; what a sink takes leaves the quarantine",
    "discard": "delete events for good",
}


def list_quarantine(args: argparse.Namespace) -> int:
    try:
        quarantine = _open(args.quarantine)
    except QuarantineError as error:
        return _complain("quarantine", error)
    count = 0
    for held in quarantine.events(args.numbers):
        count += 1
        print(json.dumps(_as_json(held)) if args.json else _as_line(held))
    if not count and not args.json:
        print("the quarantine holds no such event" if args.numbers else "the quarantine is empty")
    return 0


def _as_line(held: Held) -> str:
    at = datetime.fromtimestamp(held.at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    event = held.event
    line = f"{held.number:>6}  {at}  {held.route} -> {held.sink}  id {event.attributes['id']}"
    answer = held.answer.decode("utf-8", "replace").strip().partition("\n")[0][:120]
    said = f': "{answer}"' if answer else ""
    return f"{line}\n        {held.topic}, {len(event.data)} bytes; {held.reason}{said}"


def _as_json(held: Held) -> dict[str, object]:
    return {
        "number": held.number,
        "at": held.at,
        "route": held.route,
        "sink": held.sink,
        "topic": held.topic,
        "reason": held.reason,
        "status": held.status,
        "answer": held.answer.decode("utf-8", "replace"),
        "attributes": dict(held.event.attributes),
        "datacontenttype": held.event.content_type,
        "bytes": len(held.event.data),
    }


def discard_quarantine(args: argparse.Namespace) -> int:
    if not args.numbers and not args.all:
        return _complain("quarantine discard", "name the numbers of the events, or say --all")
    try:
        quarantine = _open(args.quarantine)
        numbers = args.numbers or [held.number for held in quarantine.events()]
        gone = quarantine.discard(numbers)
    except QuarantineError as error:
        return _complain("quarantine", error)
    print(f"discarded {gone} of {len(numbers)}")
    return 0 if gone == len(numbers) else 1


def replay_quarantine(args: argparse.Namespace) -> int:
    try:
        quarantine = _open(args.quarantine)
        delivered, left = uvloop.run(
            replay(
                quarantine,
                args.numbers,
                args.function_url,
                Access(args.sink_ca, args.sink_token_file),
                args.mode,
            )
        )
    except (QuarantineError, ValueError) as error:
        return _complain("quarantine", error)
    print(f"delivered {delivered}, left in quarantine {left}")
    return 0 if not left else 1


async def replay(
    quarantine: Quarantine,
    numbers: Sequence[int] = (),
    function_url: str | None = None,
    access: Access | None = None,
    mode: Mode = "binary",
) -> tuple[int, int]:
    """Events delivered and events that stay. One at a time, in order; each leaves the quarantine
    only after the sink's 2xx. A sink that is down is not asked again."""
    clients: dict[str, tuple[sinks.Target, sinks.SinkClient]] = {}
    down: set[str] = set()
    delivered = left = 0
    try:
        for held in quarantine.events(numbers):
            if held.sink.startswith("mqtt:"):
                print(f"{held.number}: stays in quarantine: {_REPLY}", file=sys.stderr)
                left += 1
                continue
            if held.sink not in clients:
                target = sinks.Target.parse(sinks.resolve(held.sink, function_url))
                clients[held.sink] = target, _client(held.sink, target, access)
            trouble = None if held.sink not in down else "its sink is down"
            if trouble is None:
                verdict, trouble = await _send(held, mode, *clients[held.sink])
                if verdict is Verdict.UNAVAILABLE:
                    down.add(held.sink)
            if trouble is None:
                quarantine.discard([held.number])
                delivered += 1
            else:
                print(f"{held.number}: stays in quarantine: {trouble}", file=sys.stderr)
                left += 1
    finally:
        for _, client in clients.values():
            await client.close()
    return delivered, left


def _client(sink: str, target: sinks.Target, access: Access | None) -> sinks.SinkClient:
    allowed = access if access is not None and target.tls else Access()
    certs = Environment.read().ca_certs
    return sinks.SinkClient(sink, target, allowed, 1, ca_certs=certs)


async def _send(
    held: Held, mode: Mode, target: sinks.Target, client: sinks.SinkClient
) -> tuple[Verdict, str | None]:
    """The verdict, and why the event was not delivered."""
    lines, body = encoded(held.event, mode)
    head = target.request_line + lines
    try:
        response = await client.request(head, body, Delivery().timeout)
    except TransportError as error:
        return Verdict.UNAVAILABLE, str(error)
    verdict = judge(response.status)
    if verdict is Verdict.DELIVERED:
        return verdict, None
    return verdict, f"the sink answered {response.status}"


def _open(path: Path) -> Quarantine:
    if not path.exists():
        raise QuarantineError(f"there is no quarantine {path}; name it with --quarantine")
    return Quarantine(path)


_COMMANDS = {
    "list": list_quarantine,
    "replay": replay_quarantine,
    "discard": discard_quarantine,
}


_REPLY = "it is a reply for a topic, and no sink's; publish it yourself, then discard it"


def _complain(command: str, problem: object) -> int:
    print(f"weir {command}: {problem}", file=sys.stderr)
    return 2
