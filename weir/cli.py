"""The `weir` command: what can be asked for, and how. What is done lives with each part.

Imports are inside the functions: `weir --help` and above all a sidecar's start must not pay for
what they don't use.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

EPILOG = """\
examples:
  weir doctor
      what this machine can do, what is missing, and the fix for each
  weir run --routes routes.yaml -- python function.py
      broker, function, agent and adaptor on this machine, with a live view
  weir run --routes routes.yaml --broker mqtt://user:password@host:1883 -- ./function
      the same with your own broker
"""


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status; 2 for a usage error."""
    if argv is None and sys.argv[1:2] == ["adaptor"]:
        _end_in_order()
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["sidecar"]:  # of the milliseconds to its first request, none are for argparse
        return _call_sidecar(None)
    import logging

    args = _parser(argv[0] if argv else "").parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    status: int = args.call(args)
    return status


def _end_in_order() -> None:
    """Before anything slow is imported: an adaptor that is told to stop while it starts has taken
    nothing yet, so it just goes (an exception might end in some import's `except`); and one that is
    told to reload has not loaded anything yet."""
    import os
    import signal

    def end(number: int, frame: object) -> None:
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _parser(command: str) -> "argparse.ArgumentParser":
    """Of `command` alone if that keeps the adaptor's modules out of a process that runs for long,
    and with privileges."""
    import argparse

    import weir

    parser = argparse.ArgumentParser(
        prog="weir",
        description="Events steered into functions: MQTT in, CloudEvents out, eBPF in between.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"weir {weir.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    if command == "agent":
        _agent(commands)
        return parser
    from weir.adaptor import commands as adaptor

    _run(commands)
    adaptor.register(commands)
    _agent(commands)
    _top(commands)
    _sidecar(commands)
    _doctor(commands)
    return parser


def _run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from pathlib import Path

    parser = commands.add_parser(
        "run",
        help="everything on this machine: broker, function, agent, adaptor",
        description="Start a function and bring MQTT events to it, with a live view. "
        "The function is any command that listens on $PORT and speaks HTTP. "
        "As root it runs in a network namespace and cgroup of its own, where connections are "
        "steered and counted by eBPF; without root everything goes through the relay.",
    )
    add = parser.add_argument
    add("--routes", type=Path, required=True, metavar="FILE", help="which topics go where (YAML)")
    add(
        "--broker",
        metavar="URL",
        help="mqtt://[user:password@]host[:port]; default: one of our own",
    )
    add("--port", type=int, default=8080, help="$PORT of the function in its pod (default 8080)")
    add("--no-pod", action="store_true", help="run the function as a plain process, relayed only")
    add(
        "--devices",
        type=int,
        default=0,
        metavar="N",
        help="simulate N devices that publish readings",
    )
    add(
        "--interval",
        type=float,
        default=0.1,
        metavar="S",
        help="seconds between readings of a device",
    )
    add("--for", type=float, default=0.0, dest="seconds", metavar="S", help="stop after S seconds")
    add("--verify", metavar="PATH", help='compare counts with the function\'s {"events": N} there')
    add("--json", action="store_true", help="one JSON object a line instead of the live view")
    add("--state", type=Path, metavar="DIR", help="where undelivered events are kept between runs")
    add("command", nargs="+", metavar="-- COMMAND", help="the function, and its arguments")
    parser.set_defaults(call=_call_run)


def _call_run(args: "argparse.Namespace") -> int:
    import asyncio

    from weir.adaptor.broker import Broker
    from weir.adaptor.routes import RoutesError, load
    from weir.local.run import RunOptions, run

    try:
        load(args.routes)
        if args.broker is not None:
            Broker.parse(args.broker)
    except (RoutesError, ValueError) as e:
        return fail(str(e))
    if not 0 < args.port < 65536:
        return fail(f"--port {args.port}: not a port (1-65535)")
    if args.devices < 0 or args.interval <= 0:
        return fail("--devices must be 0 or more and --interval more than 0 seconds")
    return asyncio.run(
        run(
            RunOptions(
                routes=args.routes,
                command=tuple(args.command),
                broker=args.broker,
                port=args.port,
                isolated=not args.no_pod,
                devices=args.devices,
                interval=args.interval,
                seconds=args.seconds,
                verify=args.verify,
                as_json=args.json,
                state=args.state,
            )
        )
    )


def _agent(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from pathlib import Path

    parser = commands.add_parser(
        "agent",
        help="steer, count and relay the pods of this node",
        description="Serve the pods of a file until SIGTERM, then drain. "
        "Without root or eBPF every pod is relayed, and the status says why.",
    )
    add = parser.add_argument
    add("--pods", type=Path, required=True, metavar="FILE", help="the pods (JSON)")
    add("--status", type=Path, metavar="SOCKET", help="unix socket that answers with JSON status")
    add("--metrics", metavar="[HOST:]PORT", help="serve /metrics for Prometheus (default: no)")
    add("--workers", type=int, default=1, metavar="N", help="relay worker processes (default 1)")
    add(
        "--pins",
        type=Path,
        default=Path("/sys/fs/bpf/weir"),
        metavar="DIR",
        help="on a bpffs, for what outlives the agent (default %(default)s)",
    )
    add(
        "--loader",
        choices=("libbpf", "bcc"),
        default="libbpf",
        help="of the eBPF programs: the object that is shipped, or compiled here (default libbpf)",
    )
    parser.set_defaults(call=_call_agent)


def _call_agent(args: "argparse.Namespace") -> int:
    # without uvloop, and with an asyncio that finds no OpenSSL: the process with the privileges
    # makes no TLS and waits for its workers, and does without a tenth of its memory
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    import asyncio
    import gc
    import signal

    from weir.proxy import selftest
    from weir.proxy.agent import Agent
    from weir.proxy.kernel import Kernel, KernelUnavailable
    from weir.proxy.pod import PodFileError, load_pods
    from weir.proxy.wire.status import serve_status

    gc.collect()  # the parser of the command line, which is no small thing
    gc.freeze()
    try:
        pods = load_pods(args.pods)
    except PodFileError as e:
        return fail(str(e))
    if args.workers < 1:
        return fail(f"--workers {args.workers}: at least 1")
    host, _, port = ("1" if args.metrics is None else args.metrics).rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        return fail(f"--metrics {args.metrics}: write PORT, or HOST:PORT")
    kernel, why = None, ""
    try:
        kernel = Kernel.load(root=args.pins, loader=args.loader)
        selftest.run(kernel)
    except KernelUnavailable as e:
        why = str(e)
        if kernel is not None:
            kernel.close()
            kernel = None

    async def serve() -> int:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        agent = Agent(pods, kernel, why, args.workers)
        status = await serve_status(args.status, agent.snapshot) if args.status else None
        scraped = None
        if args.metrics:
            from weir.proxy import agentmetrics

            page = agentmetrics.serve(host.strip("[]"), int(port), agent.metrics)
            scraped = asyncio.create_task(page)
        try:
            await agent.run(stop)
        except OSError as e:
            return fail(str(e))
        finally:
            if status is not None:
                status.close()
            if scraped is not None:
                scraped.cancel()
        return 0

    try:
        return asyncio.run(serve())
    finally:
        if kernel is not None:
            kernel.close()


def _top(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from pathlib import Path

    from weir.proxy.top import SORTS

    parser = commands.add_parser(
        "top",
        help="what the agent of this node does, pod by pod",
        description="A live table of the agent's pods: ready, direct or the reason why not, "
        "requests a second on both paths, in flight, latencies, aborted requests. "
        "On a terminal, keys change the order and q quits.",
    )
    add = parser.add_argument
    add(
        "--status",
        type=Path,
        default=Path("/run/weir.sock"),
        metavar="SOCKET",
        help="what `weir agent --status` was given (default %(default)s)",
    )
    add("--sort", choices=tuple(SORTS), default="pod", help="largest first (default %(default)s)")
    add("--interval", type=float, default=1.0, metavar="S", help="seconds between two looks")
    add("--once", action="store_true", help="one table, over one interval")
    add("--json", action="store_true", help="one JSON object a line for each interval")
    parser.set_defaults(call=_call_top)


def _call_top(args: "argparse.Namespace") -> int:
    from weir.proxy.topview import NoAgent, top

    if not 0 < args.interval <= 3600:
        return fail("--interval must be more than 0 and at most 3600 seconds")
    try:
        return top(
            args.status,
            sort=args.sort,
            interval=args.interval,
            once=args.once,
            as_json=args.json,
        )
    except NoAgent as e:
        return fail(str(e))


def _sidecar(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "sidecar",
        help="in a Knative pod: take the place of the queue-proxy",
        description="Serve the ports of a Knative queue-proxy, with the settings that Knative puts "
        "into the environment (SERVING_*, QUEUE_*, USER_PORT, ...). Needs no privilege and writes "
        "no file. SIGTERM drains. To be set as queue-sidecar-image in config-deployment.",
    )
    parser.set_defaults(call=_call_sidecar)


def _call_sidecar(_: object) -> int:
    from weir.proxy.sidecar import main

    return main()


def _doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "doctor",
        help="what this machine can do, what is missing, and the fix for each",
        description="Try each thing that Weir needs, among them a real steered and counted "
        "connection in a throw-away pod. Exit status 1 if the direct path can't work here.",
    )
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    parser.set_defaults(call=_call_doctor)


def _call_doctor(args: "argparse.Namespace") -> int:
    from weir.local.doctor import doctor

    return doctor(as_json=args.json)


def fail(message: str) -> int:
    """Print an error the way every command does; the status to exit with."""
    print(f"weir: {message}", file=sys.stderr)
    return 2
