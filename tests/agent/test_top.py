"""`weir top` over a real agent."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.agent.test_agent import DATA_PORT, agent_for, described, get, start_app
from tests.pods import DIRECT_PORT, Pod, needs_kernel, until

pytestmark = needs_kernel


def command(tmp_path: Path, *options: str) -> list[str]:
    socket = str(tmp_path / "agent.sock")
    return [sys.executable, "-P", "-m", "weir", "top", "--status", socket, *options]


def once(tmp_path: Path) -> dict[str, Any]:
    text = subprocess.check_output(command(tmp_path, "--once", "--json", "--interval", "0.1"))
    (row,) = json.loads(text)["pods"]
    assert isinstance(row, dict)
    return row


def test_the_table_shows_what_the_agent_counts_and_outlives_it(tmp_path: Path) -> None:
    with Pod() as pod, agent_for(tmp_path, described(pod)) as agent:
        row = once(tmp_path)
        assert (row["pod"], row["state"]) == (pod.name, "not ready")
        assert row["direct"]
        start_app(pod)
        agent.until_offered()
        with subprocess.Popen(
            command(tmp_path, "--json", "--interval", "0.2"), stdout=subprocess.PIPE, text=True
        ) as top:
            try:
                assert top.stdout is not None
                lines = map(json.loads, top.stdout)
                next(lines)
                get(pod.address, DIRECT_PORT)
                get(pod.address, DATA_PORT)
                seen: set[str] = set()
                while seen != {"direct_rate", "relayed_rate"}:
                    (row,) = next(lines)["pods"]
                    seen |= {name for name in ("direct_rate", "relayed_rate") if row[name]}
                assert (row["state"], row["direct"]) == ("ready", "")
                assert row["direct_p99"] > 0
                assert agent.stop()[0] == 0
                while "error" not in (line := next(lines)):
                    pass
                assert str(tmp_path / "agent.sock") in line["error"]
            finally:
                top.kill()


def test_on_a_terminal_it_redraws_sorts_by_keys_and_gives_the_terminal_back(tmp_path: Path) -> None:
    with Pod() as pod, agent_for(tmp_path, described(pod)):
        controller, terminal = pty.openpty()
        with subprocess.Popen(
            command(tmp_path, "--interval", "0.1"),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "40"},
        ) as top:
            os.close(terminal)
            shown = bytearray()

            def drawn(text: str, times: int = 1) -> bool:
                while select.select([controller], [], [], 0)[0]:
                    shown.extend(os.read(controller, 65536))
                return shown.count(text.encode()) >= times

            try:
                until(lambda: drawn(pod.name, 2), "the table is drawn and drawn again")
                assert not drawn("by waiting")
                os.write(controller, b"w")
                until(lambda: drawn("by waiting"), "the key is heard")
                os.write(controller, b"q")
                while True:
                    try:
                        shown.extend(os.read(controller, 65536))
                    except OSError:  # the last one has closed it
                        break
                assert top.wait() == 0
            finally:
                if top.poll() is None:
                    top.kill()
                os.close(controller)
        assert b"\x1b[?1049l" in shown  # the screen of before
