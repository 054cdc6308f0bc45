"""The commands `weir adaptor` and `weir adaptor status`; those beside it register themselves here.

Owns arguments, exit codes and what people read; what happens is elsewhere. Each command is a
function that takes parsed arguments and returns an exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import uvloop

from weir.adaptor import logs, quarantine_commands, spool_commands, tryout
from weir.adaptor.backward import topic_template
from weir.adaptor.broker import Broker, BrokerError
from weir.adaptor.knative import Environment
from weir.adaptor.mqttbinding import Dialect
from weir.adaptor.quarantine import QuarantineError
from weir.adaptor.quarantine_commands import default_quarantine as default_quarantine
from weir.adaptor.retry import parse_duration
from weir.adaptor.routes import load
from weir.adaptor.service import AdaptorConfig, serve
from weir.adaptor.spool import SpoolError
from weir.proxy.wire.status import read_status


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands; each sets `call` to a function of the parsed arguments."""
    adaptor = subparsers.add_parser(
        "adaptor", help="turn MQTT messages into CloudEvents and deliver them over HTTP"
    )
    adaptor.add_argument(
        "--broker",
        default=os.environ.get("WEIR_BROKER"),
        metavar="URL",
        help="mqtt[s]://[USER:PASSWORD@]HOST[:PORT] or ws[s]://HOST/PATH; or WEIR_BROKER in the "
        "environment, which keeps a password out of the process list",
    )
    _connection_arguments(adaptor)
    adaptor.add_argument(
        "--routes",
        type=Path,
        metavar="FILE",
        help="YAML; read again when it changes, and on SIGHUP",
    )
    adaptor.add_argument("--function-url", help="where the sink `function` is")
    adaptor.add_argument(
        "--client-id", default="weir", metavar="PREFIX", help="one per adaptor (default: weir)"
    )
    adaptor.add_argument("--mqtt-version", choices=("auto", "5", "3.1.1"), default="auto")
    adaptor.add_argument(
        "--receive-maximum", type=_window, default=256, help="unacknowledged messages per sink"
    )
    adaptor.add_argument("--quarantine", type=Path, default=default_quarantine())
    adaptor.add_argument(
        "--spool", type=Path, help="of routes that want one (default: spool.db by the quarantine)"
    )
    adaptor.add_argument(
        "--spool-sync",
        choices=("commit", "checkpoint"),
        default="commit",
        help="what is in it survives a power cut (commit, the default), or the end of the process",
    )
    adaptor.add_argument("--status", type=Path, help="Unix socket that tells the state as JSON")
    adaptor.add_argument(
        "--http", type=_where, metavar="[HOST:]PORT", help="serve /metrics, /healthz and /readyz"
    )
    adaptor.add_argument(
        "--listen", type=_where, metavar="[HOST:]PORT", help="take CloudEvents by HTTP and publish"
    )
    adaptor.add_argument(
        "--listen-topic",
        metavar="TEMPLATE",
        help="under this topic, such as devices/{attr[subject]}/command",
    )
    adaptor.add_argument(
        "--listen-dialect",
        choices=get_args(Dialect),
        default="spec",
        help="of the MQTT 5 binding, for devices that read the one of sdk-go",
    )
    adaptor.add_argument("--log-format", choices=("text", "json"), default="text")
    adaptor.add_argument(
        "--grace", type=float, default=10.0, metavar="S", help="seconds to drain (default 10)"
    )
    adaptor.set_defaults(call=run_adaptor)
    status = adaptor.add_subparsers(metavar="status").add_parser(
        "status", help="what a running adaptor is doing"
    )
    status.add_argument("socket", type=Path, help="what it was given as --status")
    status.add_argument("--json", action="store_true", help="everything, for machines")
    status.set_defaults(call=show_status)

    tryout.register(subparsers)
    quarantine_commands.register(subparsers)
    spool_commands.register(subparsers)


def _connection_arguments(adaptor: argparse.ArgumentParser) -> None:
    add = adaptor.add_argument_group("connection to the broker").add_argument
    add("--broker-ca", type=Path, metavar="FILE", help="PEM of the CA that signed the broker's")
    add("--broker-cert", type=Path, metavar="FILE", help="our certificate (PEM)")
    add("--broker-key", type=Path, metavar="FILE", help="its key, if not in the same file")
    add("--broker-server-name", metavar="NAME", help="for SNI and the certificate, if not the host")
    add("--broker-alpn", metavar="NAME[,NAME]", default="", help="such as x-amzn-mqtt-ca")
    add("--broker-username-file", type=Path, metavar="FILE", help="read for every connection")
    add("--broker-password-file", type=Path, metavar="FILE", help="password or token, likewise")
    add("--keep-alive", type=int, default=30, metavar="S", help="seconds (default 30)")
    add(
        "--session-expiry",
        type=_seconds,
        default=7 * 24 * 3600,
        metavar="DURATION",
        help="how long the broker keeps our session while we are away (default P7D; MQTT 5 only)",
    )
    add(
        "--clean-start",
        action="store_true",
        help="begin new sessions: let go what the broker has queued for the old ones",
    )
    add(
        "--end-unused-sessions",
        action="store_true",
        help="end the sessions of sinks that are in the routes no more, with what is queued there",
    )


def _seconds(text: str) -> int:
    try:
        return int(text) if text.isdigit() else int(parse_duration(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _where(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"`{text}`: write PORT, or HOST:PORT")
    return host.strip("[]") or "0.0.0.0", int(port)


def _window(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 65_535:
        raise argparse.ArgumentTypeError("must be from 1 to 65535")
    return value


# --- weir adaptor ---------------------------------------------------------------------------------


def run_adaptor(args: argparse.Namespace) -> int:
    if args.routes is None and args.listen is None:
        return _complain("adaptor", "--routes (or --listen) is missing; see weir adaptor --help")
    if (args.listen is None) != (args.listen_topic is None):
        return _complain("adaptor", "--listen and --listen-topic belong together; give both")
    if args.log_format == "json":
        logs.use_json()
    try:
        knative = Environment.read()
        config = AdaptorConfig(
            broker=_broker(args),
            routes=() if args.routes is None else load(args.routes, knative.sink),
            routes_file=args.routes,
            knative=knative,
            quarantine=args.quarantine,
            client_id=args.client_id,
            protocol=args.mqtt_version,
            receive_maximum=args.receive_maximum,
            function_url=args.function_url,
            spool=args.spool,
            spool_sync=args.spool_sync,
            status=args.status,
            http=args.http,
            listen=args.listen,
            listen_dialect=args.listen_dialect,
            listen_topic=None if args.listen_topic is None else topic_template(args.listen_topic),
            stop_within=args.grace,
            keep_alive=args.keep_alive,
            session_expiry=args.session_expiry,
            clean_start=args.clean_start,
            end_unused_sessions=args.end_unused_sessions,
        )
        uvloop.run(_until_signalled(config))
    except (ValueError, QuarantineError, SpoolError, BrokerError, OSError) as error:
        return _complain("adaptor", error)
    return 0


def _broker(args: argparse.Namespace) -> Broker | None:
    if args.broker is None:
        return None
    return Broker.parse(
        args.broker,
        args.broker_ca,
        certificate=args.broker_cert,
        key=args.broker_key,
        server_name=args.broker_server_name,
        alpn=tuple(filter(None, args.broker_alpn.split(","))),
        username_file=args.broker_username_file,
        password_file=args.broker_password_file,
    )


async def _until_signalled(config: AdaptorConfig) -> None:
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    # what start-up left behind never dies; the collector need not look at it for every event
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    await serve(config, stop, reload)


def show_status(args: argparse.Namespace) -> int:
    """0 when every session is connected and every sink takes events."""
    try:
        status = read_status(args.socket)
    except (OSError, ValueError) as error:
        return _complain("adaptor status", f"nobody answers at {args.socket}: {error}")
    well = all(sink["connected"] and sink["state"] == "up" for sink in status["sinks"])
    well = well and (status["listen"] is None or status["listen"]["connected"])
    well = well and status["stale"] is None
    if args.json:
        print(json.dumps(status))
        return 0 if well else 1
    print(f"broker {status['broker']}, quarantine {status['quarantine']}")
    if status["stale"] is not None:
        print(f"the routes file as it is now was not taken: {status['stale']}")
    spool, listen = status["spool"], status["listen"]
    if spool is not None:
        trouble = "" if spool["trouble"] is None else f"; {spool['trouble']}"
        print(f"spool {spool['path']}: {spool['events']} events, {spool['bytes']} bytes{trouble}")
    if listen is not None:
        counts = ", ".join(f"{name} {listen[name]}" for name in ("published", "refused", "failed"))
        print(f"listen, to {listen['topic']}: {listen['session']}; {counts}")
    for sink in status["sinks"]:
        window = sink["window"]
        print(f"sink {sink['name']}: {sink['reason'] or 'up'}")
        print(
            f"    session {sink['client_id']}: {sink['session']}, reconnects {sink['reconnects']}"
        )
        print(
            f"    unacknowledged {window['used']} of {window['of']}, "
            f"the oldest for {sink['oldest_unacknowledged']:.1f} s"
        )
        pods = Counter(f"{pod['state']}, {pod['path']}" for pod in sink["pods"])
        if pods:
            print("    pods: " + "; ".join(f"{count} {how}" for how, count in pods.items()))
        for pattern, why in sink["refused_subscriptions"].items():
            print(f"    no subscription to {pattern}: {why}")
        for route in status["routes"]:
            if (route["sink"], route["broker"]) != (sink["name"], sink["broker"]):
                continue
            counts = ", ".join(f"{name} {route[name]}" for name in _COUNTS if route[name])
            print(f"    route {route['name']} ({route['filter']}): {counts or 'nothing yet'}")
            print(f"        p50 {route['p50'] * 1e3:.2f} ms, p99 {route['p99'] * 1e3:.2f} ms")
            if (share := route["spool"]) is not None:
                room = f"{share['bytes']} of {share['of']} bytes"
                print(f"        in the spool {share['events']} events, {room}")
    return 0 if well else 1


_COUNTS = (
    *("received", "delivered", "unacknowledged", "retried", "dead_lettered", "quarantined"),
    *("dropped", "overflowed", "expired", "replied", "unreplied"),
)


def _complain(command: str, problem: object) -> int:
    print(f"weir {command}: {problem}", file=sys.stderr)
    return 2
