"""Port 8112 (contract section 3.9): the certificate is where the controller mounts it.

The mount needs a mount namespace, in which the sidecar starts.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import shutil
import ssl
import subprocess
import tempfile
import time
from pathlib import Path

from tests.contract.http2 import Side
from tests.contract.scenario import scenario
from tests.contract.scenarios.drain import QUIET, draining
from tests.contract.scenarios.http2 import ask, note, speaking
from tests.contract.world import ADMIN, Caller, World
from tests.relay.rig import get

TLS = 8112
MOUNT = (
    "mount -t tmpfs none /var/lib && mkdir -p /var/lib/knative/certs && "
    'cp "$0"/tls.crt "$0"/tls.key /var/lib/knative/certs/ && exec "$@"'
)


@functools.cache
def certificate(which: int = 0) -> Path:
    """A folder with tls.crt and tls.key, of the name that the activator wants to see."""
    folder = Path(tempfile.mkdtemp(prefix="weir-contract-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=knative", "-keyout", folder / "tls.key",
         "-out", folder / "tls.crt", "-addext", "subjectAltName=DNS:kn-user-default"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return folder


async def mounted(world: World) -> None:
    """Start the sidecar where the certificate is."""
    assert shutil.which("openssl") and shutil.which("unshare"), "needs openssl and unshare"
    await world.launch("unshare", "-m", "sh", "-c", MOUNT, str(certificate()))
    await world.listens(*world.ports, TLS)


async def over_tls(
    world: World,
    *protocols: str,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    trusted: str = "",
) -> Caller:
    context = ssl.create_default_context(cafile=trusted or str(certificate() / "tls.crt"))
    context.maximum_version = version
    if protocols:
        context.set_alpn_protocols(list(protocols))
    client = await world.client(TLS)
    await client.writer.start_tls(context, server_hostname="kn-user-default")
    return client


@scenario("3.9", ready=False)
async def TLS_with_HTTP_1(world: World) -> None:
    await mounted(world)
    client = await over_tls(world, "http/1.1")
    chosen = client.writer.get_extra_info("ssl_object")
    world.note("ALPN", chosen.selected_alpn_protocol())
    world.note("version", chosen.version())
    await world.ask("answer", get("/", "X-Forwarded-Proto: https"), client=client)
    await world.ask("the next", get("/"), client=client)
    await world.ask("the plain port serves as well", get("/"))


@scenario("3.9", ready=False)
async def TLS_without_ALPN(world: World) -> None:
    await mounted(world)
    client = await over_tls(world)
    world.note("ALPN", client.writer.get_extra_info("ssl_object").selected_alpn_protocol())
    await world.ask("answer", get("/"), client=client)


@scenario("3.9", ready=False)
async def TLS_with_HTTP_2(world: World) -> None:
    await mounted(world)
    async with speaking(world) as (_, _user):
        client = await over_tls(world, "h2", "http/1.1")
        world.note("ALPN", client.writer.get_extra_info("ssl_object").selected_alpn_protocol())
        side = Side(client.reader, client.writer, client=True)
        world.keep(asyncio.create_task(side.pump()))
        await side.begin()
        note(world, "answer", await (await side.stream(ask())).all())


@scenario("3.9", ready=False)
async def TLS_of_1_2_is_too_old(world: World) -> None:
    await mounted(world)
    try:
        await over_tls(world, version=ssl.TLSVersion.TLSv1_2)
    except ssl.SSLError as error:
        world.note("refused", error.reason)


@scenario("3.12", ready=False)
async def HTTP_to_the_TLS_port(world: World) -> None:
    await mounted(world)
    client = await world.client(TLS)
    await client.send(get("/"))
    world.note("answer", await client.rest())


@scenario("1.4", ready=False)
async def the_drain_hook_beside_TLS(world: World) -> None:
    """1.15 serves TLS on 8022 then, which the kubelet does not speak."""
    await mounted(world)
    client = await world.client(ADMIN)
    await client.send(get("/none"))
    world.note("answer", (await client.head()).split(b"\r\n")[0])


@scenario("3.9", ready=False, long=True)
async def a_certificate_that_is_renewed(world: World) -> None:
    """The kubelet writes another pair; connections that are there go on."""
    await mounted(world)
    before = await over_tls(world, "http/1.1")
    old = shown(before)
    await world.ask("before", get("/"), client=before)  # who never asks is not kept for a minute
    for name in ("tls.crt", "tls.key"):
        target = Path(f"/proc/{world.pid}/root/var/lib/knative/certs") / name
        target.write_bytes((certificate(1) / name).read_bytes())
    trusted = str(certificate(1) / "tls.crt")
    begun = time.monotonic()
    while True:
        try:
            after = await over_tls(world, "http/1.1", trusted=trusted)
            break
        except ssl.SSLError:
            assert time.monotonic() - begun < 90, "the old one is shown for too long"
            await asyncio.sleep(0.5)
    world.note("another one", shown(after) != old)
    words = "Certificate and/or key have changed on disk and were reloaded."
    world.note("said", words in world.stderr)
    await world.ask("by the new one", get("/"), client=after)
    await world.ask("by the old one", get("/"), client=before)


@scenario("3.9", ready=False, long=True)
async def a_certificate_that_is_broken_when_it_is_renewed(world: World) -> None:
    await mounted(world)
    old = shown(await over_tls(world, "http/1.1"))
    folder = Path(f"/proc/{world.pid}/root/var/lib/knative/certs")
    (folder / "tls.crt").write_text("nonsense")
    await asyncio.sleep(65)
    after = await over_tls(world, "http/1.1")
    world.note("the same as before", shown(after) == old)
    await world.ask("answer", get("/"), client=after)


def shown(client: Caller) -> bytes:
    found: bytes = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return found


@scenario("6", ready=False, long=True)
async def a_drain_with_TLS(world: World) -> None:
    """Requests by TLS are served until nothing has come for the quiet time, and finished."""
    await mounted(world)
    world.user.on("/slow", world.user.slow(20.0))
    first = await over_tls(world, "http/1.1")
    await first.send(get("/slow"))
    await world.user.received(1)
    world.terminate()
    begun = time.monotonic()
    await draining(world)
    for number in range(3):
        client = await over_tls(world, "http/1.1")
        await world.ask(f"request {number} of the drain", get("/"), client=client)
        client.close()
        await asyncio.sleep(2)
    world.told("slow", await first.response())
    world.note("exit status", await world.exited())
    world.when("exit", time.monotonic() - begun, QUIET + 4)
