"""What an adaptor is started with, whoever starts it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from weir.adaptor.broker import Broker
from weir.adaptor.knative import Environment
from weir.adaptor.mqttbinding import Dialect
from weir.adaptor.quarantine import BOUND
from weir.adaptor.routes import Route
from weir.adaptor.spool import Sync
from weir.adaptor.templates import Template

Protocol = Literal["5", "3.1.1", "auto"]


@dataclass(frozen=True, slots=True)
class AdaptorConfig:
    """`client_id` is a prefix, different for every adaptor on a broker, the same after a restart.
    `function_url`: where the sink `function` is. `stop_within`: seconds for what is in flight.
    `http`: where to serve metrics and health. `listen`: where to take events to be published under
    `listen_topic`, in which dialect of the MQTT binding."""

    broker: str | Broker | None
    routes: tuple[Route, ...]
    """As they are at the start."""
    quarantine: Path
    client_id: str = "weir"
    protocol: Protocol = "auto"
    receive_maximum: int = 256
    keep_alive: int = 30
    session_expiry: int = 7 * 24 * 3600
    function_url: str | None = None
    quarantine_bound: int = BOUND
    status: Path | None = None
    http: tuple[str, int] | None = None
    listen: tuple[str, int] | None = None
    listen_topic: Template | None = None
    listen_dialect: Dialect = "spec"
    stop_within: float = 10.0

    spool: Path | None = None
    """Its file; None: `spool.db` beside the quarantine."""
    spool_sync: Sync = "commit"
    knative: Environment = field(default_factory=Environment)
    clean_start: bool = False
    end_unused_sessions: bool = False

    routes_file: Path | None = None
    """Where they come from and are read again; None: they stay as they are."""

    @property
    def address(self) -> Broker:
        """Of what names no broker of its own. Raises ValueError."""
        if self.broker is None:
            raise ValueError("a broker is missing: name it with --broker, or in each route")
        return self.broker if isinstance(self.broker, Broker) else Broker.parse(self.broker)

    def broker_of(self, route: Route) -> Broker:
        """Raises ValueError."""
        return route.broker or self.address

    @property
    def spool_file(self) -> Path:
        return self.spool or self.state / "spool.db"

    @property
    def state(self) -> Path:
        """The folder of what must survive a restart."""
        return self.quarantine.parent
