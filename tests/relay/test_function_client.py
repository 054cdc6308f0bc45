"""FunctionClient: the direct path while it is offered, the data port whenever in doubt."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.relay.rig import Closed, Peer, Request, UserContainer, die, hang, ok
from weir.proxy import direct
from weir.proxy.direct import FunctionClient
from weir.proxy.policy.deadlines import Timeouts
from weir.proxy.policy.offer import Offer
from weir.proxy.wire.client import Call, TransportError

HEAD = b"POST %s HTTP/1.1\r\nHost: fn.example.com\r\nUser-Agent: weir\r\nCe-Id: 1\r\n"


class Pod:
    """A data port that answers Weir's question, and a direct port."""

    def __init__(self) -> None:
        self.data = UserContainer()
        self.direct = UserContainer()
        self.asked = 0
        self.timers = "timeout=300; start=0; idle=0"
        self.answer: bytes | None = None

    async def start(self) -> None:
        await self.data.start()
        await self.direct.start()
        self.data.on("/", self._root)

    async def stop(self) -> None:
        await self.data.stop()
        await self.direct.stop()

    async def _root(self, peer: Peer, got: Request) -> None:
        if got.field("k-network-probe") != "weir":
            await peer.send(ok(b"relayed"))
            return
        self.asked += 1
        assert got.line == "GET / HTTP/1.1"
        assert got.field("user-agent") == "Knative-Activator-Probe (weir)"
        offer = f"Weir-Direct: port={self.direct.port}; {self.timers}"
        await peer.send(ok(b"weir", offer) if self.answer is None else self.answer)

    def client(self, **options: Any) -> FunctionClient:
        return FunctionClient("127.0.0.1", self.data.port, **options)


@pytest.fixture
async def pod(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pod]:
    monkeypatch.setattr(direct, "ASK_AGAIN_SECONDS", 0.05)
    made = Pod()
    await made.start()
    yield made
    await made.stop()


async def until_direct(client: FunctionClient) -> None:
    """Requests go on, as they do, until the direct path is taken."""
    async with asyncio.timeout(20):
        while client.path != "direct":
            await client.request(HEAD % b"/", b"", 5)


async def test_the_pod_is_asked_once_and_called_directly_from_then_on(pod: Pod) -> None:
    client = pod.client()
    assert (await client.request(HEAD % b"/", b"", 5)).body == b"relayed"
    await until_direct(client)
    before = client.relayed_requests
    for number in range(10):
        response = await client.request(HEAD % b"/", b"%d" % number, 5)
        assert response.body.endswith(b"%d" % number)
    assert (client.direct_requests, client.relayed_requests) == (10, before)
    assert pod.asked == 1
    assert pod.direct.connections == 1
    await client.close()


async def test_on_the_direct_path_x_forwarded_for_is_added_as_the_queue_proxy_would(
    pod: Pod,
) -> None:
    client = pod.client()
    await until_direct(client)
    await client.request(HEAD % b"/", b"body", 5)
    (got,) = pod.direct.requests
    assert got.head == HEAD % b"/" + b"X-Forwarded-For: 127.0.0.1\r\nContent-Length: 4\r\n\r\n"
    await client.close()


async def test_earlier_hops_become_forwarded_and_stay_in_x_forwarded_for(pod: Pod) -> None:
    client = pod.client()
    await until_direct(client)
    fields = b"X-Forwarded-For: 10.1.2.3\r\nX-Forwarded-Proto: https\r\n"
    await client.request(HEAD % b"/" + fields, b"", 5)
    (got,) = pod.direct.requests
    assert got.field("forwarded") == "for=10.1.2.3;proto=https"
    assert got.field("x-forwarded-for") == "10.1.2.3, 127.0.0.1"
    assert got.field("x-forwarded-proto") == "https"
    await client.close()


async def test_on_the_direct_path_the_host_is_restored_and_what_is_for_proxies_stays_out(
    pod: Pod,
) -> None:
    client = pod.client()
    await until_direct(client)
    fields = (
        b"K-Original-Host: fn.of.old.example\r\nKnative-Serving-Revision: fn-1\r\n"
        b"knative-serving-namespace: ns\r\nKnative-Serving-Tag: v2\r\nForwarded: \r\n"
        b"K-Proxy-Request: activator\r\nX-Forwarded-Host: fn\r\n"
    )
    await client.request(HEAD % b"/" + fields, b"", 5)
    (got,) = pod.direct.requests
    assert got.head == (
        b"POST / HTTP/1.1\r\nHost: fn.of.old.example\r\nUser-Agent: weir\r\nCe-Id: 1\r\n"
        b"Knative-Serving-Tag: v2\r\nK-Proxy-Request: activator\r\nX-Forwarded-Host: fn\r\n"
        b"Forwarded: host=fn\r\nX-Forwarded-For: 127.0.0.1\r\nContent-Length: 0\r\n\r\n"
    )
    await client.close()


async def test_an_ordinary_url_is_never_asked(pod: Pod) -> None:
    client = pod.client(ask=False)
    for _ in range(5):
        assert (await client.request(HEAD % b"/", b"", 5)).body == b"relayed"
    assert (pod.asked, client.path, client.relayed_requests) == (0, "relayed", 5)
    await client.close()


@pytest.mark.parametrize(
    ("answer", "wait"),
    [
        (
            ok(b"unexpected probe header value: weir\n", status="400 Bad Request"),
            direct.ASK_STRANGER_SECONDS,
        ),
        (ok(b"hello from an app"), direct.ASK_STRANGER_SECONDS),
        (ok(b"weir"), direct.ASK_INELIGIBLE_SECONDS),
        (ok(b"weir", "Weir-Direct: port=0"), direct.ASK_STRANGER_SECONDS),
        (ok(b"weir", "Weir-Direct: nonsense"), direct.ASK_STRANGER_SECONDS),
    ],
    ids=["queue-proxy", "an app", "not eligible", "no port", "nonsense"],
)
async def test_who_offers_nothing_is_relayed_and_left_alone_for_a_while(
    pod: Pod, answer: bytes, wait: float
) -> None:
    pod.answer = answer
    client = pod.client()
    for _ in range(20):
        assert (await client.request(HEAD % b"/", b"", 5)).body == b"relayed"
    assert (pod.asked, client.path) == (1, "relayed")
    assert wait >= 10
    await client.close()


async def test_a_direct_port_that_refuses_costs_no_request_and_is_asked_for_again(
    pod: Pod,
) -> None:
    client = pod.client()
    await until_direct(client)
    assert (await client.request(HEAD % b"/", b"", 5)).status == 200
    port = pod.direct.port
    await pod.direct.stop()
    await pod.direct.wait_for(lambda: pod.direct.open == 0)
    asked = pod.asked
    for _ in range(50):  # the requests that meet the closed port are relayed, every one
        assert (await client.request(HEAD % b"/", b"", 5)).body == b"relayed"
    pod.direct = UserContainer()
    await pod.direct.start(port)
    async with asyncio.timeout(20):
        while not pod.direct.requests:
            assert (await client.request(HEAD % b"/", b"", 5)).status == 200
    assert pod.asked > asked
    assert client.path == "direct"
    await client.close()


async def test_what_was_under_way_when_new_connections_are_refused_is_still_answered(
    pod: Pod,
) -> None:
    release = asyncio.Event()

    async def slow(peer: Peer, _: Request) -> None:
        await release.wait()
        await peer.send(ok(b"slow"))

    pod.direct.on("/slow", slow)
    client = pod.client()
    await until_direct(client)
    running = client.request(HEAD % b"/slow", b"", 20)
    await pod.direct.received(1)
    assert pod.direct._server is not None
    pod.direct._server.close()  # no new connection, the old one stays
    assert (await client.request(HEAD % b"/", b"", 5)).body == b"relayed"
    assert client.path == "relayed"
    release.set()
    assert (await running).body == b"slow"
    await pod.direct.wait_for(lambda: pod.direct.open == 0)  # and is closed after its last
    await client.close()


async def test_a_request_that_may_have_been_seen_is_never_sent_again_here(pod: Pod) -> None:
    pod.direct.on("/die", die)
    client = pod.client()
    await until_direct(client)
    with pytest.raises(TransportError) as caught:
        await client.request(HEAD % b"/die", b"", 5)
    assert caught.value.sent
    assert len(pod.direct.requests) == 1
    assert all(got.path != "/die" for got in pod.data.requests)
    await client.close()


async def test_a_pod_that_offers_a_port_nobody_can_reach_still_gets_its_requests(
    pod: Pod,
) -> None:
    await pod.direct.stop()
    client = pod.client()
    for _ in range(200):
        assert (await client.request(HEAD % b"/", b"", 5)).body == b"relayed"
    assert client.direct_requests == 0
    await client.close()


@pytest.mark.parametrize("timers", ["timeout=0.1", "timeout=9; start=0.1", "timeout=9; idle=0.1"])
async def test_the_timers_of_the_offer_end_in_a_504_of_our_own(pod: Pod, timers: str) -> None:
    pod.timers = timers
    pod.direct.on("/hang", hang)
    client = pod.client()
    await until_direct(client)
    response = await client.request(HEAD % b"/hang", b"", 20)
    assert (response.status, response.body) == (504, b"request timeout")
    await pod.direct.wait_for(lambda: pod.direct.open == 0)  # the function is told
    await client.close()


async def test_the_idle_timer_of_the_offer_looks_at_the_response(pod: Pod) -> None:
    pod.timers = "timeout=20; start=5; idle=5"

    async def drip(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _tick in range(5):
            await asyncio.sleep(0.01)
            await peer.send(b"1\r\nx\r\n")
        await peer.send(b"0\r\n\r\n")

    pod.direct.on("/drip", drip)
    client = pod.client()
    await until_direct(client)
    assert (await client.request(HEAD % b"/drip", b"", 20)).body == b"xxxxx"
    await client.close()


async def test_a_dead_pod_is_an_error_of_the_relayed_path(pod: Pod) -> None:
    await pod.stop()
    client = pod.client()
    with pytest.raises(TransportError, match="refused") as caught:
        await client.request(HEAD % b"/", b"", 5)
    assert not caught.value.sent
    await client.close()


async def test_a_call_that_found_nobody_is_handed_back_as_it_was_and_the_question_is_not(
    pod: Pod,
) -> None:
    back: asyncio.Queue[Call] = asyncio.Queue()
    await pod.stop()
    client = pod.client(unsent=lambda call, _: back.put_nowait(call))
    client.request(HEAD % b"/", b"body", 5)
    async with asyncio.timeout(20):
        call = await back.get()
        while client._asking:
            await asyncio.sleep(0)
    assert (call.head, call.body, back.empty()) == (HEAD % b"/", b"body", True)
    assert (client.direct_requests, client.relayed_requests) == (0, 0)
    await client.close()


async def test_closing_ends_both_paths_and_may_be_repeated(pod: Pod) -> None:
    async def never(peer: Peer, _: Request) -> None:
        await peer.rest()
        raise Closed

    pod.direct.on("/hang", never)
    client = pod.client()
    await until_direct(client)
    running = client.request(HEAD % b"/hang", b"", 20)
    await pod.direct.received(1)
    await client.close()
    await client.close()
    with pytest.raises(TransportError, match="closed"):
        await running
    await pod.direct.wait_for(lambda: pod.direct.open == 0)
    await pod.data.wait_for(lambda: pod.data.open == 0)


def test_an_offer_is_read_as_it_is_written() -> None:
    offer = Offer.parse("port=8014; timeout=300; start=0; idle=12.5; later=x")
    assert offer == Offer(8014, Timeouts(300, 0, 12.5))
    assert Offer.parse(str(offer)) == offer
    assert str(Offer(8014, Timeouts(300))) == "port=8014; timeout=300; start=0; idle=0"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "port",
        "port=x",
        "port=70000",
        "port=80.5",
        "timeout=3",
        "port=1; timeout=-1",
        "port=nan",
    ],
)
def test_an_offer_that_makes_no_sense_says_so(value: str) -> None:
    with pytest.raises(ValueError, match="Weir-Direct"):
        Offer.parse(value)
