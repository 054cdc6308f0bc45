"""An adaptor as one writes it with aiomqtt and aiohttp: a queue, workers, and acks after 2xx.

What ours is compared with in `bench.adaptor`; on uvloop as well, with no retry and no order.

    python -m bench.plain BROKER_PORT SINK_PORT FILTER
"""

from __future__ import annotations

import asyncio
import sys
import uuid

import aiohttp
import aiomqtt
import uvloop

CONNECTIONS = 64


async def adaptor(broker: int, sink: int, pattern: str) -> None:
    url = f"http://127.0.0.1:{sink}/ev"
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        aiomqtt.Client("127.0.0.1", broker, protocol=aiomqtt.ProtocolVersion.V5) as client,
        asyncio.TaskGroup() as workers,
    ):
        client._client.manual_ack_set(True)
        queue: asyncio.Queue[aiomqtt.Message] = asyncio.Queue()

        async def work() -> None:
            while True:
                message = await queue.get()
                headers = {
                    "ce-specversion": "1.0",
                    "ce-type": "weir.mqtt.message",
                    "ce-source": f"mqtt://127.0.0.1:{broker}",
                    "ce-subject": str(message.topic),
                    "ce-id": str(uuid.uuid4()),
                    "Content-Type": "application/json",
                }
                assert isinstance(message.payload, bytes)
                async with session.post(url, data=message.payload, headers=headers) as response:
                    if 200 <= response.status <= 299 and message.qos:
                        client._client.ack(message.mid, message.qos)

        for _ in range(CONNECTIONS):
            workers.create_task(work())
        await client.subscribe(pattern, qos=1)
        async for message in client.messages:
            queue.put_nowait(message)


if __name__ == "__main__":
    uvloop.run(adaptor(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
