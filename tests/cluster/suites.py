"""`python -m tests.cluster.suites runtime|e2e|... [FLAG...]`: suites of upstream's on the cluster.

Knative Serving's own (build.SUITES), unchanged, of the release that runs. They need the cluster up,
with the sidecar that is to be judged. Exits with the suite's status.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.cluster import build, cluster, images, keys
from tests.cluster.places import LOGS, NODE_ADDRESS, upstream_image
from tests.contract.scenarios.logs import DEFAULT as TEMPLATE

OF_THE_SIDECAR = (
    *("GRPC", "WebSocket", "HelloHTTP2", "RevisionTimeout", "DestroyPod", "Readiness"),
    *("MultiContainer$", "HelloWorld$", "QueueSideCar", "ActivatorOverload", "RequestLogs"),
    *("AutoscaleUpDownUp$", "AutoscaleUpCountPods", "TargetBurstCapacity", "FastScaleToZero"),
    *("ActivationScale", "MinScale", "InitScale", "ServiceToServiceCall", "SvcToSvc"),
    *("CallToPublicService", "EmptyDir"),
)
"""The tests of `e2e` that a sidecar has to do with; others are of the controller alone, or want
what this cluster has not: a way to the Internet, metrics of the kubelet, several nodes."""


_ON = "enabled"
CONFIGURED = {
    "e2e": (
        "config-observability",
        {
            "logging.enable-request-log": "true",
            "logging.enable-probe-request-log": "true",
            "logging.request-log-template": TEMPLATE,
        },
    ),
    "multicontainer": ("config-features", {"multi-container-probing": _ON}),
    "tagheader": ("config-features", {"tag-header-based-routing": _ON}),
}
"""What a suite wants to be set, or it skips tests."""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in build.SUITES:
        print(f"usage: python -m tests.cluster.suites {' | '.join(build.SUITES)} [FLAG...]")
        return 2
    if not cluster.is_up():
        print("the cluster is not up: make e2e-up", file=sys.stderr)
        return 1
    which, *flags = arguments
    suite = build.suite(which)
    if which != "runtime":
        build.serving(build.E2E_IMAGES)
        for archive in images.archives(build.E2E_IMAGES):
            cluster.load(archive)
    if which == "e2e":
        flags = [f"-test.run=({'|'.join(OF_THE_SIDECAR)})", *flags]
    if which in CONFIGURED:
        cluster.configure(*CONFIGURED[which])
    namespace = f"serving-tests-{which}"  # one that was deleted is long in coming again
    _prepare(namespace)
    log = LOGS / f"{which}.log"
    environment = {
        **os.environ,
        "KUBECONFIG": str(keys.ADMIN),
        "SYSTEM_NAMESPACE": "knative-serving",
        # the suites want to see a Service of the ingress, even when they are told the address
        "GATEWAY_NAMESPACE_OVERRIDE": namespace,
        "GATEWAY_OVERRIDE": "gateway",
    }
    with log.open("wb") as file:
        status = subprocess.run(
            [
                *(str(suite), "-test.v", "-test.parallel=4", "-test.timeout=60m"),
                *("-disable-logstream", "-enable-beta", f"-ingressendpoint={NODE_ADDRESS}"),
                *(f"-test-namespace={namespace}", f"-alt-test-namespace={namespace}-alt"),
                f"-imagetemplate={upstream_image('{{.Name}}')}",
                *flags,
            ],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    cluster.kubectl("delete", "namespace", namespace, f"{namespace}-alt", "--wait=false")
    _tell(log)
    return status


def _tell(log: Path) -> None:
    """Print what a suite found out about the sidecar that is set now."""
    outcomes = re.findall(r"^( *)--- (\w+): (\S+)", log.read_text(errors="replace"), re.MULTILINE)
    for indent, outcome, name in outcomes:
        print(f"{indent}{outcome} {name}")
    tests = [outcome for indent, outcome, _ in outcomes if not indent]
    failed = ", ".join(name for _, outcome, name in outcomes if outcome == "FAIL") or "none"
    query = ("configmap/config-deployment", "-o", "jsonpath={.data.queue-sidecar-image}")
    sidecar = cluster.kubectl("get", "-n", "knative-serving", *query)
    passed = f"{tests.count('PASS')} of {len(tests) - tests.count('SKIP')} tests pass"
    print(f"{sidecar}: {passed}; failed: {failed}; {log} has it all")


def _prepare(namespace: str) -> None:
    """What upstream's scripts put into the cluster before they start a suite."""
    # of the run before; its pods may still be draining
    cluster.kubectl("delete", "namespace", namespace, f"{namespace}-alt", "--ignore-not-found")
    name = "conformance-test"
    about = {"namespace": namespace}
    objects = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"{namespace}-alt"}},
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
