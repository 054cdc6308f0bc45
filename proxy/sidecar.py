"""`weir sidecar`: the process that takes the queue-proxy's place in a pod (contract section 1).

Owns the order of the start (settings, sockets, then everything heavy), signals and the exit
status. What is served is the PodServer's business.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from weir.proxy import contract, giveback, sockets
from weir.proxy.environment import CERTIFICATES, EnvironmentFault, SidecarSettings, read_environment

if TYPE_CHECKING:
    import socket

    from weir.proxy.environment import PrometheusServer
    from weir.proxy.podserver import PodServer
    from weir.proxy.tls import TlsPort

_STOP = (signal.SIGTERM, signal.SIGINT)
_SHOWN = ("optional", "require")  # METRICS_PROMETHEUS_TLS_CLIENT_AUTH


def main(environment: Mapping[str, str] = os.environ) -> int:
    """Serve until SIGTERM or SIGINT, then drain. Returns the exit status, as upstream has them."""
    started = time.monotonic()
    # a pod may be deleted while this loads, and as process 1 it would not even notice the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    sockets.raise_open_files()
    try:
        settings = read_environment(environment)
        passed = sockets.inherited(environment)
        open_ports = _open(settings, passed)
    except (EnvironmentFault, ValueError, OSError) as error:
        print(f"weir sidecar: {error}", file=sys.stderr)
        return 1
    gc.disable()  # until all is loaded: nothing of that is ever garbage
    import uvloop  # from here on it is heavy, and connections are queued already

    return int(uvloop.run(_serve(settings, open_ports, started)))


def _ports(settings: SidecarSettings) -> dict[str, int]:
    """By role (podserver.Role)."""
    wanted = {
        "data": settings.data_port,
        "admin": contract.ADMIN_PORT,
        "autoscaler": contract.AUTOSCALER_PORT,
    }
    if has_certificates():
        wanted["tls"] = settings.tls_port
    if settings.observability.profiling:
        wanted["profiling"] = settings.observability.profiling_port
    return wanted


def has_certificates() -> bool:
    return all(os.path.exists(f"{CERTIFICATES}/{name}") for name in ("tls.crt", "tls.key"))  # noqa: PTH110


def _open(
    settings: SidecarSettings, passed: dict[int, list[socket.socket]]
) -> dict[str, list[socket.socket]]:
    open_ports = {role: sockets.on_port(port, passed) for role, port in _ports(settings).items()}
    if settings.observability.request_metrics.protocol == "prometheus":
        try:
            settings.observability.prometheus.secured()
            host, port = settings.observability.metrics_address()
            open_ports["metrics"] = sockets.on_port(port, passed, host)
        except (OSError, ValueError) as error:  # not fatal, as upstream (contract section 1.5)
            print(f"weir sidecar: {error}: no metrics are served", file=sys.stderr)
    for unused in passed.values():
        for sock in unused:
            sock.close()
    return open_ports


async def _serve(
    settings: SidecarSettings, open_ports: dict[str, list[socket.socket]], started: float
) -> int:
    import asyncio

    from weir.proxy.observe import ownlog
    from weir.proxy.observe.observability import observers_for
    from weir.proxy.podserver import PodServer, Role
    from weir.proxy.policy.budget import Budget
    from weir.proxy.probes import Prober
    from weir.proxy.relay import Relay
    from weir.proxy.wire.dial import dial_here

    ownlog.set_up(settings)
    revision = settings.revision
    # the others are for the user container's side; where there are none left, nobody is accepted
    share = Budget(sockets.open_files()).share()
    prober = Prober(revision, dial_here)
    relay = Relay(revision, dial=dial_here, prober=prober, share=share)
    observability = observers_for(settings, in_line=lambda: relay.in_line)
    relay.observers += observability.observers
    tls = None
    if "tls" in open_ports:
        from weir.proxy.tls import TlsFault, TlsPort

        try:
            tls = TlsPort(settings.tls)
        except TlsFault as error:
            print(f"weir sidecar: {error}", file=sys.stderr)
            return 1
        tls.watch()
    page = None
    if "metrics" in open_ports and settings.observability.prometheus.secured():
        page = _secured_page(settings.observability.prometheus)
        if page is None:
            for sock in open_ports.pop("metrics"):
                sock.close()
    profiling = None
    if "profiling" in open_ports:
        from weir.proxy.observe.profiling import profiling as stacks

        profiling = stacks()
    server = PodServer(
        relay,
        uptime_from=started,
        render=observability.render,
        profiling=profiling,
        secure=tls,
        secure_metrics=page,
    )
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if server.drain.terminating:
            os._exit(1)  # a second signal: at once (contract section 6)
        server.terminate()

    for number in _STOP:
        loop.add_signal_handler(number, stop)
    path = giveback.hold_of(os.environ)
    copies = {r: [s.dup() for s in open_ports[r]] for r in open_ports} if path else {}
    for role, listeners in open_ports.items():
        await server.serve(Role(role), listeners)
    gc.freeze()  # a collection looks at requests only, and does not stop them for milliseconds
    gc.enable()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
    await observability.start()
    returning = loop.create_task(_give_back(path, copies, server)) if path else None
    try:
        await server.drained()
    finally:
        if returning is not None:
            returning.cancel()
        server.close()
        for port in (tls, page):
            if port is not None:
                port.close()
        await observability.stop()
    return 0


def _secured_page(asked: PrometheusServer) -> TlsPort | None:
    """TLS for the metrics port, if it can be had; like the port itself it is not worth a pod."""
    from weir.proxy.tls import TlsFault, TlsPort

    try:
        port = TlsPort(
            asked.tls,
            files=(asked.tls_cert, asked.tls_key),
            http2=False,
            client_ca=asked.tls_client_ca_file if asked.tls_client_auth in _SHOWN else "",
            required=asked.tls_client_auth == "require",
            patience=contract.READ_METRICS_HEAD_SECONDS,
        )
    except TlsFault as error:
        print(f"weir sidecar: {error}: no metrics are served", file=sys.stderr)
        return None
    port.watch()
    return port


async def _give_back(path: str, copies: dict[str, list[socket.socket]], server: PodServer) -> None:
    """When an agent rings: let requests end, then become hold again (docs/decisions/022)."""
    import asyncio

    from weir.proxy.podserver import Role
    from weir.proxy.policy.drain import Phase

    loop = asyncio.get_running_loop()

    def serving() -> bool:  # a pod that drains is ours to the end
        return server.drain.phase is Phase.SERVING

    again = giveback.AGAIN_SECONDS
    while True:
        rung = asyncio.Event()
        loop.add_reader(giveback.DOOR, rung.set)
        await rung.wait()
        loop.remove_reader(giveback.DOOR)
        while server.relay.lasting(giveback.LET_GO_SECONDS):
            await asyncio.sleep(giveback.LOOK_SECONDS)
        if serving():
            server.stop_accepting()
            if await server.quiet(giveback.LET_GO_SECONDS) and serving():
                giveback.exec_hold(path, [s for listeners in copies.values() for s in listeners])
            # a drain that began meanwhile goes on accepting, too
            for role in ("data", "tls"):
                await server.serve(Role(role), [s.dup() for s in copies.get(role, ())])
        await asyncio.sleep(again)
        again = min(2 * again, giveback.MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
