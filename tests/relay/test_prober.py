"""How the user container is probed (contract 4.3)."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.relay.rig import Answer, Closed, Peer, Request, UserContainer, hang, ok
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
    get = HttpGet("//healthz?deep=1", (("x-token", "secret"), ("X-Token", "again")))
    assert await prober(Probe(port=user.port, http=get, period=10)).ready()
    (got,) = user.requests
    assert got.line == "GET /healthz?deep=1 HTTP/1.1"
    assert got.fields == [
        ("Host", f"127.0.0.1:{user.port}"),
        ("User-Agent", "kube-probe//"),
        ("X-Token", "secret"),
        ("X-Token", "again"),
        ("Accept-Encoding", "gzip"),
        ("Connection", "close"),
    ]


async def test_the_users_headers_replace_neither_host_nor_agent(user: UserContainer) -> None:
    headers = (("user-agent", "mine"), ("host", "example.com"), ("accept-encoding", "br"))
    assert await prober(Probe(port=user.port, http=HttpGet("", headers), period=10)).ready()
    (got,) = user.requests
    assert got.field("host") == f"127.0.0.1:{user.port}"
    assert got.field("user-agent") == "kube-probe//"
    assert [value for name, value in got.fields if name == "Accept-Encoding"] == ["br"]


async def test_a_path_can_not_break_the_request_line(user: UserContainer) -> None:
    path = "/a b\u00e4\r\nX: y?q=%2F#part"
    assert await prober(Probe(port=user.port, http=HttpGet(path), period=10)).ready()
    assert user.requests[0].line == "GET /a%20b%C3%A4%0D%0AX:%20y?q=%2F HTTP/1.1"


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


@pytest.mark.parametrize("status", [300, 304, 305])
async def test_a_location_without_a_redirect_is_not_followed(
    user: UserContainer, status: int
) -> None:
    user.on("/", ok(b"", "Location: /other", status=f"{status} X"))
    assert await prober(Probe(port=user.port, http=HttpGet(), period=10)).ready()
    assert len(user.requests) == 1


async def test_a_redirect_that_leads_nowhere_is_ready(user: UserContainer) -> None:
    user.on("/", ok(status="302 Found"))
    assert await prober(Probe(port=user.port, http=HttpGet(), period=10)).ready()


@pytest.mark.parametrize(
    ("location", "asked"),
    [("up?x=1#y", "/a/up?x=1"), ("/up", "/up"), ("../up", "/up"), ("?x", "/a/b?x")],
)
async def test_a_redirect_may_be_relative(user: UserContainer, location: str, asked: str) -> None:
    user.on("/a/b", ok(b"", f"Location: {location}", status="307 Temporary Redirect"))
    if asked.startswith("/a/b"):
        user.on("/a/b", only_without_query(location))
    assert await prober(Probe(port=user.port, http=HttpGet("/a/b"), period=10)).ready()
    assert [got.path for got in user.requests] == ["/a/b", asked]


def only_without_query(location: str) -> Answer:
    async def answer(peer: Peer, got: Request) -> None:
        if "?" in got.path:
            await peer.send(ok())
        else:
            await peer.send(ok(b"", f"Location: {location}", status="307 Temporary Redirect"))

    return answer


async def test_a_redirect_to_another_host_takes_no_secrets_along(user: UserContainer) -> None:
    user.on("/", ok(b"", f"Location: http://localhost:{user.port}/up", status="302 Found"))
    headers = (("Authorization", "Basic eA=="), ("X-Kept", "1"))
    await prober(Probe(port=user.port, http=HttpGet("/", headers), period=10)).ready()
    here, there = user.requests
    assert here.field("authorization") == "Basic eA=="
    assert there.field("authorization") is None
    assert there.field("x-kept") == "1"


async def test_a_redirect_to_another_scheme_is_not_followed(user: UserContainer) -> None:
    user.on("/", ok(b"", "Location: ftp://127.0.0.1/", status="302 Found"))
    http = prober(Probe(port=user.port, http=HttpGet(), period=10))
    assert not await http.ready()
    assert "ftp://127.0.0.1/" in http.last_error


async def test_the_rest_of_the_answer_is_read_before_the_connection_closes(
    user: UserContainer,
) -> None:
    closed_early = []

    async def slowly(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
        await user.wait_for(lambda: bool(verdict))
        closed_early.append(peer.reader.at_eof())
        await peer.send(b"cd")

    verdict: list[bool] = []
    user.on("/", slowly)
    verdict.append(await prober(Probe(port=user.port, http=HttpGet(), period=10)).ready())
    assert verdict == [True]
    async with user.changed:
        user.changed.notify_all()
    await user.wait_for(lambda: user.open == 0)
    assert closed_early == [False]


async def test_an_endless_answer_is_cut_off(user: UserContainer) -> None:
    async def endless(peer: Peer, _: Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await peer.send(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")

    user.on("/", endless)
    assert await prober(Probe(port=user.port, http=HttpGet(), period=10)).ready()
    await user.wait_for(lambda: user.open == 0)


async def test_the_tenth_redirect_is_one_too_many(user: UserContainer) -> None:
    async def next_hop(peer: Peer, got: Request) -> None:
        hop = int(got.path[1:] or 0)
        await peer.send(ok(b"", f"Location: /{hop + 1}", status="302 Found"))

    for hop in range(12):
        user.on(f"/{hop or ''}", next_hop)
    user.on("/9", ok(status="500 Oh"))
    http = prober(Probe(port=user.port, http=HttpGet(), period=10))
    assert not await http.ready()
    assert len(user.requests) == 10
    assert "status code: 500" in http.last_error

    user.on("/9", next_hop)
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


async def test_of_several_probes_all_must_pass(user: UserContainer) -> None:
    user.on("/bad", ok(status="500 Oh"))
    good = Probe(port=user.port, http=HttpGet("/good"), period=10)
    bad = Probe(port=user.port, http=HttpGet("/bad"), period=10)
    tcp = Probe(port=user.port, period=10)
    assert await prober(good, tcp).ready()
    several = prober(good, bad, tcp)
    assert not await several.ready()
    assert "status code: 500" in several.last_error
    assert several.tries == 3


async def test_several_probes_run_at_once(user: UserContainer) -> None:
    both = asyncio.Barrier(2)

    async def meet(peer: Peer, _: Request) -> None:
        await both.wait()
        await peer.send(ok())

    for path in ("/a", "/b"):
        user.on(path, meet)
    probes = [Probe(port=user.port, http=HttpGet(p), period=10, timeout=9) for p in ("/a", "/b")]
    assert await prober(*probes).ready()


class TestLog:
    """What is said of a failure, and how often (contract 4.3)."""

    async def test_an_aggressive_run_that_fails_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        monkeypatch.setattr(contract, "AGGRESSIVE_PROBE_LIMIT_SECONDS", 0.2)
        port = await free_port()
        tcp = prober(Probe(port=port))
        assert not await tcp.ready()
        (record,) = caplog.records
        assert record.name == "weir.proxy.probes"
        assert record.getMessage() == (
            f"aggressive probe error (failed {tcp.tries} times):"
            f" dial tcp 127.0.0.1:{port}: connect: connection refused"
        )

    async def test_a_run_that_succeeds_in_the_end_says_nothing(
        self, user: UserContainer, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        answers = iter([500, 200])

        async def answer(peer: Peer, _: Request) -> None:
            await peer.send(ok(status=f"{next(answers)} X"))

        user.on("/", answer)
        assert await prober(Probe(port=user.port, http=HttpGet())).ready()
        assert len(user.requests) == 2
        assert caplog.records == []

    async def test_a_single_try_that_fails_is_a_line(
        self, user: UserContainer, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        user.on("/", ok(status="500 Oh"))
        assert not await prober(Probe(port=user.port, http=HttpGet(), period=10)).ready()
        assert [record.getMessage() for record in caplog.records] == [
            "HTTP probe did not respond Ready, got status code: 500"
        ]


async def test_who_is_told_to_hurry_does_not_wait_for_the_next_try(
    user: UserContainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "AGGRESSIVE_PROBE_PERIOD_SECONDS", 3600.0)
    monkeypatch.setattr(contract, "AGGRESSIVE_PROBE_LIMIT_SECONDS", 86400.0)
    user.on("/", b"HTTP/1.1 503 Not Yet\r\nContent-Length: 0\r\n\r\n")
    verdicts: list[bool] = []
    settings = RevisionSettings(user_port=1, probes=(Probe(port=user.port, http=HttpGet("/")),))
    http = Prober(settings, dial_here, told=verdicts.append)
    asked = asyncio.create_task(http.ready())
    await user.wait_for(lambda: len(user.requests) == 1 and user.open == 0)
    assert not asked.done()
    user.on("/", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    while len(user.requests) < 2:  # it may be busy still with the first answer
        http.hurry()
        await asyncio.sleep(0.001)
    assert await asked
    assert (http.tries, verdicts) == (2, [True])


async def test_hurry_without_anybody_who_waits_is_nothing(user: UserContainer) -> None:
    tcp = prober(Probe(port=user.port))
    tcp.hurry()
    assert await tcp.ready()
    tcp.hurry()
