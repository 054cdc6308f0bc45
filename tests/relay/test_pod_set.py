"""PodSet: which pod a request goes to, and what it costs when some of them are gone."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.relay.rig import Closed, Peer, Request, UserContainer, die, ok
from tests.relay.test_function_client import HEAD, Pod
from weir.adaptor.podset import Listed, PodSet
from weir.proxy import direct
from weir.proxy.direct import FunctionClient
from weir.proxy.policy import balance
from weir.proxy.policy.balance import Revision
from weir.proxy.wire.client import TransportError

pytestmark = pytest.mark.usefixtures("_soon")


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "ASK_AGAIN_SECONDS", 0.05)


class Rig:
    """Three pods and a URL."""

    def __init__(self) -> None:
        self.pods = [Pod() for _ in range(3)]
        self.url = UserContainer()
        self.listed = Listed(())

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(f"127.0.0.1:{pod.data.port}" for pod in self.pods)

    async def start(self) -> None:
        for pod in self.pods:
            await pod.start()
        await self.url.start()
        self.url.on("/", answer(b"url"))
        self.listed.change([Revision("r", self.addresses)])

    async def stop(self) -> None:
        for pod in self.pods:
            await pod.stop()
        await self.url.stop()

    def client(self) -> PodSet:
        url = FunctionClient("127.0.0.1", self.url.port, ask=False)
        return PodSet(url, self.listed, 8)


def answer(body: bytes, status: str = "200 OK") -> Any:
    async def send(peer: Peer, _: Request) -> None:
        await peer.send(ok(body, status=status))

    return send


async def opened(container: UserContainer, connections: int) -> None:
    await container.wait_for(lambda: container.open == connections)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    await made.start()
    yield made
    await made.stop()


@contextlib.asynccontextmanager
async def set_of(rig: Rig, *, direct: bool = True) -> AsyncIterator[PodSet]:
    client = rig.client()
    if direct:
        async with asyncio.timeout(20):
            while any(pod["path"] != "direct" for pod in client.pods()):
                await client.request(HEAD % b"/", b"", 5)
    yield client
    await client.close()


def state(client: PodSet, address: str) -> object:
    return next(pod["state"] for pod in client.pods() if pod["pod"] == address)


async def test_every_pod_is_asked_once_and_each_gets_its_part_directly(rig: Rig) -> None:
    async with set_of(rig) as client:
        before = client.direct_requests
        for _ in range(30):
            await client.request(HEAD % b"/x", b"", 5)
        assert [sum(r.path == "/x" for r in pod.direct.requests) for pod in rig.pods] == [10] * 3
        assert [pod.asked for pod in rig.pods] == [1, 1, 1]
        assert client.direct_requests == before + 30
        assert client.path == "direct"


async def test_a_busy_pod_gets_nothing_more_until_the_others_are_as_busy(rig: Rig) -> None:
    release = asyncio.Event()

    async def slow(peer: Peer, _: Request) -> None:
        await release.wait()
        await peer.send(ok(b"slow"))

    for pod in rig.pods:
        pod.direct.on("/slow", slow)
    async with set_of(rig) as client:
        running = [client.request(HEAD % b"/slow", b"", 20) for _ in range(6)]
        for pod in rig.pods:
            await opened(pod.direct, 2)
        assert sorted(pod["in_flight"] for pod in client.pods()) == [2, 2, 2]  # type: ignore[type-var]
        release.set()
        assert {(await each).body for each in running} == {b"slow"}


async def test_a_dead_pod_costs_no_request_and_is_called_again_when_it_is_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "SHORTEST_EJECTION", 0.02)
    async with set_of(rig) as client:
        dead = rig.pods[0]
        address, ports = rig.addresses[0], (dead.data.port, dead.direct.port)
        await dead.stop()
        await opened(dead.direct, 0)
        for _ in range(60):
            assert (await client.request(HEAD % b"/", b"", 5)).status == 200
        assert state(client, address) != "up"
        assert not rig.url.requests
        rig.pods[0] = back = Pod()
        await back.data.start(ports[0])
        await back.direct.start(ports[1])
        back.data.on("/", back._root)
        async with asyncio.timeout(20):
            while state(client, address) != "up" or not back.direct.requests:
                assert (await client.request(HEAD % b"/", b"", 5)).status == 200


async def test_a_request_that_may_have_been_seen_is_left_to_the_caller_and_the_pod_ejected(
    rig: Rig,
) -> None:
    for pod in rig.pods:
        pod.direct.on("/die", die)
    async with set_of(rig) as client:
        with pytest.raises(TransportError) as caught:
            await client.request(HEAD % b"/die", b"", 5)
        assert caught.value.sent
        assert sum(r.path == "/die" for pod in rig.pods for r in pod.direct.requests) == 1
        assert [pod["state"] for pod in client.pods()].count("up") == 2


@pytest.mark.parametrize("status", ["500 Oops", "400 Bad", "404 No", "429 Slow"])
async def test_an_answer_about_the_event_ejects_no_pod(rig: Rig, status: str) -> None:
    for pod in rig.pods:
        pod.direct.on("/bad", answer(b"", status))
    async with set_of(rig) as client:
        for _ in range(9):
            await client.request(HEAD % b"/bad", b"", 5)
        assert {pod["state"] for pod in client.pods()} == {"up"}


@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 Busy", "504 Late"])
async def test_an_answer_that_the_pod_can_not_serve_ejects_it(rig: Rig, status: str) -> None:
    rig.pods[1].direct.on("/bad", answer(b"", status))
    async with set_of(rig) as client:
        for _ in range(3):
            await client.request(HEAD % b"/bad", b"", 5)
        assert state(client, rig.addresses[1]) != "up"


async def test_a_pod_that_answers_nothing_is_ejected_and_gets_one_request_at_a_time_from_then_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "SHORTEST_EJECTION", 0.02)
    wedged = rig.pods[0]
    inside = peak = 0

    async def never(peer: Peer, _: Request) -> None:
        nonlocal inside, peak
        inside += 1
        peak = max(peak, inside)
        await peer.rest()
        inside -= 1
        raise Closed

    wedged.direct.on("/x", never)
    async with set_of(rig) as client:
        lost = 0
        async with asyncio.timeout(20):
            while lost < 5:
                running = [client.request(HEAD % b"/x", b"", 0.05) for _ in range(8)]
                ends = await asyncio.gather(*running, return_exceptions=True)
                await wedged.direct.wait_for(lambda: inside == 0)
                if lost == 0:
                    peak = 0  # nobody knew
                lost += sum(isinstance(end, TransportError) for end in ends)
        assert state(client, rig.addresses[0]) != "up"
        assert peak == 1


@pytest.mark.parametrize("why", ["empty", "gone", "dead"])
async def test_without_a_pod_the_url_has_the_request(rig: Rig, why: str) -> None:
    async with set_of(rig) as client:
        if why == "empty":
            rig.listed.change([Revision("r", ())])
        elif why == "gone":
            rig.listed.change([])
        else:
            for pod in rig.pods:
                await pod.stop()
        assert (await client.request(HEAD % b"/", b"", 5)).body == b"url"
        assert client.url_requests == 1


async def test_a_pod_that_leaves_ends_what_it_has_and_gets_nothing_new(rig: Rig) -> None:
    release = asyncio.Event()
    leaver = rig.pods[0]

    async def slow(peer: Peer, _: Request) -> None:
        await release.wait()
        await peer.send(ok(b"slow"))

    for pod in rig.pods:
        pod.direct.on("/slow", slow)
    async with set_of(rig) as client:
        running = [client.request(HEAD % b"/slow", b"", 20) for _ in range(3)]
        await leaver.direct.wait_for(lambda: leaver.direct.requests[-1].path == "/slow")
        total = client.direct_requests + client.relayed_requests
        rig.listed.change([Revision("r", rig.addresses[1:])])
        had = len(leaver.direct.requests) + len(leaver.data.requests)
        for _ in range(10):
            await client.request(HEAD % b"/", b"", 5)
        assert len(leaver.direct.requests) + len(leaver.data.requests) == had
        release.set()
        assert [(await each).body for each in running] == [b"slow"] * 3
        await opened(leaver.direct, 0)
        await opened(leaver.data, 0)
        assert client.direct_requests + client.relayed_requests == total + 10


async def test_what_waits_for_a_pod_that_leaves_goes_to_another_one(rig: Rig) -> None:
    release = asyncio.Event()

    async def slow(peer: Peer, _: Request) -> None:
        await release.wait()
        await peer.send(ok(b"slow"))

    for pod in rig.pods:
        pod.direct.on("/slow", slow)
    rig.listed.change([Revision("r", rig.addresses[:1])])
    async with set_of(rig) as client:
        running = [client.request(HEAD % b"/slow", b"", 20) for _ in range(20)]  # 8 connections
        await opened(rig.pods[0].direct, 8)
        rig.listed.change([Revision("r", rig.addresses[1:2])])
        other = rig.pods[1].data  # its direct port is not known yet
        await other.wait_for(lambda: sum(r.path == "/slow" for r in other.requests) == 12)
        assert sum(r.path == "/slow" for r in rig.pods[0].direct.requests) == 8
        release.set()
        assert {(await each).status for each in running} == {200}


async def test_revisions_share_by_weight(rig: Rig) -> None:
    one, two, _ = rig.addresses
    rig.listed.change([Revision("old", (one,), 90), Revision("new", (two,), 10)])
    async with set_of(rig) as client:
        before = [len(pod.direct.requests) for pod in rig.pods]
        for _ in range(50):
            await client.request(HEAD % b"/", b"", 5)
        got = [len(pod.direct.requests) - b for pod, b in zip(rig.pods, before, strict=True)]
        assert got == [45, 5, 0]


async def test_a_pod_that_offers_no_direct_port_is_called_by_its_data_port(rig: Rig) -> None:
    rig.pods[0].answer = ok(b"weir")
    rig.listed.change([Revision("r", rig.addresses[:1])])
    async with set_of(rig, direct=False) as client:
        for _ in range(5):
            assert (await client.request(HEAD % b"/", b"", 5)).body == b"relayed"
        assert (client.path, client.direct_requests, client.relayed_requests) == ("relayed", 0, 5)
        assert not rig.url.requests


async def test_closing_fails_what_runs_leaves_no_connection_and_may_be_repeated(rig: Rig) -> None:
    async def never(peer: Peer, _: Request) -> None:
        await peer.rest()
        raise Closed

    for pod in rig.pods:
        pod.direct.on("/hang", never)
    async with set_of(rig) as client:
        running = [client.request(HEAD % b"/hang", b"", 20) for _ in range(6)]
        await opened(rig.pods[0].direct, 2)
        rig.listed.change([Revision("r", rig.addresses[1:])])  # one is on its way out
        await client.close()
        await client.close()
        for each in running:
            with pytest.raises(TransportError, match="closed"):
                await each
        for pod in rig.pods:
            await opened(pod.direct, 0)
            await opened(pod.data, 0)
        rig.listed.change([Revision("r", rig.addresses)])  # nobody watches any more
        with pytest.raises(TransportError):
            await client.request(HEAD % b"/", b"", 5)
