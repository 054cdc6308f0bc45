"""A function: counts the readings of every device and remembers the hottest.

Any program that listens on $PORT and speaks HTTP is a function. Events come as CloudEvents in
HTTP binary mode: the payload is the body, everything about it is in `ce-...` headers.
"""

import os
from collections import Counter

from aiohttp import web

readings: Counter[str] = Counter()
hottest: dict[str, object] = {"temperature": float("-inf")}


async def take(request: web.Request) -> web.Response:
    """One reading. 2xx acknowledges it to the broker; anything else has it sent again."""
    global hottest
    event = await request.json()
    readings[request.headers["ce-subject"]] += 1
    if event["temperature"] > hottest["temperature"]:
        hottest = event
    return web.Response(status=204)


async def count(request: web.Request) -> web.Response:
    """How many events came, for `weir run --verify /count`."""
    return web.json_response({"events": readings.total(), "devices": len(readings)})


async def hot(request: web.Request) -> web.Response:
    """The hottest reading so far."""
    return web.json_response(hottest)


app = web.Application()
app.add_routes([web.post("/", take), web.get("/count", count), web.get("/hottest", hot)])

if __name__ == "__main__":
    web.run_app(app, port=int(os.environ.get("PORT", "8080")), print=None, access_log=None)
