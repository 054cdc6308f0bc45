"""Who reports: the attributes of the resource that metrics and traces belong to (contract 7.1)."""

from __future__ import annotations

from weir import __version__
from weir.proxy.environment import SidecarSettings
from weir.proxy.observe.instruments import written

CONTAINER = "queue-proxy"


def attributes(settings: SidecarSettings) -> dict[str, str]:
    """By their OpenTelemetry names; those that are empty are left out."""
    revision = settings.revision
    observability = settings.observability
    found = {
        "container.name": CONTAINER,
        "k8s.namespace.name": revision.namespace,
        "k8s.pod.name": observability.pod_name,
        "kn.configuration.name": revision.configuration,
        "kn.revision.name": revision.revision,
        "kn.service.name": revision.service,
        "service.instance.id": observability.pod_name,
        "service.name": observability.service_name,
        "service.version": __version__,
    }
    return {name: value for name, value in found.items() if value}


def target_info(settings: SidecarSettings) -> list[str]:
    """The one series that has the revision's labels."""
    found = attributes(settings) | {
        "telemetry.sdk.language": "python",
        "telemetry.sdk.name": "weir",
        "telemetry.sdk.version": __version__,
    }
    labels = sorted((name.replace(".", "_"), value) for name, value in found.items())
    return [
        "# HELP target_info Target metadata",
        "# TYPE target_info gauge",
        f"target_info{{{written(labels)}}} 1",
    ]
