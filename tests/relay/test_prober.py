"""How the user container is probed (contract 4.3)."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.relay.rig import Closed, Peer, Request, UserContainer, hang, ok
from weir.proxy import contract
from weir.proxy.contract import HttpGet, Probe, RevisionSettings
from weir.proxy.probes import Prober
from weir.proxy.wire.dial import dial_here


@pytest.fixture
async def user() -> AsyncIterator[UserContainer]:
    container = UserContainer()
    await container.start()
    yield container
    await container.stop()


def prober(*probes: Probe) -> Prober:
    return Prober(RevisionSettings(user_port=1, probes=probes), dial_here)


async def free_port() -> int:
    container = UserContainer()
    await container.start()
    await container.stop()
    return container.port


async def test_without_a_probe_the_user_container_is_ready() -> None:
    assert await prober().ready()


async def test_a_tcp_probe_connects_and_says_nothing(user: UserContainer) -> None:
    assert await prober(Probe(port=user.port, period=10)).ready()
    await user.wait_for(lambda: user.connections == 1 and user.open == 0)
    assert user.requests == []


async def test_with_a_period_one_refused_connect_is_the_verdict() -> None:
    tcp = prober(Probe(port=await free_port(), period=10))
    assert not await tcp.ready()
    assert tcp.tries == 1
    assert tcp.last_error.endswith("connect: connection refused")


async def test_an_http_probe_asks_as_the_queue_proxy_does(user: UserContainer) -> None:
    get = HttpGet("//healthz?deep=1", (("X-Token", "secret"), ("user-agent", "mine")))
    assert await prober(Probe(port=user.port, http=get, period=10)).ready()
    (got,) = user.requests
    assert got.line == "GET /healthz?deep=1 HTTP/1.1"
    assert got.field("host") == f"127.0.0.1:{user.port}"
    assert got.field("user-agent") == "mine"
    assert got.field("x-token") == "secret"
    assert got.field("accept-encoding") == "gzip"


async def test_the_probes_agent_is_kube_probe_without_a_version(user: UserContainer) -> None:
    assert await prober(Probe(port=user.port, http=HttpGet(), period=10)).ready()
    assert user.requests[0].field("user-agent") == "kube-probe//"


async def test_every_http_probe_has_a_connection_of_its_own(user: UserContainer) -> None:
    http = prober(Probe(port=user.port, http=HttpGet(), period=10))
    assert await http.ready()
    assert await http.ready()
    assert user.connections == 2


@pytest.mark.parametrize(
    ("status", "ready"),
    [(200, True), (299, True), (304, True), (399, True), (400, False), (503, False)],
)
async def test_200_to_399_is_ready(user: UserContainer, status: int, ready: bool) -> None:
    user.on("/", ok(status=f"{status} X"))
    http = prober(Probe(port=user.port, http=HttpGet(), period=10))
    assert await http.ready() is ready
    if not ready:
        assert http.last_error.endswith(f"status code: {status}")


async def test_redirects_are_followed_ten_times(user: UserContainer) -> None:
    async def next_hop(peer: Peer, got: Request) -> None:
        hop = int(got.path[1:] or 0)
        await peer.send(ok(b"", f"Location: /{hop + 1}", status="302 Found"))

    for hop in range(12):
        user.on(f"/{hop or ''}", next_hop)
    user.on("/10", ok(status="500 Oh"))
    http = prober(Probe(port=user.port, http=HttpGet(), period=10))
    assert not await http.ready()
    assert len(user.requests) == 11
    assert "status code: 500" in http.last_error

    user.on("/10", next_hop)
    assert not await http.ready()
    assert "10 redirects" in http.last_error


async def test_a_redirect_may_name_the_host(user: UserContainer) -> None:
    user.on("/", ok(b"", f"Location: http://127.0.0.1:{user.port}/up?x", status="301 Moved"))
    user.on("/up", ok(status="500 Oh"))
    assert not await prober(Probe(port=user.port, http=HttpGet(), period=10)).ready()


async def test_an_answer_slower_than_the_timeout_is_none(user: UserContainer) -> None:
    user.on("/", hang)
    http = prober(Probe(port=user.port, http=HttpGet(), period=10, timeout=1.0))
    assert not await http.ready()
    assert "1 s" in http.last_error


@pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", b""])
async def test_an_answer_that_is_not_http_is_not_ready(user: UserContainer, answer: bytes) -> None:
    async def say(peer: Peer, _: Request) -> None:
        await peer.send(answer)
        peer.close()
        raise Closed

    user.on("/", say)
    http = prober(Probe(port=user.port, http=HttpGet(), period=10))
    assert not await http.ready()
    assert http.last_error


class TestAggressive:
    """Period 0: every 50 ms until ready, for at most 10 s."""

    async def test_it_waits_for_a_user_container_that_comes_late(self) -> None:
        port = await free_port()
        tcp = prober(Probe(port=port))
        verdict = asyncio.create_task(tcp.ready())
        async with asyncio.timeout(20):
            while tcp.tries < 3:
                await asyncio.sleep(0.001)
        late = UserContainer()
        await late.start(port)
        assert await verdict
        await late.stop()

    async def test_all_who_ask_at_once_share_one_run(self, user: UserContainer) -> None:
        http = prober(Probe(port=user.port, http=HttpGet()))
        assert await asyncio.gather(*(http.ready() for _ in range(20))) == [True] * 20
        assert len(user.requests) == 1

    async def test_the_run_goes_on_when_a_caller_leaves(self) -> None:
        port = await free_port()
        tcp = prober(Probe(port=port))
        first, second = (asyncio.create_task(tcp.ready()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        late = UserContainer()
        await late.start(port)
        assert await second
        await late.stop()

    async def test_successes_must_follow_each_other_and_a_failure_starts_anew(
        self, user: UserContainer
    ) -> None:
        answers = iter([200, 500, 200, 200, 200])

        async def answer(peer: Peer, _: Request) -> None:
            await peer.send(ok(status=f"{next(answers)} X"))

        user.on("/", answer)
        http = prober(Probe(port=user.port, http=HttpGet(), success_threshold=3))
        assert await http.ready()
        assert len(user.requests) == 5

    async def test_the_count_of_successes_outlives_the_run(self, user: UserContainer) -> None:
        http = prober(Probe(port=user.port, http=HttpGet(), success_threshold=3))
        assert await http.ready()
        assert await http.ready()
        assert len(user.requests) == 4  # three for the first verdict, one for the second

    async def test_it_gives_up_after_its_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(contract, "AGGRESSIVE_PROBE_LIMIT_SECONDS", 0.2)
        tcp = prober(Probe(port=await free_port()))
        assert not await tcp.ready()
        assert tcp.tries > 1

    async def test_a_try_that_hangs_is_given_up_after_100_ms(
        self, user: UserContainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(contract, "AGGRESSIVE_PROBE_LIMIT_SECONDS", 0.3)
        user.on("/", hang)
        http = prober(Probe(port=user.port, http=HttpGet()))
        assert not await http.ready()
        assert len(user.requests) > 1


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..b", "127.0.0.1:\xb2", "\x80"])
async def test_a_redirect_to_what_is_no_address_is_not_ready(
    user: UserContainer, host: str
) -> None:
    user.on("/", ok(b"", f"Location: http://{host}/", status="302 Found"))
    http = prober(Probe(port=user.port, http=HttpGet("/"), period=10))
    assert not await http.ready()
    assert http.last_error
