"""What the sidecar's own log says of requests that failed (contract section 3.14)."""

import logging
from collections.abc import Awaitable, Callable

import pytest

from tests.relay.rig import Rig, die, get, hang, post
from weir.proxy.observe.failures import FailureLog, duration
from weir.proxy.policy.deadlines import Timeouts

Make = Callable[..., Awaitable[Rig]]


@pytest.fixture(autouse=True)
def everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "weir.relay")


async def watched(rig: Make, **settings: float) -> Rig:
    made = await rig(**settings)
    timeouts = Timeouts.of(made.relay.settings)
    made.relay.observers.append(FailureLog(timeouts, f"127.0.0.1:{made.user.port}"))
    return made


async def test_a_request_that_ends_well_says_nothing(
    rig: Make, caplog: pytest.LogCaptureFixture
) -> None:
    made = await watched(rig)
    assert (await (await made.client()).get()).status == 200
    assert caplog.records == []


async def test_a_user_container_that_dies_is_an_error(
    rig: Make, caplog: pytest.LogCaptureFixture
) -> None:
    made = await watched(rig)
    made.user.on("/die", die)
    assert (await (await made.client()).ask(post("/die", b"x"))).status == 502
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith(
        "error reverse proxying request; sockstat: sockets: used "
    )
    assert "closed the connection" in vars(record)["fields"]["error"]


async def test_a_user_container_that_is_not_there_is_an_error_with_its_address(
    rig: Make, caplog: pytest.LogCaptureFixture
) -> None:
    made = await watched(rig)
    await made.user.stop()
    assert (await (await made.client()).get()).status == 502
    (record,) = caplog.records
    assert f"127.0.0.1:{made.user.port}" in vars(record)["fields"]["error"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 0.1}, "Request timeout: 100ms"),
        ({"response_start_timeout": 0.1}, "Response start timeout: 100ms"),
        ({"idle_timeout": 0.1}, "Idle timeout: 100ms"),
    ],
)
async def test_a_timeout_is_a_warning_with_its_name(
    rig: Make, caplog: pytest.LogCaptureFixture, settings: dict[str, float], message: str
) -> None:
    made = await watched(rig, **settings)
    made.user.on("/hang", hang)
    assert (await (await made.client()).get("/hang")).status == 504
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == ("WARNING", message)


async def test_a_client_that_leaves_is_for_who_debugs(
    rig: Make, caplog: pytest.LogCaptureFixture
) -> None:
    made = await watched(rig)
    made.user.on("/hang", hang)
    client = await made.client()
    await client.send(get("/hang"))
    await made.user.received(1)
    client.close()
    await made.settled(lambda: bool(caplog.records))
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


async def test_many_failures_are_few_lines(rig: Make, caplog: pytest.LogCaptureFixture) -> None:
    made = await watched(rig)
    seconds = [1000.0]
    observer = made.relay.observers[-1]
    over = observer.over
    observer.over = lambda exchange, now: over(exchange, seconds[0])  # type: ignore[method-assign]
    await made.user.stop()
    client = await made.client()
    for _ in range(50):
        assert (await client.get()).status == 502
    assert len(caplog.records) == 20
    seconds[0] += 1
    await client.get()
    assert [record.getMessage().partition(";")[0] for record in caplog.records[20:]] == [
        "30 more requests ended like that within a second: dial",
        "error reverse proxying request",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3s"), (0.1, "100ms"), (1.5, "1.5s"), (300, "5m0s"), (3661, "1h1m1s"), (90.5, "1m30.5s")],
)
def test_durations_are_written_as_go_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
