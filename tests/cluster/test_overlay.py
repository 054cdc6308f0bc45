"""manifests/overlays/sidecar changes one setting of Knative's, and only that one."""

import json

import pytest

from tests.cluster.cluster import configure, kubectl
from tests.cluster.conftest import OVERLAY
from tests.cluster.places import SIDECAR_IMAGE

pytestmark = pytest.mark.cluster


def test_other_settings_and_the_labels_the_webhook_selects_by_stay(sidecar_image: str) -> None:
    configure("config-deployment", {"queue-sidecar-cpu-request": "20m"})
    configure("config-deployment", {"queue-sidecar-image": "dev.local/another:1"})
    kubectl("apply", "-k", str(OVERLAY))
    found = json.loads(
        kubectl("get", "configmap/config-deployment", "-n", "knative-serving", "-o", "json")
    )
    configure("config-deployment", {"queue-sidecar-image": sidecar_image})
    assert found["data"]["queue-sidecar-image"] == SIDECAR_IMAGE
    assert found["data"]["queue-sidecar-cpu-request"] == "20m"
    assert found["metadata"]["labels"]["app.kubernetes.io/name"] == "knative-serving"
