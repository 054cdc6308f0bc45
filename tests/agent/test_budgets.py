"""What one pod does costs no other: large pods, hungry pods, and a worker that has had enough."""

from pathlib import Path

from tests.agent.borrowed import Agent, HeldPod, closing
from tests.pods import needs_kernel

pytestmark = needs_kernel


def test_a_pod_with_a_megabyte_of_environment_is_served(tmp_path: Path) -> None:
    # what Kubernetes adds for each Service of the namespace, and settings that the relay reads
    services = {f"SERVICE_{number}_PORT": "x" * 1000 for number in range(850)}
    settings = {
        "SERVING_LOGGING_CONFIG": "x" * 120_000,
        "TRACING_CONFIG_ZIPKIN_ENDPOINT": "é" * 30_000,
    }
    with HeldPod(**services, **settings) as pod, closing(agent := Agent(tmp_path, pod)):
        agent.until_held()
        assert pod.get() == (200, b"hello")
        assert pod.hold.poll() is None
        assert not pod.by_sidecar
