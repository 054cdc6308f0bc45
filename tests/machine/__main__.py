"""`python -m tests.machine [VERSION…] [-- PYTEST ARGUMENTS]`: boots, runs, and a table of it."""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.machine.boot import REPOSITORY, boot
from tests.machine.packages import CACHE, Failed, Kernel, kernel

VERSIONS = ("5.10", "6.1", "6.12", "newest")
INSIDE = "tests/machine/inside.py"
# all that asks the kernel for something; a million requests take too long when emulated
EVERYTHING = (INSIDE, "tests/kernel", "--ignore=tests/kernel/test_million.py")
# a limit for hangs: an emulated processor is twenty times slower
PATIENCE = "--timeout=1200"
_TROUBLE = re.compile(r".*(BUG:|WARNING:|Oops|Call Trace|INFO: task|rcu.*stall).*")


@dataclass(frozen=True)
class Result:
    release: str
    passed: int
    failed: list[str]
    skipped: int
    notes: list[str]
    seconds: float


def main(arguments: list[str]) -> int:
    told, for_pytest = _split(arguments)
    parser = argparse.ArgumentParser("python -m tests.machine", description=__doc__)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="5.10, 6.1, newest, ...")
    parser.add_argument("--smoke", action="store_true", help=f"{INSIDE} alone")
    parser.add_argument("--accel", default="tcg", help="kvm, where it boots (default: tcg)")
    parser.add_argument("--append", default="", help="to the kernel's command line")
    parser.add_argument("--hours", type=float, default=2, help="for one kernel at most")
    options = parser.parse_args(told)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    tests = for_pytest or ([INSIDE] if options.smoke else list(EVERYTHING))
    results, broken = [], 0
    for version in options.versions or VERSIONS:
        try:
            result = _run(version, tests, options.hours * 3600, options.accel, options.append)
        except Failed as failure:
            print(f"{version}: {failure}", file=sys.stderr, flush=True)
            broken += 1
            continue
        _print(result)
        results.append(result)
    print(f"\n{'kernel':<26}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
    for result in results:
        print(
            f"{result.release:<26}{result.passed:>8}{len(result.failed):>8}"
            f"{result.skipped:>8}{result.seconds:>9.0f}"
        )
    return 1 if broken or any(result.failed for result in results) else 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _run(version: str, tests: list[str], seconds: float, accel: str, parameters: str) -> Result:
    found = kernel(version)
    out = CACHE / "results" / found.version
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Failed("another run of it is going on") from error
        return _run_in(out, found, tests, seconds, accel, parameters)


def _run_in(
    out: Path, found: Kernel, tests: list[str], seconds: float, accel: str, parameters: str
) -> Result:
    for name in ("console", "dmesg", "junit.xml", "status"):
        (out / name).unlink(missing_ok=True)
    (out / "arguments").write_text(json.dumps([PATIENCE, *tests]))
    print(f"Linux {found.release}: {' '.join(tests)} (tail -f {out}/console)", flush=True)
    start = time.monotonic()
    python = REPOSITORY / ".venv/bin/python"
    boot(found, (python, "-m", "tests.machine.guest"), out, seconds, accel, parameters)
    if not (out / "status").exists():
        last = "\n".join((out / "console").read_text(errors="replace").splitlines()[-20:])
        raise Failed(f"the machine ended before its tests did, see {out}/console:\n{last}")
    return _read(found.release, out, time.monotonic() - start)


def _read(release: str, out: Path, seconds: float) -> Result:
    passed, failed, notes = 0, [], []
    skipped: Counter[str] = Counter()
    for case in ElementTree.parse(out / "junit.xml").iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        notes += [f"{p.get('name')}: {p.get('value')}" for p in case.iter("property")]
        problem = next((e for e in case if e.tag in ("failure", "error")), None)
        if problem is not None:
            failed.append(f"{name}: {(problem.get('message') or '').partition(chr(10))[0]}")
        elif (why := case.find("skipped")) is not None:
            skipped[why.get("message") or "no reason given"] += 1
        else:
            passed += 1
    notes += [f"skipped: {count} because {why}" for why, count in skipped.items()]
    status = (out / "status").read_text()
    if (status != "0" or not passed) and not failed:
        failed.append(f"pytest ended with {status}, {passed} passed, see {out}/console")
    for line in (out / "dmesg").read_text(errors="replace").splitlines():
        if _TROUBLE.fullmatch(line):
            failed.append(f"dmesg: {line}")
    return Result(release, passed, failed, skipped.total(), notes, seconds)


def _print(result: Result) -> None:
    for note in result.notes:
        print(f"  {note}")
    for failure in result.failed:
        print(f"  FAILED {failure}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
