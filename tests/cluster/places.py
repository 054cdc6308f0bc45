"""Where the test cluster lives: versions, folders, addresses and names, each fact once.

Everything that is built or run stays under one folder outside the repository, so that `rm -rf` of
it is a complete uninstall. Starts nothing and reads no file.
"""

import os
from pathlib import Path

KUBERNETES = "1.36.3"
SERVING = "0.42.2"
"""The newest `knative.dev/serving` that the Go module proxy has: Knative 1.15."""

ROOT = Path(
    os.environ.get("WEIR_CLUSTER_DIR")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weir" / "cluster"
)
BIN = ROOT / "bin"
SOURCES = ROOT / "src"
IMAGES = ROOT / "images"
YAML = ROOT / "yaml"
LOGS = ROOT / "logs"
RUN = ROOT / "run"
"""What a running cluster needs and `down` deletes: keys, sockets, etcd's data, container roots."""

REPOSITORY = Path(__file__).parents[2]

HOST_LINK, NODE_LINK = "weirk8s0", "weirk8s1"
HOST_ADDRESS, NODE_ADDRESS = "10.251.0.1", "10.251.0.2"
POD_RANGE, SERVICE_RANGE = "10.244.0.0/24", "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
NODE = "weir-node"
DOMAIN = "cluster.local"
PUBLIC_DOMAIN = "example.com"
"""Of Services' URLs. The gateway answers for it at NODE_ADDRESS; nobody resolves it."""

CGROUP = "kubepods"
"""The cgroup the kubelet makes for its pods, in every hierarchy."""

INGRESS_CLASS = "weir-test.ingress.networking.knative.dev"

SIDECAR_IMAGE = "dev.local/weir:dev"
"""As manifests/overlays/sidecar has it. Knative leaves tags of `dev.local` as they are, and the
kubelet never pulls an image it has, unless its tag is `latest`."""
HOLD_IMAGE = "dev.local/weir-hold:dev"
"""The same with weir-hold in front, for nodes with an agent."""
USER_IMAGE = "dev.local/weir-test-user:dev"


def upstream_image(name: str) -> str:
    """The image of one of upstream's own commands or test programs."""
    return f"dev.local/upstream-{name}:v{SERVING}"
