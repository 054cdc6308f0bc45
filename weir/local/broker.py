"""The MQTT broker of local mode: the user's, else a mosquitto of our own, else amqtt.

Owns the broker process, its configuration and its directory. Knows nothing of routes.
"""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from weir.adaptor import broker as address
from weir.local.children import Child, Print

START_SECONDS = 15.0


class BrokerError(Exception):
    """No broker could be had; the message says what was tried and what to do."""


@dataclass
class Broker:
    """`version` is what it speaks ("auto" for a broker that isn't ours); `name` is the URL without
    user and password, `note` is for the user."""

    url: str
    name: str
    version: str
    note: str
    child: Child | None = None

    async def close(self) -> None:
        """Stop it, if it is ours."""
        if self.child is not None:
            await self.child.stop(10.0)


async def start(url: str | None, directory: Path, output: Print) -> Broker:
    """The broker at `url` if given, else one started on a free loopback port.

    Our mosquitto keeps its queues in `directory` over a clean stop: what a function has not taken
    is there again in the next run.

    Raises BrokerError when neither mosquitto nor amqtt is there, or it doesn't come up.
    """
    if url is not None:
        return Broker(url, str(address.Broker.parse(url)), "auto", "yours")
    port = free_port()
    binary = mosquitto()
    if binary is not None:
        configuration = directory / "mosquitto.conf"
        configuration.write_text(_mosquitto(port, directory))
        command = [binary, "-c", str(configuration)]
        version, note = "5", "mosquitto, started for this run"
    elif importlib.util.find_spec("amqtt") is not None:
        configuration = directory / "amqtt.yaml"
        configuration.write_text(_amqtt(port))
        command = [
            sys.executable,
            "-P",
            "-m",
            "amqtt.scripts.broker_script",
            "-c",
            str(configuration),
        ]
        version, note = "3.1.1", "amqtt (pure Python; speaks MQTT 3.1.1 only), started for this run"
    else:
        raise BrokerError(
            "no MQTT broker: give one with --broker mqtt://HOST:PORT, "
            "or apt-get install mosquitto, or pip install 'kn-weir[broker]'"
        )
    # as root because the state directory is root's; it listens on loopback only
    child = Child("broker", output, noise="Mosquitto should not be run as root")
    await child.start(command)
    broker = Broker(url := f"mqtt://127.0.0.1:{port}", url, version, note, child)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_SECONDS):
            while child.running:
                if await _accepts(port):
                    return broker
                await asyncio.sleep(0.02)
    await broker.close()
    raise BrokerError(
        f"{command[0]} did not start: {' / '.join(child.tail) or 'it printed nothing'}"
    )


def mosquitto() -> str | None:
    """Its path, also where Debian puts it and an ordinary user's PATH doesn't look."""
    return shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def free_port() -> int:
    """A loopback TCP port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port: int = s.getsockname()[1]
        return port


async def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        return True
    return False


def _mosquitto(port: int, directory: Path) -> str:
    # mosquitto's default queue of 1000 drops what a slow subscriber has not taken, though the
    # publisher has its PUBACK: for a run that must lose nothing the queue is unlimited
    user = "user root\n" if os.geteuid() == 0 else ""
    return (
        f"listener {port} 127.0.0.1\nallow_anonymous true\n{user}"
        f"persistence true\npersistence_location {directory}/\nautosave_interval 60\n"
        "max_queued_messages 0\nlog_dest stderr\nlog_type error\n"
    )


def _amqtt(port: int) -> str:
    return (
        "listeners:\n  default:\n    type: tcp\n"
        f"    bind: 127.0.0.1:{port}\n"
        "plugins:\n  amqtt.plugins.authentication.AnonymousAuthPlugin:\n    allow_anonymous: true\n"
    )
