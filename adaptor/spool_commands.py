"""The commands `weir spool list|discard`: what lies in the spool, and letting it go.

Owns their arguments, exit codes and what people read. What leads to delivery is no command: an
adaptor that has the route delivers what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from weir.adaptor.quarantine_commands import default_quarantine
from weir.adaptor.spool import Entry, Spool, SpoolError, entries


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands; each sets `call` to a function of the parsed arguments."""
    spool = subparsers.add_parser(
        "spool", help="list or discard the events that wait on this machine's disk"
    )
    actions = spool.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="how many there are for which route, or each of them")
    listing.add_argument("--events", action="store_true", help="each event, not only how many")
    listing.add_argument("--json", action="store_true", help="one JSON object per event")
    listing.set_defaults(call=list_spool)
    discarding = actions.add_parser(
        "discard", help="delete events for good; no adaptor may be using the spool meanwhile"
    )
    discarding.add_argument("numbers", nargs="*", type=int, help="of events")
    discarding.add_argument("--all", action="store_true", help="needed to discard without numbers")
    discarding.set_defaults(call=discard_spool)
    for action in (listing, discarding):
        action.add_argument("--route", metavar="NAME", help="only those of this route")
        action.add_argument(
            "--spool", type=Path, default=default_quarantine().with_name("spool.db"), metavar="FILE"
        )


def _of_route(path: Path, route: str | None) -> list[Entry]:
    if not path.exists():
        raise SpoolError(f"there is no spool {path}; name it with --spool")
    return [each for each in entries(path) if route in (None, each.route)]


def list_spool(args: argparse.Namespace) -> int:
    try:
        found = _of_route(args.spool, args.route)
    except SpoolError as error:
        return _complain(error)
    if args.json or args.events:
        for each in found:
            print(json.dumps(_as_json(each)) if args.json else _as_line(each))
        return 0
    for route, count in Counter(each.route for each in found).items():
        oldest = min(each.at for each in found if each.route == route)
        print(f"{route}: {count} events, the oldest of {_time(oldest)}")
    if not found:
        print("the spool holds nothing" + (f" for {args.route}" if args.route else ""))
    return 0


def _as_line(entry: Entry) -> str:
    try:
        message = entry.message()
        what = f"{message.topic}, {len(message.payload)} bytes"
    except ValueError as error:
        what = f"damaged: {error}"
    first = f"{entry.number:>6}  {_time(entry.at)}  {entry.route}  id {entry.event_id}"
    return f"{first}\n        {what}"


def _as_json(entry: Entry) -> dict[str, object]:
    known: dict[str, object] = {
        "number": entry.number,
        "at": entry.at,
        "route": entry.route,
        "id": entry.event_id,
    }
    try:
        message = entry.message()
    except ValueError as error:
        return known | {"damaged": str(error)}
    return known | {"topic": message.topic, "bytes": len(message.payload)}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def discard_spool(args: argparse.Namespace) -> int:
    if not args.numbers and not args.all:
        return _complain("name the numbers of the events, or say --all")
    try:
        known = {each.number for each in _of_route(args.spool, args.route)}
        numbers = args.numbers or sorted(known)
        spool = Spool(args.spool)
        gone = spool.discard([each for each in numbers if each in known])
        spool.close()
    except SpoolError as error:
        return _complain(error)
    print(f"discarded {gone} of {len(numbers)}")
    return 0 if gone == len(numbers) else 1


def _complain(problem: object) -> int:
    print(f"weir spool: {problem}", file=sys.stderr)
    return 2
