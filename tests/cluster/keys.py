"""The keys and kubeconfigs of one run of the cluster, made by `openssl` in about a second.

Owns who is who in the cluster. They last a day and are deleted with the run.
"""

import json
import subprocess
from pathlib import Path

from tests.cluster.places import API_SERVICE, DOMAIN, NODE, NODE_ADDRESS, RUN

PKI = RUN / "pki"
ADMIN = RUN / "admin.kubeconfig"
API = f"https://{NODE_ADDRESS}:6443"


def make() -> None:
    """Write every key, certificate and kubeconfig that the cluster's programs name."""
    PKI.mkdir(parents=True, exist_ok=True)
    for authority in ("ca", "front-ca"):
        _certificate(authority, "/CN=weir-test", "basicConstraints=critical,CA:TRUE")
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc"]
    names.append(f"{names[-1]}.{DOMAIN}")
    addresses = ("127.0.0.1", NODE_ADDRESS, API_SERVICE)
    _server("apiserver", "/CN=kube-apiserver", addresses, names)
    _server("kubelet", f"/O=system:nodes/CN=system:node:{NODE}", (NODE_ADDRESS,), [NODE])
    _client("kubelet-client", "/O=system:masters/CN=apiserver")
    _client("front-client", "/CN=front-proxy", by="front-ca")
    subprocess.run(
        [
            *("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-out", str(PKI / "accounts.key")),
        ],
        check=True,
        capture_output=True,
    )
    subprocess.run(
        [
            *("openssl", "pkey", "-in", str(PKI / "accounts.key")),
            *("-pubout", "-out", str(PKI / "accounts.pub")),
        ],
        check=True,
        capture_output=True,
    )
    _client("admin", "/O=system:masters/CN=admin")
    kubeconfig("kubelet")
    ADMIN.write_text(kubeconfig("admin").read_text())
    for component in ("kube-controller-manager", "kube-scheduler", "kube-proxy"):
        _client(component, f"/CN=system:{component}")
        kubeconfig(component)


def kubeconfig(who: str) -> Path:
    """A kubeconfig (JSON is YAML) that speaks to the API server as `who`."""
    cluster = {"server": API, "certificate-authority": str(PKI / "ca.crt")}
    user = {
        "client-certificate": str(PKI / f"{who}.crt"),
        "client-key": str(PKI / f"{who}.key"),
    }
    path = PKI / f"{who}.kubeconfig"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "weir-test", "cluster": cluster}],
                "users": [{"name": who, "user": user}],
                "contexts": [
                    {"name": "weir-test", "context": {"cluster": "weir-test", "user": who}}
                ],
                "current-context": "weir-test",
            },
            indent=1,
        )
    )
    return path


def _server(name: str, subject: str, addresses: tuple[str, ...], names: list[str]) -> None:
    alternatives = [f"IP:{address}" for address in addresses] + [f"DNS:{name}" for name in names]
    _certificate(
        name,
        subject,
        f"subjectAltName={','.join(alternatives)}",
        "extendedKeyUsage=serverAuth,clientAuth",
        by="ca",
    )


def _client(name: str, subject: str, by: str = "ca") -> None:
    _certificate(name, subject, "extendedKeyUsage=clientAuth", by=by)


def _certificate(name: str, subject: str, *extensions: str, by: str = "") -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", subject]
    command += ["-keyout", str(PKI / f"{name}.key"), "-out", str(PKI / f"{name}.crt")]
    for extension in extensions:
        command += ["-addext", extension]
    if by:
        command += ["-CA", str(PKI / f"{by}.crt"), "-CAkey", str(PKI / f"{by}.key")]
        command += ["-addext", "basicConstraints=critical,CA:FALSE"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"openssl could not make the certificate of {name}:\n{result.stderr}")
