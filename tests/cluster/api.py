"""The Kubernetes API for the cluster's own programs: read once, follow, patch a status.

Owns the connection and the restart of a watch. Refuses to know any kind of object.
"""

import asyncio
import json
import ssl
from collections.abc import Callable
from typing import Any

import aiohttp

from tests.cluster import keys

Object = dict[str, Any]


def connect() -> aiohttp.ClientSession:
    """A session as the administrator; the caller closes it."""
    context = ssl.create_default_context(cafile=str(keys.PKI / "ca.crt"))
    context.load_cert_chain(keys.PKI / "admin.crt", keys.PKI / "admin.key")
    return aiohttp.ClientSession(
        keys.API,
        connector=aiohttp.TCPConnector(ssl=context),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
    )


async def follow(
    session: aiohttp.ClientSession,
    path: str,
    changed: Callable[[str, Object], None],
    started: Callable[[], None] = lambda: None,
) -> None:
    """Call `changed(event, object)` for every object at `path` and each change of it, for ever.

    `started` is called before objects are listed (again). A kind whose definition is not there yet
    is waited for.
    """
    while True:
        try:
            async with session.get(path) as response:
                if response.status == 404:
                    await asyncio.sleep(0.5)
                    continue
                response.raise_for_status()
                listed = await response.json()
            started()
            for item in listed["items"]:
                changed("ADDED", item)
            version = listed["metadata"]["resourceVersion"]
            await _watch(session, path, version, changed)
        except aiohttp.ClientError as error:
            print(f"{path}: {error}; listing again", flush=True)
            await asyncio.sleep(0.5)


async def _watch(
    session: aiohttp.ClientSession,
    path: str,
    version: str,
    changed: Callable[[str, Object], None],
) -> None:
    query = {"watch": "true", "resourceVersion": version}
    async with session.get(path, params=query, read_bufsize=1 << 22) as response:
        response.raise_for_status()
        async for line in response.content:
            event = json.loads(line)
            if event["type"] == "ERROR":
                return
            changed(event["type"], event["object"])


async def patch_status(session: aiohttp.ClientSession, path: str, status: Object) -> None:
    async with session.patch(
        f"{path}/status",
        data=json.dumps({"status": status}),
        headers={"Content-Type": "application/merge-patch+json"},
    ) as response:
        if response.status not in (200, 404):  # 404: deleted meanwhile
            print(f"{path}: status {response.status}: {await response.text()}", flush=True)
