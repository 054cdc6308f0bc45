"""Kubernetes and Knative Serving from their Go modules into executables.

Owns the two modules of tools that pin them. What is already built is not built again: an executable
carries its version in a stamp beside it. Refuses to know how the executables are started.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.cluster.places import BIN, KUBERNETES, SERVING, SOURCES

KUBERNETES_COMMANDS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kubectl",
    "kube-proxy",
)
SERVING_COMMANDS = ("activator", "autoscaler", "controller", "webhook", "queue")
TEST_IMAGES = ("runtime", "helloworld", "readiness")
"""Programs of upstream's own suites that run as user containers."""
E2E_IMAGES = (
    "autoscale",
    "grpc-ping",
    "hellohttp2",
    "httpproxy",
    "pizzaplanetv1",
    "pizzaplanetv2",
    "timeout",
    "volumes",
    "wsserver",
    "multicontainer/servingcontainer",
    "multicontainer/sidecarcontainer",
)
"""Those that only the end-to-end suite runs, by their folders."""
SUITES = {
    "runtime": "test/conformance/runtime",
    "e2e": "test/e2e",
    "multicontainer": "test/e2e/multicontainerprobing",
    "tagheader": "test/e2e/tagheader",
}
"""Upstream's suites, by the name that they have here."""

PAUSE = """\
// pause holds a pod's namespaces: it waits for a signal and reaps what is orphaned.
package main

import (
\t"os"
\t"os/signal"
\t"syscall"
)

func main() {
\tsignals := make(chan os.Signal, 8)
\tsignal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
\tfor s := range signals {
\t\tif s != syscall.SIGCHLD {
\t\t\treturn
\t\t}
\t\tfor {
\t\t\tif pid, _ := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 {
\t\t\t\tbreak
\t\t\t}
\t\t}
\t}
}
"""


def missing(commands: Iterable[str], version: str) -> list[str]:
    """Those of `commands` that are not in BIN in this version."""
    return [name for name in commands if _stamp(name) != version]


def kubernetes() -> None:
    """Build the commands of Kubernetes. Some minutes when nothing is in Go's build cache."""
    todo = missing(KUBERNETES_COMMANDS, KUBERNETES)
    if not todo:
        return
    module = SOURCES / "kubernetes"
    source = f"k8s.io/kubernetes@v{KUBERNETES}"
    _module(module, f"replace (\n{_released_staging(source)})\n")
    paths = [f"k8s.io/kubernetes/cmd/{name}" for name in todo]
    _go(module, "get", *(f"{path}@v{KUBERNETES}" for path in paths))
    minor = KUBERNETES.split(".")[1]
    # a build without these says its version is "$Format…", and Knative refuses to start on that
    base, client = "k8s.io/component-base/version", "k8s.io/client-go/pkg/version"
    facts = {
        f"{base}.gitVersion": f"v{KUBERNETES}",
        f"{base}.gitMajor": "1",
        f"{base}.gitMinor": minor,
        f"{base}.gitCommit": "unknown",
        f"{base}.buildDate": "1970-01-01T00:00:00Z",
        f"{client}.gitVersion": f"v{KUBERNETES}",
    }
    flags = " ".join(["-s -w", *(f"-X {key}={value}" for key, value in facts.items())])
    _build(module, paths, flags)
    _stamps(todo, KUBERNETES)


def serving(commands: Iterable[str] = (*SERVING_COMMANDS, *TEST_IMAGES)) -> None:
    """Build Knative Serving's commands and test programs, and the pause program."""
    todo = [path for path in commands if missing([program(path)], SERVING)]
    module = serving_module()
    if todo:
        paths = [
            f"{'cmd' if name in SERVING_COMMANDS else 'test/test_images'}/{name}" for name in todo
        ]
        _go(module, "get", *(f"knative.dev/serving/{path}@v{SERVING}" for path in paths))
        _build(module, [f"knative.dev/serving/{path}" for path in paths], "-s -w")
        _stamps(map(program, todo), SERVING)
    if missing(["pause"], "1"):
        folder = SOURCES / "pause"
        _module(folder, "")
        (folder / "main.go").write_text(PAUSE)
        _build(folder, ["."], "-s -w")
        _stamps(["pause"], "1")


def program(path: str) -> str:
    """The name of what is built from a folder."""
    return path.rpartition("/")[2]


def suite(which: str) -> Path:
    """One of SUITES as a test executable. Some two minutes, cold."""
    name, package = f"{which}.test", f"knative.dev/serving/{SUITES[which]}"
    if missing([name], SERVING):
        module = serving_module()
        _go(module, "get", "-t", f"{package}@v{SERVING}")
        _go(module, "test", "-c", "-tags", "e2e", "-o", str(BIN / name), package)
        _stamps([name], SERVING)
    return BIN / name


def serving_module() -> Path:
    """The module of tools that requires Serving; its go.mod pins networking, caching and pkg."""
    module = SOURCES / "serving"
    if not (module / "go.mod").exists():
        _module(module, "")
        _go(module, "get", f"knative.dev/serving@v{SERVING}")
    return module


def module_folder(path: str) -> Path:
    """Where the sources of a module that Serving requires are, in the version it requires."""
    module = serving_module()
    _go(module, "mod", "download", path)
    out = _go(module, "list", "-m", "-json", path)
    return Path(json.loads(out)["Dir"])


def _released_staging(source: str) -> str:
    """`k8s.io/kubernetes` replaces its libraries by folders that its module does not contain;
    replace them by the same libraries as they were released."""
    out = subprocess.run(
        [*_nice(), "go", "mod", "download", "-json", source],
        cwd="/",
        env=_environment(),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    text = Path(json.loads(out)["GoMod"]).read_text()
    names = re.findall(r"^\t(k8s\.io/[a-z0-9-]+) => \./staging", text, re.MULTILINE)
    version = "v0." + KUBERNETES.split(".", 1)[1]
    return "".join(f"\t{name} => {name} {version}\n" for name in names)


def _module(folder: Path, more: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "go.mod").write_text(f"module weir.test/{folder.name}\n\ngo 1.25\n\n{more}")


def _build(module: Path, paths: list[str], flags: str) -> None:
    BIN.mkdir(parents=True, exist_ok=True)
    _go(module, "build", "-trimpath", "-ldflags", flags, "-o", f"{BIN}/", *paths)


def _go(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [*_nice(), "go", *arguments],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"go {' '.join(arguments)} (in {folder}) failed:\n{result.stderr[-4000:]}")
    return result.stdout


def _environment() -> dict[str, str]:
    if not shutil.which("go"):
        raise SystemExit("the test cluster is built from Go sources, and there is no `go` in PATH")
    return {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}


def _nice() -> list[str]:
    return ["nice", "-n", "15"]


def _stamp(name: str) -> str:
    stamp = BIN / f".{name}.version"
    return stamp.read_text() if stamp.exists() and (BIN / name).exists() else ""


def _stamps(names: Iterable[str], version: str) -> None:
    for name in names:
        (BIN / f".{name}.version").write_text(version)
