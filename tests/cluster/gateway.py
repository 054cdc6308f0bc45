"""`python -m tests.cluster.gateway`: ingress and DNS of the test cluster.

Knative needs somebody to implement its Ingress (KIngress). This is the least that makes Routes
Ready and brings requests in: it declares every KIngress configured, and forwards HTTP/1.1 by Host
and tag header to the Kubernetes Service that the KIngress names; to h2c Services it speaks HTTP/2.
Upgraded connections and clients of HTTP/2 are the business of `streams`. No TLS, no retries, and a
connection for each request, so that what Kubernetes decides is what happens. Not a gateway to
measure anything with.
"""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import aiohttp
from aiohttp import web

from tests.cluster import api, dns, h2c, streams
from tests.cluster.places import DOMAIN, HOST_ADDRESS, INGRESS_CLASS, NODE_ADDRESS

PORT = 80
NAME = f"gateway.weir-test.svc.{DOMAIN}"
"""The gateway's own name in the cluster's DNS; Services of Routes are aliases of it."""

_INGRESSES = "/apis/networking.internal.knative.dev/v1alpha1/ingresses"
_HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
    *("transfer-encoding", "upgrade"),
}


@dataclass(frozen=True)
class Split:
    """One backend of a path."""

    service: str
    namespace: str
    port: int
    percent: int
    headers: dict[str, str]


@dataclass(frozen=True)
class Path:
    """Requests that carry `matching` headers go to one of `splits`. `private`: of pods only."""

    private: bool
    prefix: str
    matching: dict[str, str]
    host: str
    splits: tuple[Split, ...]

    def takes(self, path: str, headers: Mapping[str, str]) -> bool:
        return path.startswith(self.prefix) and all(
            headers.get(name) == value for name, value in self.matching.items()
        )


class Table:
    """Which host goes where, from all KIngresses of our class."""

    def __init__(self) -> None:
        self._hosts: dict[str, dict[str, list[Path]]] = {}  # by KIngress, by host

    def clear(self) -> None:
        self._hosts.clear()

    def learn(self, name: str, ingress: api.Object | None) -> None:
        """Take up a KIngress, or forget it."""
        if ingress is None:
            self._hosts.pop(name, None)
            return
        hosts: dict[str, list[Path]] = {}
        for rule in ingress["spec"].get("rules", ()):
            private = rule.get("visibility") == "ClusterLocal"
            # the most particular first: tags are told apart by a header
            paths = sorted(
                (_path(spec, private) for spec in rule["http"]["paths"]),
                key=lambda path: (-len(path.prefix), -len(path.matching)),
            )
            for host in rule["hosts"]:
                hosts[host] = paths
        self._hosts[name] = hosts

    def path(self, host: str, path: str, headers: Mapping[str, str]) -> Path | None:
        """`headers` are asked by lower-case name."""
        host = host.partition(":")[0].lower()
        for hosts in self._hosts.values():
            for found in hosts.get(host, ()):
                if found.takes(path, headers):
                    return found
        return None


def _path(spec: dict[str, Any], private: bool) -> Path:
    more = spec.get("appendHeaders", {})
    splits = tuple(
        Split(
            split["serviceName"],
            split["serviceNamespace"],
            int(split["servicePort"]),
            split.get("percent", 100),
            {**more, **split.get("appendHeaders", {})},
        )
        for split in spec["splits"]
    )
    matching = {name.lower(): match["exact"] for name, match in spec.get("headers", {}).items()}
    return Path(private, spec.get("path", "/"), matching, spec.get("rewriteHost", ""), splits)


class Gateway:
    """Forwards what comes in on PORT."""

    def __init__(self, names: dict[str, str], client: aiohttp.ClientSession) -> None:
        self.table = Table()
        self._names = names
        self._client = client

    def choose(
        self, host: str, path: str, headers: Mapping[str, str], peer: str
    ) -> streams.Way | str:
        """Where a request goes (streams.Choose)."""
        found = self.table.path(host, path, headers)
        if found is None or (found.private and peer == HOST_ADDRESS):
            return f"no KIngress for {host}"
        (split,) = random.choices(found.splits, [split.percent for split in found.splits])
        address = self._names.get(f"{split.service}.{split.namespace}.svc.{DOMAIN}")
        if address is None:
            return f"no Service {split.namespace}/{split.service}"
        fields = {name.lower(): value for name, value in split.headers.items()}
        fields["host"] = found.host or host
        for_ = (headers.get("x-forwarded-for"), peer)
        fields["x-forwarded-for"] = ", ".join(filter(None, for_))
        fields["x-forwarded-proto"] = "http"
        return streams.Way(address, split.port, fields)

    async def forward(self, request: web.Request) -> web.StreamResponse:
        way = self.choose(request.host, request.path, request.headers, request.remote or "")
        if isinstance(way, str):
            return web.Response(status=503 if "Service" in way else 404, text=f"{way}\n")
        dropped = {*_HOP_BY_HOP, *way.fields}
        headers = {
            name: value for name, value in request.headers.items() if name.lower() not in dropped
        }
        headers |= {name.title(): value for name, value in way.fields.items()}
        address, port = way.address, way.port
        if port == h2c.HTTP2_PORT:
            return await _forward_h2c(request, address, headers)
        try:
            async with self._client.request(
                request.method,
                f"http://{address}:{port}{request.raw_path}",
                headers=headers,
                data=request.content if request.body_exists else None,
                allow_redirects=False,
                skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept", "Content-Type"),
            ) as upstream:
                return await _relay(request, upstream)
        except aiohttp.ClientConnectionError as error:
            return web.Response(status=502, text=f"{address}:{port}: {error!r}\n")


async def _forward_h2c(
    request: web.Request, address: str, headers: dict[str, str]
) -> web.StreamResponse:
    body = await request.read()
    try:
        answer = await h2c.ask(
            address, h2c.HTTP2_PORT, request.method, request.raw_path, headers, body
        )
    except OSError as error:
        return web.Response(status=502, text=f"{error!r}\n")
    response = web.Response(status=answer.status, body=bytes(answer.body))
    for name, value in answer.headers:
        if name not in ("content-length", "content-type"):
            response.headers.add(name, value)
    response.headers["Content-Type"] = dict(answer.headers).get("content-type", "")
    return response


async def _relay(request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
    for name, value in upstream.headers.items():
        if name.lower() not in _HOP_BY_HOP:
            response.headers.add(name, value)
    await response.prepare(request)
    async for chunk in upstream.content.iter_any():
        await response.write(chunk)
    await response.write_eof()
    return response


def status(ingress: api.Object) -> api.Object:
    """The status of a KIngress that is served by this gateway."""
    balancer = {"ingress": [{"domainInternal": NAME}]}
    kinds = ("LoadBalancerReady", "NetworkConfigured", "Ready")
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    return {
        "observedGeneration": ingress["metadata"]["generation"],
        "conditions": [
            {"type": kind, "status": "True", "lastTransitionTime": now} for kind in kinds
        ],
        "publicLoadBalancer": balancer,
        "privateLoadBalancer": balancer,
    }


async def main() -> None:
    server = dns.Server()
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(lambda: server, local_addr=(NODE_ADDRESS, 53))
    connections = aiohttp.TCPConnector(limit=0, force_close=True)
    no_limit = aiohttp.ClientTimeout(total=None)
    async with (
        api.connect() as session,
        aiohttp.ClientSession(
            connector=connections, timeout=no_limit, auto_decompress=False
        ) as client,
        asyncio.TaskGroup() as tasks,
    ):
        gateway = Gateway(server.addresses, client)

        def service_changed(event: str, service: api.Object) -> None:
            _name(server.addresses, event, service)

        def ingress_changed(event: str, ingress: api.Object) -> None:
            about = ingress["metadata"]
            if (
                about.get("annotations", {}).get("networking.knative.dev/ingress.class")
                != INGRESS_CLASS
            ):
                return
            name = f"{about['namespace']}/{about['name']}"
            gateway.table.learn(name, None if event == "DELETED" else ingress)
            seen = ingress.get("status", {}).get("observedGeneration")
            if event != "DELETED" and seen != about["generation"]:
                path = f"{_INGRESSES.removesuffix('/ingresses')}/namespaces/{about['namespace']}"
                path += f"/ingresses/{about['name']}"
                tasks.create_task(api.patch_status(session, path, status(ingress)))

        tasks.create_task(
            api.follow(session, "/api/v1/services", service_changed, server.addresses.clear)
        )
        tasks.create_task(api.follow(session, _INGRESSES, ingress_changed, gateway.table.clear))
        application = web.Application(client_max_size=0)
        application.router.add_route("*", "/{path:.*}", gateway.forward)
        runner = web.AppRunner(application, access_log=None, auto_decompress=False)
        await runner.setup()
        assert runner.server is not None
        ordinary = runner.server
        await loop.create_server(
            lambda: streams.Front(ordinary, gateway.choose), NODE_ADDRESS, PORT, backlog=4096
        )
        print(f"serving on {NODE_ADDRESS}", flush=True)


def _name(addresses: dict[str, str], event: str, service: api.Object) -> None:
    about, spec = service["metadata"], service["spec"]
    name = f"{about['name']}.{about['namespace']}.svc.{DOMAIN}"
    address = spec.get("clusterIP", "")
    if spec.get("externalName") == NAME:  # the Service that a Route leaves for callers inside
        address = NODE_ADDRESS
    if event == "DELETED" or not address or address == "None":
        addresses.pop(name, None)
    else:
        addresses[name] = address


if __name__ == "__main__":
    asyncio.run(main())
