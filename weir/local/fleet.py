"""A simulated fleet: devices that publish JSON readings at QoS 1, each over its own connection.

Owns the readings and the count of what the broker acknowledged. Runs as a process of its own so
that its CPU time is nobody else's. Ends on SIGTERM and prints one JSON line: {"published": N}.
"""

import argparse
import asyncio
import json
import math
import os
import random
import signal
import sys
import time

import aiomqtt

from weir.adaptor.broker import Broker


class Fleet:
    """`devices` readings every `interval` seconds in all, spread evenly."""

    def __init__(self, broker: str, devices: int, interval: float) -> None:
        self._broker = Broker.parse(broker)
        self._devices = devices
        self._interval = interval
        self.published = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Publish until `stop`; every PUBLISH that was begun is acknowledged or not counted."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._devices):
                group.create_task(self._device(number, stop))

    async def _device(self, number: int, stop: asyncio.Event) -> None:
        name = f"sensor-{number:04d}"
        noise = random.Random(number)
        start = time.monotonic() + self._interval * number / self._devices
        async with aiomqtt.Client(
            self._broker.host,
            self._broker.port,
            username=self._broker.username,
            password=self._broker.password,
            tls_context=self._broker.ssl_context(),
            identifier=f"weir-fleet-{name}",
        ) as client:
            step = 0
            while not await _stopped(stop, start + step * self._interval):
                reading = self._reading(name, step, noise)
                await client.publish(f"devices/{name}/telemetry", json.dumps(reading), qos=1)
                self.published += 1
                step += 1

    @staticmethod
    def _reading(name: str, step: int, noise: random.Random) -> dict[str, object]:
        return {
            "device": name,
            "sequence": step,
            "time": time.time(),
            "temperature": round(21 + 3 * math.sin(step / 50) + noise.gauss(0, 0.2), 2),
            "humidity": round(45 + noise.gauss(0, 1), 1),
            "battery": round(max(0.0, 4.1 - step / 1e6), 3),
        }


async def _stopped(stop: asyncio.Event, until: float) -> bool:
    """Wait for the time of the next reading; True when the fleet has been told to stop."""
    try:
        await asyncio.wait_for(stop.wait(), max(0.0, until - time.monotonic()))
    except TimeoutError:
        return False
    return True


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    # aiomqtt leaves a future behind for a disconnection that it has raised already
    if not isinstance(context.get("exception"), aiomqtt.MqttError):
        loop.default_exception_handler(context)


def main(argv: list[str]) -> int:
    """Started by `weir run --devices N`; works against any broker by hand, too."""
    parser = argparse.ArgumentParser(prog="weir-fleet", description=__doc__)
    parser.add_argument(
        "--broker",
        default=os.environ.get("WEIR_BROKER", "mqtt://127.0.0.1"),
        help="mqtt://[user:password@]host[:port], or in the environment as WEIR_BROKER",
    )
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between readings")
    args = parser.parse_args(argv)
    fleet = Fleet(args.broker, args.devices, args.interval)

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for `weir run`
        loop.set_exception_handler(_report)
        await fleet.run(stop)

    try:
        asyncio.run(run())
    except ExceptionGroup as group:
        lost, others = group.split(aiomqtt.MqttError)
        if others is not None or lost is None:
            raise
        print(f"the devices lost the broker: {lost.exceptions[0]}", file=sys.stderr)
        return 1
    print(json.dumps({"published": fleet.published}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
