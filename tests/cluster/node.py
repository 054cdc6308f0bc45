"""Process 1 of the node: `python -m tests.cluster.node` inside namespaces of its own.

Owns the daemons of Kubernetes. The PID namespace is what makes the teardown certain: when this
process ends, for whatever reason, the kernel kills everything it ever started, containers too, and
with the last process go the mounts and the network. It ends when any of its daemons does.
"""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.cluster import keys
from tests.cluster.places import (
    BIN,
    DOMAIN,
    LOGS,
    NODE,
    NODE_ADDRESS,
    POD_RANGE,
    REPOSITORY,
    RUN,
    SERVICE_RANGE,
)

CONTAINERD_SOCKET = RUN / "containerd.sock"
PAUSE_IMAGE = "dev.local/pause:1"

_SYSCTLS = {"vm/overcommit_memory": "1", "kernel/panic": "10", "kernel/panic_on_oops": "1"}
"""What the kubelet sets on its machine. It gets files to write instead: the machine is not its."""
_PRIVATE = ("/run", "/var/lib", "/var/log")
"""Folders in which containerd, CNI and the kubelet leave files whatever they are told."""


def main() -> int:
    _hide_the_machine()
    daemons: dict[int, str] = {}

    def start(name: str, *command: str) -> None:
        daemons[_spawn(name, command)] = name

    start("containerd", _found("containerd"), "--config", str(_containerd_settings()))
    start("etcd", _found("etcd"), *_etcd())
    _until(lambda: _connects(("127.0.0.1", 2379)), daemons, "etcd accepts connections")
    start("kube-apiserver", str(BIN / "kube-apiserver"), *_apiserver())
    # before its own roles are in place it refuses the others, and they give up
    _until(_api_is_ready, daemons, "the API server is ready")
    _until(lambda: _connects(str(CONTAINERD_SOCKET)), daemons, "containerd accepts connections")
    start("kube-controller-manager", str(BIN / "kube-controller-manager"), *_controllers())
    start("kube-scheduler", str(BIN / "kube-scheduler"), *_delegating("kube-scheduler"))
    start("kubelet", str(BIN / "kubelet"), *_kubelet())
    start("kube-proxy", str(BIN / "kube-proxy"), *_proxy())
    start("gateway", sys.executable, "-m", "tests.cluster.gateway")
    while True:
        _reap(daemons, 0)


def _hide_the_machine() -> None:
    for folder in _PRIVATE:
        _run("mount", "-n", "-t", "tmpfs", "-o", "mode=755", "weir-test", folder)
    settings = RUN / "sysctls"
    for name, value in _SYSCTLS.items():
        file = settings / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
        _run("mount", "-n", "--bind", str(file), f"/proc/sys/{name}")
    # volumes mounted by the kubelet have to appear in its containers
    _run("mount", "-n", "--make-rshared", "/")
    socket.sethostname(NODE)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _spawn(name: str, command: tuple[str, ...]) -> int:
    with (LOGS / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ).pid


def _reap(daemons: dict[int, str], options: int = os.WNOHANG) -> None:
    """Collect children; also containers' shims, which nobody else in here would."""
    try:
        pid, status = os.waitpid(-1, options)
    except ChildProcessError:
        return
    if pid in daemons:
        how = os.waitstatus_to_exitcode(status)
        sys.exit(f"{daemons[pid]} ended with {how}: see {LOGS / daemons[pid]}.log")


def _until(true: Callable[[], bool], daemons: dict[int, str], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        _reap(daemons)
        if time.monotonic() > deadline:
            sys.exit(f"it did not come about in a minute that {what}")
        time.sleep(0.05)


def _connects(address: str | tuple[str, int]) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        return sock.connect_ex(address) == 0


def _api_is_ready() -> bool:
    context = ssl.create_default_context(cafile=str(keys.PKI / "ca.crt"))
    context.load_cert_chain(keys.PKI / "admin.crt", keys.PKI / "admin.key")
    try:
        with urllib.request.urlopen(f"{keys.API}/readyz", timeout=3, context=context):
            return True
    except OSError:
        return False


def _found(name: str) -> str:
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    return path or sys.exit(f"there is no {name}: run tests/cluster/deps.sh")


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}: {result.stderr.strip()}")


def _containerd_settings() -> Path:
    network = RUN / "cni"
    network.mkdir(exist_ok=True)
    bridge = {
        "type": "bridge",
        "bridge": "pods",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(RUN / "addresses"),
            "ranges": [[{"subnet": POD_RANGE}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    (network / "10-pods.conflist").write_text(
        json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]})
    )
    settings = RUN / "containerd.toml"
    settings.write_text(
        f"""\
version = 2
disabled_plugins = ["io.containerd.internal.v1.opt"]
root = "{RUN}/containerd"
state = "/run/containerd"
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{network}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "{_found("runc")}"
"""
    )
    return settings


def _etcd() -> list[str]:
    client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
    return [
        *("--name", "only", "--data-dir", str(RUN / "etcd"), "--unsafe-no-fsync"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"only={peer}"),
    ]


def _apiserver() -> list[str]:
    pki = keys.PKI
    return [
        "--etcd-servers=http://127.0.0.1:2379",
        f"--bind-address={NODE_ADDRESS}",
        f"--advertise-address={NODE_ADDRESS}",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        f"--client-ca-file={pki}/ca.crt",
        "--kubelet-preferred-address-types=InternalIP",
        f"--kubelet-certificate-authority={pki}/ca.crt",
        f"--kubelet-client-certificate={pki}/kubelet-client.crt",
        f"--kubelet-client-key={pki}/kubelet-client.key",
        f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
        f"--service-account-key-file={pki}/accounts.pub",
        f"--service-account-signing-key-file={pki}/accounts.key",
        f"--requestheader-client-ca-file={pki}/front-ca.crt",
        "--requestheader-allowed-names=front-proxy",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
        f"--proxy-client-cert-file={pki}/front-client.crt",
        f"--proxy-client-key-file={pki}/front-client.key",
        "--enable-aggregator-routing=true",
    ]


def _delegating(component: str) -> list[str]:
    kubeconfig = keys.PKI / f"{component}.kubeconfig"
    return [
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
    ]


def _controllers() -> list[str]:
    return [
        *_delegating("kube-controller-manager"),
        "--use-service-account-credentials=true",
        f"--root-ca-file={keys.PKI}/ca.crt",
        f"--service-account-private-key-file={keys.PKI}/accounts.key",
        f"--flex-volume-plugin-dir={RUN}/volume-plugins",
        f"--cluster-signing-cert-file={keys.PKI}/ca.crt",
        f"--cluster-signing-key-file={keys.PKI}/ca.key",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
    ]


def _kubelet() -> list[str]:
    settings = RUN / "kubelet.json"
    settings.write_text(
        json.dumps(
            {
                "apiVersion": "kubelet.config.k8s.io/v1beta1",
                "kind": "KubeletConfiguration",
                "address": NODE_ADDRESS,
                "healthzBindAddress": "127.0.0.1",
                "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
                "cgroupDriver": "cgroupfs",
                "failCgroupV1": False,
                "failSwapOn": False,
                "enforceNodeAllocatable": [],
                "localStorageCapacityIsolation": False,
                "resolvConf": "",
                "clusterDomain": DOMAIN,
                "clusterDNS": [NODE_ADDRESS],
                "authentication": {
                    "anonymous": {"enabled": False},
                    "webhook": {"enabled": True},
                    "x509": {"clientCAFile": str(keys.PKI / "ca.crt")},
                },
                "authorization": {"mode": "Webhook"},
                "tlsCertFile": str(keys.PKI / "kubelet.crt"),
                "tlsPrivateKeyFile": str(keys.PKI / "kubelet.key"),
                "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%"},
                "imageGCHighThresholdPercent": 100,
                "podLogsDir": str(LOGS / "pods"),
                "volumePluginDir": str(RUN / "volume-plugins"),
            }
        )
    )
    return [
        f"--config={settings}",
        f"--kubeconfig={keys.PKI}/kubelet.kubeconfig",
        f"--root-dir={RUN}/kubelet",
        f"--cert-dir={RUN}/kubelet-keys",
        f"--hostname-override={NODE}",
        f"--node-ip={NODE_ADDRESS}",
    ]


def _proxy() -> list[str]:
    return [
        f"--kubeconfig={keys.PKI}/kube-proxy.kubeconfig",
        "--proxy-mode=iptables",
        f"--cluster-cidr={POD_RANGE}",
        f"--hostname-override={NODE}",
        f"--bind-address={NODE_ADDRESS}",
        # conntrack's limits are the whole machine's
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
    ]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.exit(main())
