"""The request log: a line on stdout for each request after it ended (contract section 3.13).

Owns what a line is made of and when. Templates are the business of `gotemplate`, the pipe that of
`lines`. A line is rendered in a turn of the loop of its own, after the response was written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from weir.proxy import contract
from weir.proxy.environment import SidecarSettings
from weir.proxy.exchange import Client, Exchange, Head
from weir.proxy.observe import outcome
from weir.proxy.observe.gorequest import Entry, Request, Response, Revision
from weir.proxy.observe.gotemplate import Template
from weir.proxy.observe.govalues import TemplateError, octets, shortest, text
from weir.proxy.policy.forwarded import forwarded

_Fields = list[tuple[bytes, bytes]]

log = logging.getLogger("weir.log")


class RequestLog:
    """An Observer. `say` takes a line. Raises TemplateError if the template can't be parsed.

    `traced`: someone else replaces header fields, which the log shows as they came in.
    """

    def __init__(
        self, settings: SidecarSettings, say: Callable[[bytes], None], *, traced: bool = False
    ) -> None:
        wanted = settings.observability.request_log
        template = wanted.template
        self._template = Template(template if template.endswith("\n") else template + "\n")
        self._probes = wanted.probes
        self._say = say
        self._traced = traced
        revision = settings.revision
        self._revision = Revision(
            revision.revision,
            revision.namespace,
            revision.service,
            revision.configuration,
            revision.pod,
            settings.pod_ip,
        )
        self._inbound: dict[Exchange, tuple[_Fields, bytes]] = {}
        self._waiting: list[tuple[Request, Response]] = []
        self._failed = False

    # --- Observer ------------------------------------------------------------------------------
    def begun(self, exchange: Exchange) -> None:
        head = exchange.head
        if self._traced or contract.ORIGINAL_HOST in head.seen:  # it is about to change
            self._inbound[exchange] = head.fields(), head.seen.get(b"host", b"")

    def over(self, exchange: Exchange, now: float) -> None:
        inbound = self._inbound.pop(exchange, None)
        head = exchange.head
        seen = head.seen
        if not self._probes and outcome.probe_like(seen):
            return
        fields, host = inbound or (head.fields(), seen.get(b"host", b""))
        if contract.ORIGINAL_HOST in seen:
            fields = [pair for pair in fields if pair[0].lower() != contract.ORIGINAL_HOST]
        if not seen.get(b"forwarded"):
            added = forwarded(
                *(seen.get(b"x-forwarded-" + name, b"") for name in (b"for", b"host", b"proto"))
            )
            if added:
                fields.append((b"Forwarded", added))
        self._add(
            exchange.client,
            head,
            fields,
            host,
            Response(
                outcome.server_status(exchange),
                outcome.server_size(exchange),
                now - exchange.started,
            ),
        )

    def probed(self, client: Client, head: Head, status: int, size: int, seconds: float) -> None:
        if self._probes:
            host = head.seen.get(b"host", b"")
            self._add(client, head, head.fields(), host, Response(status, size, seconds))

    # --- lines -----------------------------------------------------------------------------------
    def _add(
        self, client: Client, head: Head, fields: _Fields, host: bytes, response: Response
    ) -> None:
        request = Request(
            head.method,
            head.target,
            head.version,
            host,
            fields,
            head.length,
            _peer(client),
            client.tls,
        )
        self._waiting.append((request, response))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self.write)

    def write(self) -> None:
        """Render and say what has ended since."""
        waiting, self._waiting = self._waiting, []
        for request, response in waiting:
            self._say(octets(self._line(request, response)))

    def _line(self, request: Request, response: Response) -> str:
        entry = Entry(request, response, self._revision, trace_id(request))
        try:
            return self._template.render(entry)
        except TemplateError as error:
            if not self._failed:
                self._failed = True
                log.error("the request log's template can't be rendered: %s", error)  # noqa: TRY400
            return (
                f"Invalid request log template: method: {request.Method}, response code: "
                f"{response.Code}, latency: {shortest(response.Latency)}, "
                f"url: {request.URL.string()}\n"
            )


def trace_id(request: Request) -> str:
    """Of W3C's header, else of Zipkin's."""
    parts = request.first(b"traceparent").split(b"-")
    found = parts[1] if len(parts) > 1 else request.first(b"x-b3-traceid")
    return text(found)


def _peer(client: Client) -> str:
    address = client.peer.decode()
    return f"[{address}]:{client.peer_port}" if ":" in address else f"{address}:{client.peer_port}"
