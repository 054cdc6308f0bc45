"""The dispatch table of the data port (contract 3.2, 4.1) and Weir's own question (design 2)."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.relay.rig import Hold, Rig, request, without_date
from weir.proxy.contract import HttpGet, Probe

MakeRig = Callable[..., Awaitable[Rig]]

KUBELET = "User-Agent: kube-probe/1.33"
ACTIVATOR = "User-Agent: Knative-Activator-Probe"
AUTOSCALER = "User-Agent: Knative-Autoscaling-Probe"
WEIR = "User-Agent: Knative-Activator-Probe (weir)"
QUEUE = "K-Network-Probe: queue"


def probe(agent: str, *fields: str, method: str = "GET", path: str = "/") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: example.com", agent, *fields, "", ""]
    return "\r\n".join(lines).encode()


QUEUE_ANSWER = (
    b"HTTP/1.1 200 OK\r\nDate: -\r\nContent-Length: 5\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\n\r\n"
)


def error(status: str, length: int) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"X-Content-Type-Options: nosniff\r\nDate: -\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


@pytest.mark.parametrize("agent", [KUBELET, ACTIVATOR, AUTOSCALER])
@pytest.mark.parametrize("path", ["/", "/healthz?x"])
async def test_a_health_check_of_a_ready_pod_is_answered_queue(
    rig: MakeRig, agent: str, path: str
) -> None:
    made = await rig()
    client = await made.client()
    response = await client.ask(probe(agent, QUEUE, path=path))
    assert without_date(response.head) == QUEUE_ANSWER
    assert response.body == b"queue"
    assert made.user.requests == []
    assert made.relay.counters().requests == 0


async def test_a_health_check_by_post_is_one_too_and_its_body_is_dropped(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    data = probe(KUBELET, QUEUE, "Content-Length: 2", method="POST") + b"xx"
    assert (await client.ask(data)).body == b"queue"
    assert (await client.get("/")).status == 200


@pytest.mark.parametrize("value", ["", "nonsense", "probe", "activator", "Queue"])
async def test_a_health_check_with_another_value_is_400_and_says_it(
    rig: MakeRig, value: str
) -> None:
    made = await rig()
    client = await made.client()
    fields = [f"K-Network-Probe: {value}"] if value else []
    response = await client.ask(probe(KUBELET, *fields))
    body = f"unexpected probe header value: {value}\n".encode()
    assert without_date(response.head) == error("400 Bad Request", len(body))
    assert response.body == body


async def test_a_health_check_of_a_pod_that_is_not_ready_is_503_without_a_body(
    rig: MakeRig,
) -> None:
    made = await rig()
    await made.user.stop()
    client = await made.client()
    response = await client.ask(probe(KUBELET, QUEUE))
    assert without_date(response.head) == (
        b"HTTP/1.1 503 Service Unavailable\r\nDate: -\r\nContent-Length: 0\r\n\r\n"
    )


async def test_an_http_probe_decides_by_status(rig: MakeRig) -> None:
    made = await rig()
    for status, ready in (("200 OK", 200), ("302 Found", 200), ("500 Oh", 503), ("404 No", 503)):
        made.user.on("/healthz", f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        other = await rig(probe=Probe(port=made.user.port, http=HttpGet("/healthz"), period=10))
        client = await other.client()
        assert (await client.ask(probe(KUBELET, QUEUE))).status == ready


async def test_probes_pass_a_breaker_that_is_full(rig: MakeRig) -> None:
    made = await rig(container_concurrency=1)
    hold = Hold()
    made.user.on("/hold", hold)
    busy = await made.client()
    await busy.send(request("GET", "/hold"))
    await made.user.received(1)
    client = await made.client()
    assert (await client.ask(probe(KUBELET, QUEUE))).body == b"queue"
    hold.release()
    assert (await busy.response()).body == b"held"


async def test_a_network_probe_gets_its_hash_back_whatever_the_path(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    response = await client.ask(
        probe(
            "User-Agent: Knative-Ingress-Probe",
            "K-Network-Probe: probe",
            "K-Network-Hash: deadbeef",
            path="/healthz/x?y",
        )
    )
    assert without_date(response.head) == (
        b"HTTP/1.1 200 OK\r\nK-Network-Hash: deadbeef\r\nDate: -\r\nContent-Length: 0\r\n\r\n"
    )


async def test_a_network_probe_without_a_hash_is_400(rig: MakeRig) -> None:
    made = await rig()
    client = await made.client()
    response = await client.get("/", "K-Network-Probe: probe")
    body = b'a probe request must contain a non-empty "K-Network-Hash" header\n'
    assert without_date(response.head) == error("400 Bad Request", len(body))
    assert response.body == body


@pytest.mark.parametrize("value", ["queue", "activator", "weir", "Probe"])
async def test_other_probe_values_with_an_ordinary_agent_are_traffic(
    rig: MakeRig, value: str
) -> None:
    made = await rig()
    client = await made.client()
    await client.get("/", f"K-Network-Probe: {value}")
    assert made.user.requests[0].field("k-network-probe") == value
    assert made.relay.counters().requests == 1


async def test_k_kubelet_probe_is_proxied_but_not_counted_and_passes_the_breaker(
    rig: MakeRig,
) -> None:
    made = await rig(container_concurrency=1)
    hold = Hold()
    made.user.on("/hold", hold)
    busy = await made.client()
    await busy.send(request("GET", "/hold"))
    await made.user.received(1)
    client = await made.client()
    response = await client.get("/", QUEUE, "K-Kubelet-Probe: x")
    assert response.status == 200
    assert made.user.requests[1].field("k-kubelet-probe") == "x"
    assert made.relay.counters().requests == 1
    hold.release()


class TestDraining:
    """After start_draining() probes fail at once, traffic goes on."""

    @pytest.mark.parametrize("agent", [KUBELET, ACTIVATOR, AUTOSCALER, WEIR])
    async def test_health_checks_are_503(self, rig: MakeRig, agent: str) -> None:
        made = await rig()
        made.relay.start_draining()
        client = await made.client()
        response = await client.ask(probe(agent, QUEUE))
        assert without_date(response.head) == error("503 Service Unavailable", 14)
        assert response.body == b"shutting down\n"

    async def test_network_probes_are_503(self, rig: MakeRig) -> None:
        made = await rig()
        made.relay.start_draining()
        client = await made.client()
        response = await client.get("/", "K-Network-Probe: probe", "K-Network-Hash: h")
        assert (response.status, response.body) == (503, b"shutting down\n")

    async def test_traffic_is_served_and_drained_waits_for_it(self, rig: MakeRig) -> None:
        made = await rig()
        hold = Hold()
        made.user.on("/hold", hold)
        idle, busy = await made.client(), await made.client()
        assert (await idle.get("/")).status == 200
        await busy.send(request("GET", "/hold"))
        await made.user.received(2)
        made.relay.start_draining()
        assert (await idle.get("/")).status == 200

        drained = asyncio.create_task(made.relay.drained())
        await asyncio.sleep(0)
        assert not drained.done()
        hold.release()
        assert (await busy.response()).body == b"held"
        await drained
        assert await idle.closed()


class TestWeirsQuestion:
    """Does this pod take direct connections?"""

    ASK = probe(WEIR, "K-Network-Probe: weir")

    async def test_an_eligible_pod_says_how(self, rig: MakeRig) -> None:
        made = await rig()
        made.offer = "port=8014; timeout=300; start=0; idle=0"
        client = await made.client()
        response = await client.ask(self.ASK)
        assert (response.status, response.body) == (200, b"weir")
        assert response.field("Weir-Direct") == made.offer

    async def test_a_pod_that_is_not_eligible_says_weir_and_no_more(self, rig: MakeRig) -> None:
        made = await rig()
        client = await made.client()
        response = await client.ask(self.ASK)
        assert (response.status, response.body) == (200, b"weir")
        assert response.field("Weir-Direct") is None

    async def test_other_probe_agents_asking_that_are_refused(self, rig: MakeRig) -> None:
        made = await rig()
        client = await made.client()
        response = await client.ask(probe(KUBELET, "K-Network-Probe: weir"))
        assert response.body == b"unexpected probe header value: weir\n"
