"""Knative Serving's manifests, as its Go modules hold them, with the images built here.

The serving module lacks the definitions that are links in its repository; they come from the
modules it requires.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from tests.cluster.build import module_folder
from tests.cluster.places import YAML, upstream_image

BASE, DEFINITIONS, SETTINGS, PROGRAMS = (
    YAML / name for name in ("base.yaml", "definitions.yaml", "settings.yaml", "programs.yaml")
)
"""In the order in which they are applied."""


def write() -> None:
    core = module_folder("knative.dev/serving") / "config" / "core"
    networking = module_folder("knative.dev/networking") / "config"
    caching = module_folder("knative.dev/caching") / "config"
    programs = ("activator", "autoscaler", "controller", "webhook")
    YAML.mkdir(parents=True, exist_ok=True)
    _join(
        BASE,
        [core / "100-namespace.yaml", *_all(core / "200-roles"), core / "200-serviceaccount.yaml"],
    )
    own = _all(core / "300-resources")
    others = ("certificate", "domain-claim", "ingress", "serverlessservice")
    borrowed = [networking / f"{name}.yaml" for name in others]
    _join(DEFINITIONS, [*own, *borrowed, caching / "image.yaml"])
    _join(SETTINGS, [*_all(core / "configmaps"), networking / "config-network.yaml"])
    deployments = [core / "deployments" / f"{name}.yaml" for name in programs]
    # objects of those kinds, before there is a webhook that would have to look at them
    objects = [core / "300-knativecertificate.yaml", core / "999-cache.yaml"]
    _join(PROGRAMS, [*objects, *deployments, *_all(core / "webhooks")])


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.yaml"))


def _join(out: Path, files: Iterable[Path]) -> None:
    text = "\n---\n".join(file.read_text() for file in files)
    out.write_text(
        re.sub(r"ko://knative\.dev/serving/cmd/(\w+)", lambda m: upstream_image(m[1]), text)
    )
