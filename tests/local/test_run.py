"""`weir run`, end to end: real broker, real function, real steered connections, all of it real."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.local.conftest import EXAMPLE, FUNCTION, ROOT, Run, Starter, left_behind

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a pod of its own needs root")
# somebody without rights, who may still read where the tests' Python is installed
NOBODY = (
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
needs_setpriv = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="becoming nobody needs root"
)
FLEET = ("--devices", "5", "--interval", "0.02")


def ended(run: Run) -> int:
    return run.process.wait(60)


@needs_root
def test_every_event_arrives_over_the_direct_path_and_all_counts_agree(weir_run: Starter) -> None:
    run = weir_run(*FLEET, "--for", "4", "--verify", "/count")
    summary = run.summary()
    assert summary["problems"] == [], run.notes.read_text()
    assert ended(run) == 0
    assert summary["published"] > 100
    assert summary["delivered"] == summary["published"] == summary["function_count"]
    # the very first go through the relay, while the pod is being asked for its direct port
    assert summary["direct_requests"] + summary["relayed_requests"] == summary["published"]
    assert summary["direct_requests"] > 0.9 * summary["published"]
    assert summary["path"] == "direct"
    assert left_behind(run.process.pid) == []


def test_without_a_pod_every_event_arrives_through_the_relay(weir_run: Starter) -> None:
    run = weir_run(*FLEET, "--no-pod", "--for", "4", "--verify", "/count")
    summary = run.summary()
    assert summary["problems"] == [], run.notes.read_text()
    assert ended(run) == 0
    assert summary["delivered"] == summary["published"] == summary["function_count"]
    assert summary["relayed_requests"] == summary["published"]
    assert summary["direct_requests"] == 0
    assert "plain process" in run.notes.read_text()


@needs_root
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_a_go_function_listens_by_mptcp_and_is_steered_all_the_same(
    weir_run: Starter, tmp_path: Path
) -> None:
    binary = tmp_path / "function"
    subprocess.run(
        ["go", "build", "-o", str(binary), "."], cwd=ROOT / "examples/telemetry-go", check=True
    )
    run = weir_run(*FLEET, "--for", "4", "--verify", "/count", command=(str(binary),))
    summary = run.summary()
    assert summary["problems"] == [], run.notes.read_text()
    assert summary["counted"] == summary["function_count"] == summary["published"]
    assert summary["direct_requests"] > 0.9 * summary["published"]


@needs_root
def test_ctrl_c_drains_and_leaves_nothing_behind(weir_run: Starter) -> None:
    run = weir_run(*FLEET, "--verify", "/count")
    run.until(lambda s: s["delivered"] > 50)
    summary = run.stop()
    assert summary["problems"] == [], run.notes.read_text()
    assert summary["delivered"] == summary["published"] == summary["function_count"]
    assert ended(run) == 0
    assert left_behind(run.process.pid) == []


@needs_root
def test_what_a_killed_run_left_is_removed_by_the_next(weir_run: Starter) -> None:
    killed = weir_run(*FLEET)
    killed.until(lambda s: s["delivered"] > 0)
    killed.process.kill()
    killed.process.wait()
    run = weir_run(*FLEET, "--for", "1")
    assert run.summary()["problems"] == [], run.notes.read_text()
    assert ended(run) == 0
    assert left_behind(killed.process.pid) == []


def test_a_function_that_crashes_is_started_again_and_nothing_is_lost(
    weir_run: Starter, tmp_path: Path
) -> None:
    once = tmp_path / "once"
    command = (
        f"test -e {once} && exec {sys.executable} {EXAMPLE}/function.py; "
        f"touch {once}; {sys.executable} {EXAMPLE}/function.py & sleep 6; kill -9 $!; exit 3"
    )
    run = weir_run(*FLEET, command=("sh", "-c", command))
    run.until(lambda s: "exited with status 3" in run.notes.read_text())
    seen = run.samples[-1]["delivered"]
    run.until(lambda s: s["delivered"] > seen + 50)
    summary = run.stop()
    assert summary["delivered"] >= summary["published"]
    assert summary["unacknowledged"] == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("/no/such/function",), ["can't start '/no/such/function'", "status 127"]),
        ((sys.executable, "-c", "import nosuchmodule"), ["nosuchmodule", "ended at its start"]),
    ],
)
def test_a_function_that_can_not_start_is_told_with_its_own_words(
    weir_run: Starter, command: tuple[str, ...], words: list[str]
) -> None:
    run = weir_run(command=command)
    assert ended(run) == 1
    for word in words:
        assert word in run.notes.read_text()
    assert left_behind(run.process.pid) == []


def test_wrong_routes_are_told_before_anything_is_started(tmp_path: Path) -> None:
    routes = tmp_path / "routes.yaml"
    routes.write_text("routes:\n  - filter: a/#\n    snik: function\n")
    result = subprocess.run(
        [sys.executable, "-P", "-m", "weir", "run", "--routes", str(routes), "--", "true"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "snik" in result.stderr
    assert str(routes) in result.stderr


def test_the_live_view_is_plain_lines_when_there_is_no_terminal(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "weir", "run", "--routes", str(EXAMPLE / "routes.yaml")),
            *("--state", str(tmp_path), *FLEET, "--for", "2.5", "--no-pod", "--"),
            *(sys.executable, str(EXAMPLE / "function.py")),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "events/s" in result.stdout
    assert "every event was delivered" in result.stdout


@needs_root
def test_the_doctor_steers_a_connection_and_counts_it() -> None:
    result = subprocess.run(
        [sys.executable, "-P", "-m", "weir", "doctor", "--json"], capture_output=True, text=True
    )
    findings = {f["name"]: f for f in json.loads(result.stdout)}
    assert findings["direct path"]["ok"], findings
    assert result.returncode == 0


@needs_setpriv
def test_the_doctor_without_root_names_the_fix() -> None:
    result = subprocess.run(
        [*NOBODY, sys.executable, "-P", "-m", "weir", "doctor"], capture_output=True, text=True
    )
    assert result.returncode == 1, result.stderr
    assert "sudo weir" in result.stdout


@needs_setpriv
def test_an_ordinary_user_gets_every_event_through_the_relay(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    result = subprocess.run(
        [
            *(*NOBODY, sys.executable, "-P", "-m", "weir", "run", "--json", "--verify", "/count"),
            *("--routes", str(EXAMPLE / "routes.yaml"), "--state", str(tmp_path / "state")),
            *(*FLEET, "--for", "3", "--", sys.executable, str(EXAMPLE / "function.py")),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not root" in result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])["summary"]
    assert summary["relayed_requests"] == summary["published"] == summary["function_count"] > 0


def test_signals_before_the_start_is_over_end_it_cleanly(weir_run: Starter) -> None:
    run = weir_run(command=("sleep", "100"))  # never ready
    while "pod" not in run.notes.read_text() and "process" not in run.notes.read_text():
        assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    assert ended(run) == 130
    assert left_behind(run.process.pid) == []


def test_what_a_function_does_not_take_in_one_run_is_delivered_in_the_next(
    weir_run: Starter, tmp_path: Path
) -> None:
    busy = tmp_path / "busy.py"
    busy.write_text(
        "import http.server, os\n"
        "class Busy(http.server.BaseHTTPRequestHandler):\n"
        "    def do_POST(self): self.send_error(503)\n"
        "    def log_message(self, *_): pass\n"
        "http.server.ThreadingHTTPServer(('', int(os.environ['PORT'])), Busy).serve_forever()\n"
    )
    first = weir_run(*FLEET, "--for", "3", command=(sys.executable, str(busy)))
    refused = first.summary()
    assert refused["delivered"] == 0
    assert refused["unacknowledged"] > 0
    assert "blocked" in refused["session"]
    assert any("undelivered" in problem for problem in refused["problems"])
    assert ended(first) == 1
    second = weir_run("--verify", "/count")
    second.until(lambda s: s["delivered"] >= refused["published"])
    summary = second.stop()
    assert summary["problems"] == []
    assert summary["delivered"] == summary["function_count"] == refused["published"]


@pytest.mark.parametrize("arguments", [("--no-pod",), pytest.param((), marks=needs_root)])
def test_a_killed_relay_worker_costs_no_event(
    weir_run: Starter, arguments: tuple[str, ...]
) -> None:
    run = weir_run(*FLEET, *arguments)
    run.until(lambda s: s["delivered"] > 20)
    workers = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _is_worker_of(entry, run.process.pid)
    ]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    seen = run.samples[-1]["delivered"]
    run.until(lambda s: s["delivered"] > seen + 100)
    summary = run.stop()
    assert summary["unacknowledged"] == summary["quarantined"] == 0
    assert summary["delivered"] >= summary["published"]


def test_a_frozen_function_makes_events_wait_and_loses_none(
    weir_run: Starter, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    command = ("sh", "-c", f"echo $$ > {pid_file}; exec {' '.join(FUNCTION)}")
    run = weir_run(*FLEET, "--verify", "/count", command=command)
    run.until(lambda s: s["delivered"] > 20)
    function = int(pid_file.read_text())
    os.kill(function, signal.SIGSTOP)
    run.until(lambda s: s["unacknowledged"] > 20)
    os.kill(function, signal.SIGCONT)
    run.until(lambda s: s["unacknowledged"] < 10)
    summary = run.stop()
    assert summary["problems"] == [], run.notes.read_text()
    assert summary["delivered"] == summary["published"] == summary["function_count"]


def _is_worker_of(entry: Path, run: int) -> bool:
    """Whether /proc/PID is a relay worker whose agent belongs to the run."""
    try:
        if "weir.proxy.worker" not in (entry / "cmdline").read_text():
            return False
        agent = _parent(entry)
        return _parent(Path(f"/proc/{agent}")) == run
    except OSError:
        return False


def _parent(entry: Path) -> int:
    (line,) = (x for x in (entry / "status").read_text().splitlines() if x.startswith("PPid:"))
    return int(line.split()[1])


@pytest.mark.skipif(
    shutil.which("mosquitto", path="/usr/sbin:/usr/bin") is None, reason="mosquitto"
)
def test_a_broker_that_dies_ends_the_run_with_its_name(weir_run: Starter) -> None:
    run = weir_run(*FLEET)
    run.until(lambda s: s["delivered"] > 0)
    (mosquitto,) = (
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _is_mosquitto_of(entry, run.process.pid)
    )
    os.kill(mosquitto, signal.SIGKILL)
    assert ended(run) == 1
    assert "error: broker ended" in run.notes.read_text()
    assert "Traceback" not in run.notes.read_text()
    assert left_behind(run.process.pid) == []


@needs_root
def test_a_closed_terminal_is_a_stop_like_any_other(weir_run: Starter) -> None:
    run = weir_run(*FLEET)
    run.until(lambda s: s["delivered"] > 0)
    run.process.send_signal(signal.SIGHUP)
    assert run.summary()["problems"] == []
    assert ended(run) == 0
    assert left_behind(run.process.pid) == []


def _is_mosquitto_of(entry: Path, run: int) -> bool:
    try:
        command = (entry / "cmdline").read_text().split("\0")[0]
        return command.endswith("mosquitto") and _parent(entry) == run
    except OSError:
        return False
