"""`weir routes check` and `weir routes try`: what a routes file means, before anything is started.

Prints what would be sent, made by the same code that would send it. Connects to nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mqtt5 import PublishPacket, QoS

from weir.adaptor import sinks
from weir.adaptor.address import Broker
from weir.adaptor.endpoints import FUNCTION
from weir.adaptor.events import MalformedEvent
from weir.adaptor.knative import Environment
from weir.adaptor.mapping import Mapper, minted_ids, publisher_id
from weir.adaptor.replies import NoTopic, topic_of
from weir.adaptor.routes import Route, load


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    routes = subparsers.add_parser("routes", help="check a routes file, and try a message on it")
    actions = routes.add_subparsers(dest="action", required=True)
    check = actions.add_parser("check", help="say all that is wrong in a routes file")
    check.add_argument("file", type=Path)
    check.set_defaults(call=check_routes)
    trial = actions.add_parser("try", help="print the events that a message would become")
    trial.set_defaults(call=try_routes)
    add = trial.add_argument
    add("file", type=Path)
    add("topic")
    add("payload", help="as text; @FILE for a file's content, - for standard input")
    add("--qos", type=int, choices=(0, 1), default=1)
    add("--retain", action="store_true")
    add("--content-type", metavar="TYPE", help="the MQTT 5 property")
    add("--user", action="append", default=[], metavar="NAME=VALUE", help="a user property")
    add("--expiry", type=int, metavar="S", help="Message Expiry Interval in seconds")
    add("--response-topic", metavar="TOPIC", help="where the publisher wants a reply, MQTT 5")
    add("--broker", default="mqtt://localhost", metavar="URL", help="for {broker} in templates")
    add("--function-url", help="where the sink `function` is")
    add("--mqtt-version", choices=("5", "3.1.1"), default="5")


def check_routes(args: argparse.Namespace) -> int:
    try:
        routes = load(args.file, Environment.read().sink)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for route in routes:
        how = "" if route.sending.mode == "binary" else f", {route.sending.mode}"
        how += ", with replies" if route.sending.reply is not None else ""
        print(f"{route.name}: {route.filter.text} (QoS {route.qos}) -> {route.sink}{how}")
    count = len({route.sink for route in routes})
    print(f"{args.file}: {len(routes)} routes, {count} sinks, nothing wrong")
    return 0


def try_routes(args: argparse.Namespace) -> int:
    try:
        knative = Environment.read()
        routes = load(args.file, knative.sink)
        message = _message(args)
        broker = Broker.parse(args.broker).address
        matching = [route for route in routes if route.filter.matches(message.topic)]
        blocks = [
            _block(
                Mapper(route, route.broker.address if route.broker else broker, knative.extensions),
                route.broker.address if route.broker else broker,
                message,
                args.function_url,
                first=number == 0,
                old=_is_old(args),
            )
            for number, route in enumerate(matching)
        ]
    except (ValueError, OSError) as error:
        print(f"weir routes try: {error}", file=sys.stderr)
        return 2
    if not matching:
        filters = ", ".join(route.filter.text for route in routes)
        print(f"no route takes `{message.topic}`; the filters are {filters}", file=sys.stderr)
        return 1
    sys.stdout.flush()
    sys.stdout.buffer.write(b"\n".join(blocks))
    sys.stdout.buffer.flush()
    return 0


def _is_old(args: argparse.Namespace) -> bool:
    return str(args.mqtt_version) == "3.1.1"


def _message(args: argparse.Namespace) -> PublishPacket:
    """Raises ValueError and OSError."""
    if args.payload == "-":
        payload = sys.stdin.buffer.read()
    elif args.payload.startswith("@"):
        payload = Path(args.payload[1:]).read_bytes()
    else:
        payload = args.payload.encode("utf-8", "surrogateescape")
    pairs = []
    for text in args.user:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--user {text}: write NAME=VALUE")
        pairs.append((name, value))
    if not args.topic or "+" in args.topic or "#" in args.topic:
        raise ValueError(f"`{args.topic}` is no topic to publish to; name one without wildcards")
    properties = pairs or args.content_type or args.response_topic or args.expiry is not None
    if _is_old(args) and properties:
        raise ValueError("MQTT 3.1.1 has no properties; leave them out, or try it with version 5")
    return PublishPacket(
        args.topic,
        payload,
        qos=QoS(args.qos),
        retain=args.retain,
        packet_id=1 if args.qos else None,
        content_type=args.content_type,
        message_expiry_interval=args.expiry,
        response_topic=args.response_topic,
        user_properties=pairs,
    )


def _block(
    mapper: Mapper,
    broker: str,
    message: PublishPacket,
    function_url: str | None,
    *,
    first: bool,
    old: bool,
) -> bytes:
    """The request of one route. `first`: the publisher's id goes to the first route only."""
    route, mapper.sniff = mapper.route, old
    event_id = (publisher_id(message.user_properties) if first else None) or minted_ids()()
    now = time.time()
    note = ""
    try:
        lines, body = mapper.encode(message, event_id, now)
    except MalformedEvent as error:
        lines, body = mapper.encode_plain(message, event_id, now)
        note = f"# not sent, but given to onFailure: {route.on_failure}: no CloudEvent: {error}\n"
    if route.sink == FUNCTION and function_url is None:
        request = b"POST / HTTP/1.1\r\n"
    else:
        request = sinks.Target.parse(sinks.resolve(route.sink, function_url)).request_line
    head = request + lines + b"Content-Length: %d\r\n\r\n" % len(body)
    note += _about(route, broker, message)
    said = f"# route {route.name} -> {route.sink}\n{note}"
    return said.encode() + head.replace(b"\r\n", b"\n") + body + b"\n"


def _about(route: Route, broker: str, message: PublishPacket) -> str:
    """What the request itself does not show."""
    sending, note = route.sending, ""
    if sending.batch is not None:
        limits = sending.batch
        note = (
            f"# in a batch of up to {limits.events} events or {limits.bytes} bytes, "
            f"{limits.age:g} s after its first event at the latest\n"
        )
    if sending.reply is not None and sending.reply.welcome(message.response_topic):
        try:
            note += f"# a reply is published to `{topic_of(route, message, broker)}`"
            note += ", in the dialect of sdk-go\n" if sending.dialect == "sdk-go" else "\n"
        except NoTopic as error:
            note += f"# a reply is not published, but given to onFailure: {error}\n"
    return note
