"""What Knative puts into the environment of a source (SinkBinding, ContainerSource): where events
go, what every one of them must carry, and whose certificates to trust.

Knows nothing of routes; an unset variable is no setting.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from weir.adaptor.events import REQUIRED, is_attribute_name


@dataclass(frozen=True, slots=True)
class Environment:
    """`ca_certs`: PEM text. `extensions`: set on every event, whatever it said before. `audience`:
    whose tokens the sink wants, so that it must not be called past its URL."""

    sink: str | None = None
    extensions: Mapping[str, str] = field(default_factory=dict)
    ca_certs: str | None = None
    audience: str | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> Environment:
        """Raises ValueError that names the variable."""
        return cls(
            environ.get("K_SINK") or None,
            _overrides(environ.get("K_CE_OVERRIDES", "")),
            environ.get("K_CA_CERTS") or None,
            environ.get("K_AUDIENCE") or None,
        )


def _overrides(text: str) -> dict[str, str]:
    if not text.strip():
        return {}
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"K_CE_OVERRIDES is not JSON: {error}") from error
    extensions = document.get("extensions") if isinstance(document, dict) else None
    if extensions is None and isinstance(document, dict):
        return {}
    if not isinstance(extensions, dict):
        raise ValueError('K_CE_OVERRIDES must look like {"extensions": {"name": "value"}}')
    for name, value in extensions.items():
        if name in REQUIRED or not is_attribute_name(name) or not isinstance(value, str):
            raise ValueError(
                f"K_CE_OVERRIDES: `{name}` can't be set: an extension has a name of lower-case "
                "letters and digits, a text as its value, and is no required attribute"
            )
    return {name: value for name, value in extensions.items() if value}
