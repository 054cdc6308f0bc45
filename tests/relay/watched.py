"""A relay whose requests are counted and logged, and what was counted and logged."""

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

from tests.relay.rig import Rig
from weir.proxy.contract import RevisionSettings
from weir.proxy.environment import Observability, RequestLog, SidecarSettings
from weir.proxy.observe.metrics import RequestMetrics
from weir.proxy.observe.opencensus import RevisionMetrics
from weir.proxy.observe.requestlog import RequestLog as RequestLogObserver


class Watched:
    """A relay with all observers that keep numbers or lines."""

    def __init__(self, rig: Rig, template: str, probes: bool) -> None:
        self.rig = rig
        revision = RevisionSettings(
            user_port=rig.user.port,
            pod="pod-1",
            revision="hello-00001",
            service="hello",
            configuration="hello",
            container_concurrency=rig.relay.settings.container_concurrency,
        )
        settings = SidecarSettings(
            revision,
            8012,
            8112,
            "10.0.0.1",
            observability=Observability(request_log=RequestLog(True, template, probes)),
        )
        limit = revision.container_concurrency
        self.current = RequestMetrics(rig.user.port, limit, lambda: rig.relay.in_line)
        self.before = RevisionMetrics(revision, lambda: rig.relay.in_line)
        self.said: list[str] = []
        self.log = RequestLogObserver(settings, lambda line: self.said.append(line.decode()))
        rig.relay.observers.extend([self.current, self.before, self.log])

    async def lines(self, count: int = 1) -> list[dict[str, Any]]:
        """That many lines of the log, of the default template."""
        await self.rig.settled(lambda: len(self.said) >= count)
        return [json.loads(line) for line in self.said]

    async def logged(self) -> dict[str, Any]:
        """The only line's httpRequest."""
        (line,) = await self.lines()
        found: dict[str, Any] = line["httpRequest"]
        return found

    def counts(self, name: str) -> dict[str, float]:
        """Value of each series of a metric, current or of OpenCensus, by its labels."""
        found = {}
        for line in (*self.current.lines(), *self.before.lines()):
            match = re.fullmatch(re.escape(name) + r"\{(.*)\} (\S+)", line)
            if match:
                found[match[1]] = float(match[2])
        return found

    def codes(self, name: str, label: str) -> dict[str, float]:
        """The same by the value of one label."""
        found: dict[str, float] = {}
        for labels, value in self.counts(name).items():
            code = re.search(rf'\b{label}="([^"]*)"', labels)
            found[code[1] if code else ""] = value
        return found

    def invocations(self) -> dict[str, float]:
        name = "kn_serving_invocation_duration_seconds_count"
        return self.codes(name, "http_response_status_code")

    def served(self) -> dict[str, float]:
        name = "http_server_request_duration_seconds_count"
        return self.codes(name, "http_response_status_code")

    def app_before(self) -> dict[str, float]:
        return self.codes("revision_app_request_count", "response_code")

    def served_before(self) -> dict[str, float]:
        return self.codes("revision_request_count", "response_code")

    def transport(self, label: str = "http_response_status_code") -> dict[str, float]:
        return self.codes("http_client_request_duration_seconds_count", label)


Start = Callable[..., Awaitable[Watched]]
