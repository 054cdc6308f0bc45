"""Certificates made on the spot by openssl(1), each the root of itself."""

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

OPENSSL = shutil.which("openssl")
needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="openssl(1), which makes certificates")
NAMES = ("DNS:kn-user-default", "DNS:data-plane.knative.dev", "IP:127.0.0.1")
KEYS = {
    "ec": ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
    "rsa": ("-newkey", "rsa:2048"),
}


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as Knative mounts them: `tls.crt` and `tls.key`."""

    folder: Path

    @property
    def certificate(self) -> Path:
        return self.folder / "tls.crt"

    @property
    def key(self) -> Path:
        return self.folder / "tls.key"

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context

    def trusted(self) -> ssl.SSLContext:
        """A client's context that trusts nobody else."""
        return ssl.create_default_context(cafile=str(self.certificate))


def make_pair(folder: Path, name: str = "weir test", kind: str = "ec") -> Pair:
    """Write a new pair into the folder, over one that is there."""
    folder.mkdir(exist_ok=True)
    pair = Pair(folder)
    subprocess.run(
        [
            OPENSSL or "openssl",
            *("req", "-x509", *KEYS[kind], "-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName={','.join(NAMES)}"),
            *("-keyout", str(pair.key), "-out", str(pair.certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return pair
