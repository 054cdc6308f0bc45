"""What the request log says of requests that went through the relay (contract section 3.13)."""

import re

import pytest

from tests.relay.rig import Hold, get, ok, post
from tests.relay.watched import Start


async def test_the_default_line(watch: Start) -> None:
    watched = await watch()
    watched.rig.user.on('/a"b', ok(b"hello"))
    client = await watched.rig.client()
    trace = "0af7651916cd43dd8448eb211c80319c"
    await client.ask(
        post(
            '/a"b?c=<d>',
            b"xyz",
            "Referer: http://r/",
            f"Traceparent: 00-{trace}-00f067aa0ba902b7-01",
        )
    )
    (line,) = await watched.lines()
    logged = line["httpRequest"]
    assert re.fullmatch(r"0\.0\d*s|\d(\.\d+)?e-0\ds", logged.pop("latency"))
    assert logged == {
        "requestMethod": "POST",
        "requestUrl": '/a"b?c=<d>',
        "requestSize": "3",
        "status": 200,
        "responseSize": "5",
        "userAgent": "curl/8",
        "remoteIp": f"127.0.0.1:{client.port}",
        "serverIp": "10.0.0.1",
        "referer": "http://r/",
        "protocol": "HTTP/1.1",
    }
    assert line["traceId"] == trace
    assert watched.said[0].endswith("}\n")


@pytest.mark.parametrize(
    ("field", "trace"),
    [
        ("X-B3-TraceId: 463ac35c9f6413ad", "463ac35c9f6413ad"),
        ("Traceparent: garbage", ""),
        ("X-Other: 1", ""),
    ],
)
async def test_the_trace_of_a_line(watch: Start, field: str, trace: str) -> None:
    watched = await watch(template="{{.TraceID}}.")
    await (await watched.rig.client()).get("/", field)
    await watched.rig.settled(lambda: bool(watched.said))
    assert watched.said == [f"{trace}.\n"]


async def test_a_template_that_can_not_be_rendered_says_so_in_its_place(
    watch: Start, caplog: pytest.LogCaptureFixture
) -> None:
    watched = await watch(template="{{.Request.Nope}}")
    client = await watched.rig.client()
    await client.get("/a?b")
    await client.get("/a?b")
    await watched.rig.settled(lambda: len(watched.said) == 2)
    assert re.fullmatch(
        r"Invalid request log template: method: GET, response code: 200, latency: \S+,"
        r" url: /a\?b\n",
        watched.said[0],
    )
    (record,) = caplog.records  # once, not for each request
    assert "can't evaluate field Nope" in record.getMessage()


async def test_lines_come_in_the_order_of_their_ends(watch: Start) -> None:
    watched = await watch(template="{{.Request.URL.Path}}")
    hold = Hold()
    watched.rig.user.on("/slow", hold)
    slow, fast = await watched.rig.client(), await watched.rig.client()
    await slow.send(get("/slow"))
    await watched.rig.settled(lambda: hold.waiting == 1)
    await fast.get("/fast")
    hold.release()
    await slow.response()
    await watched.rig.settled(lambda: len(watched.said) == 2)
    assert watched.said == ["/fast\n", "/slow\n"]
