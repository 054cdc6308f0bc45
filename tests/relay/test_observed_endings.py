"""Requests that do not end like others, in metrics and the request log (contract section 7.1)."""

from tests.relay import rig as rigs
from tests.relay.rig import Hold, die, get, hang, post
from tests.relay.watched import Start


async def test_a_user_container_that_dies_before_its_response_is_a_502(watch: Start) -> None:
    watched = await watch()
    watched.rig.user.on("/die", die)
    client = await watched.rig.client()
    assert (await client.ask(post("/die", b"x"))).status == 502
    logged = await watched.logged()
    assert (logged["status"], logged["responseSize"]) == (502, "4")
    assert watched.invocations() == watched.served() == {"502": 1}
    assert watched.app_before() == watched.served_before() == {"502": 1}
    assert watched.transport("error_type") == {"errors.errorString": 1}


async def test_a_user_container_that_is_not_there_is_a_502(watch: Start) -> None:
    watched = await watch()
    await watched.rig.user.stop()
    client = await watched.rig.client()
    assert (await client.get()).status == 502
    assert (await watched.logged())["status"] == 502
    assert watched.invocations() == watched.served() == {"502": 1}
    assert watched.transport("error_type") == {"net.OpError": 1}


async def test_a_user_container_that_dies_in_its_response_is_a_500(watch: Start) -> None:
    async def half(peer: rigs.Peer, _: rigs.Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        peer.close()
        raise rigs.Closed

    watched = await watch()
    watched.rig.user.on("/half", half)
    client = await watched.rig.client()
    await client.send(get("/half"))
    assert (await client.rest()).endswith(b"abc")
    logged = await watched.logged()
    assert (logged["status"], logged["responseSize"]) == (500, "0")
    assert watched.invocations() == watched.served() == {"500": 1}
    assert watched.app_before() == watched.served_before() == {"500": 1}
    assert watched.transport() == {"200": 1}


async def test_a_timeout_before_the_first_byte(watch: Start) -> None:
    watched = await watch(timeout=0.1)
    watched.rig.user.on("/hang", hang)
    client = await watched.rig.client()
    assert (await client.get("/hang")).status == 504
    logged = await watched.logged()
    assert (logged["status"], logged["responseSize"]) == (504, "15")
    assert float(logged["latency"].removesuffix("s")) >= 0.1
    assert watched.served() == {"504": 1}
    assert watched.invocations() == {"200": 1}  # upstream's, on purpose
    assert watched.served_before() == {"504": 1}
    assert watched.app_before() == {"502": 1}  # and upstream's before v1.19
    assert watched.transport("error_type") == {"errors.errorString": 1}


async def test_a_timeout_after_the_first_byte(watch: Start) -> None:
    async def begin(peer: rigs.Peer, _: rigs.Request) -> None:
        await peer.send(b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await peer.rest()
        raise rigs.Closed

    watched = await watch(timeout=0.2)
    watched.rig.user.on("/begin", begin)
    client = await watched.rig.client()
    assert (await client.get("/begin")).body == b"abcrequest timeout"
    assert (await watched.logged())["status"] == 201
    assert watched.served() == {"201": 1}
    assert watched.invocations() == {"500": 1}
    assert watched.transport() == {"201": 1}


async def test_a_timeout_in_the_queue_is_no_invocation(watch: Start) -> None:
    watched = await watch(container_concurrency=1, response_start_timeout=0.2)
    hold = Hold(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    hold.release()
    watched.rig.user.on("/stream", hold)
    first, second = await watched.rig.client(), await watched.rig.client()
    await first.send(get("/stream"))
    await first.head()
    assert (await second.get("/wait")).status == 504
    await watched.lines()
    assert watched.served() == {"504": 1}
    assert watched.invocations() == {}
    assert watched.transport() == {}


async def test_a_full_queue_is_no_invocation(watch: Start) -> None:
    watched = await watch(container_concurrency=1)
    hold = Hold()
    watched.rig.user.on("/hold", hold)
    for number in range(11):
        await (await watched.rig.client()).send(get("/hold"))
        await watched.rig.counted(number + 1)
    client = await watched.rig.client()
    assert (await client.get()).status == 503
    logged = await watched.logged()
    assert (logged["status"], logged["responseSize"]) == (503, "27")
    assert watched.served() == watched.served_before() == {"503": 1}
    assert watched.invocations() == watched.app_before() == watched.transport() == {}


async def test_a_client_that_leaves_before_its_response_is_a_499(watch: Start) -> None:
    watched = await watch()
    watched.rig.user.on("/hang", hang)
    client = await watched.rig.client()
    await client.send(get("/hang"))
    await watched.rig.user.received(1)
    client.close()
    logged = await watched.logged()
    assert (logged["status"], logged["responseSize"]) == (499, "0")
    assert watched.served() == watched.invocations() == {"499": 1}
    assert watched.served_before() == watched.app_before() == {"499": 1}


async def test_a_client_that_leaves_in_its_response_is_a_500(watch: Start) -> None:
    async def begin(peer: rigs.Peer, _: rigs.Request) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await peer.rest()
        raise rigs.Closed

    watched = await watch()
    watched.rig.user.on("/begin", begin)
    client = await watched.rig.client()
    await client.send(get("/begin"))
    await client.until(b"abc\r\n")
    client.close()
    assert (await watched.logged())["status"] == 500
    assert watched.served() == watched.invocations() == {"500": 1}


async def test_an_upgrade_is_a_200_and_to_the_user_container_a_101(watch: Start) -> None:
    async def echo(peer: rigs.Peer, _: rigs.Request) -> None:
        await peer.send(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n"
        )
        await peer.send(await peer.exactly(4))
        await peer.rest()
        raise rigs.Closed

    watched = await watch()
    watched.rig.user.on("/ws", echo)
    client = await watched.rig.client()
    await client.send(get("/ws", "Connection: Upgrade", "Upgrade: raw"))
    await client.head()
    await client.send(b"ping")
    assert await client.exactly(4) == b"ping"
    client.close()
    logged = await watched.logged()
    assert (logged["status"], logged["responseSize"]) == (200, "0")
    assert watched.served() == watched.invocations() == {"200": 1}
    assert watched.transport() == {"101": 1}
