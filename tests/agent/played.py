"""Relay workers that are played by the test: it has their ends of the supervisor's channels."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

from weir.proxy.agent import Agent


class Workers:
    """Our ends of the channels of the workers that the supervisor started, oldest first."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []

    async def count(self, wanted: int) -> None:
        async with asyncio.timeout(20):
            while len(self.ends) < wanted:
                await asyncio.sleep(0.005)

    def say(self, number: int, text: str) -> None:
        self.ends[number].send(text.encode())

    def all_say(self, **message: Any) -> None:
        """Those that live; the supervisor hears the one that has the pod."""
        for number in range(len(self.ends)):
            with contextlib.suppress(OSError):
                self.say(number, json.dumps(message))


def tenancy(number: int) -> str:
    return f"{number}/{number + 1}"


async def until(agent: Agent, number: int, name: str, value: Any) -> None:
    async with asyncio.timeout(20):
        while [*agent.snapshot()["pods"]][number][name] != value:
            await asyncio.sleep(0.005)
