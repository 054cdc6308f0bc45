"""`python -m tests.cluster.conformance`: upstream's runtime conformance suite against the cluster.

Knative Serving's own `test/conformance/runtime`, unchanged, of the release that runs. It needs the
cluster up, with the sidecar that is to be judged. Exits with the suite's status.
"""

import json
import os
import re
import subprocess
import sys

from tests.cluster import build, cluster, keys
from tests.cluster.places import LOGS, NODE_ADDRESS, upstream_image

NAMESPACE = "serving-tests"
LOG = LOGS / "conformance.log"


def main(arguments: list[str]) -> int:
    if not cluster.is_up():
        print("the cluster is not up: make e2e-up", file=sys.stderr)
        return 1
    suite = build.conformance()
    _prepare()
    environment = {
        **os.environ,
        "KUBECONFIG": str(keys.ADMIN),
        "SYSTEM_NAMESPACE": "knative-serving",
        # the suite wants to see a Service of the ingress, even when it is told the address
        "GATEWAY_NAMESPACE_OVERRIDE": NAMESPACE,
        "GATEWAY_OVERRIDE": "gateway",
    }
    with LOG.open("wb") as log:
        status = subprocess.run(
            [
                *(str(suite), "-test.v", "-test.parallel=4", "-test.timeout=20m"),
                *("-disable-logstream", f"-ingressendpoint={NODE_ADDRESS}"),
                f"-imagetemplate={upstream_image('{{.Name}}')}",
                *arguments,
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    outcomes = re.findall(r"^( *)--- (\w+): (\S+)", LOG.read_text(errors="replace"), re.MULTILINE)
    for indent, outcome, name in outcomes:
        print(f"{indent}{outcome} {name}")
    tests = [outcome for indent, outcome, _ in outcomes if not indent]
    failed = ", ".join(name for _, outcome, name in outcomes if outcome == "FAIL") or "none"
    query = ("configmap/config-deployment", "-o", "jsonpath={.data.queue-sidecar-image}")
    sidecar = cluster.kubectl("get", "-n", "knative-serving", *query)
    passed = f"{tests.count('PASS')} of {len(tests)} tests pass"
    print(f"{sidecar}: {passed}; failed: {failed}; {LOG} has it all")
    return status


def _prepare() -> None:
    """What upstream's scripts put into the cluster before they start the suite."""
    name = "conformance-test"
    about = {"namespace": NAMESPACE}
    objects = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {**about, "name": f"{name}-configmap"},
            "data": {"testKey": "testValue"},
        },
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {**about, "name": f"{name}-secret"},
            "stringData": {"testKey": "testValue"},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {**about, "name": "gateway"},
            "spec": {"type": "ExternalName", "externalName": "gateway.invalid"},
        },
    ]
    listed = {"apiVersion": "v1", "kind": "List", "items": objects}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(listed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
