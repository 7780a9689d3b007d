"""Run pytest so that a failure is told from a race: `python -m tests.harness.classify ARGUMENTS`, with those of pytest.

Tests here start trainings, clusters and containers of their own, several at a time on a few cores. Those whose subject
is time (the mark `timing`) run first, in one process and with nothing beside them. What fails, there or among the
others, is run once more, alone, to learn what it is:

- It fails again, or more than a few have failed: the build fails.
- It passes: it is flaky, and named at the end. The first time that does not fail the build; it belongs into a list.
- It stands in that list, `flaky.txt`: the build fails. A known race is to be mended, not to be run until it is won.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

MOST = 6
"""So many may fail in a run and still be run again."""
NONE_CHOSEN = 5
"""pytest's exit code where it had nothing to run."""
FLAKY = Path("tests/flaky.txt")
REPORT = Path(".pytest_cache/tests.xml")


def listed(path: Path) -> set[str]:
    """Return the tests that a list names, one a line; a line that begins with # names none."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def failed(report: Path) -> list[str]:
    """Return which tests a JUnit report says have failed, as pytest takes them."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return sorted({f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}" for case in bad})


def run(*arguments: str) -> tuple[int, list[str]]:
    """Run pytest; return its exit code and the tests that failed."""
    REPORT.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={REPORT}", *arguments]
    code = subprocess.run(command, check=False).returncode
    return code, failed(REPORT) if code == 1 and REPORT.exists() else []


def main(arguments: Sequence[str]) -> int:
    """Run the tests, those about time first, and once more those few that failed.

    Args:
        arguments: Of pytest.

    Returns:
        0 where all is well or flaky for the first time; else an exit code of pytest.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", dest="chosen", default="")
    own, others = parser.parse_known_args(arguments)
    chosen = f" and ({own.chosen})" if own.chosen else ""
    timed, alone = run(*others, "-n0", "-m", f"timing{chosen}")
    if timed not in (0, 1, NONE_CHOSEN):
        return timed
    code, beside = run(*others, "-m", f"not timing{chosen}")
    if code not in (0, 1, NONE_CHOSEN):
        return code
    bad = [*alone, *beside]
    if 1 not in (timed, code):
        return NONE_CHOSEN if timed == code == NONE_CHOSEN else 0
    if not 0 < len(bad) <= MOST:
        return 1
    print(f"\n{len(bad)} failed; once more, alone:", flush=True)
    again, broken = run(*bad)
    flaky = [name for name in bad if name not in broken] if again in (0, 1) else []
    known = listed(FLAKY)
    for name in flaky:
        what = f"is known to be flaky ({FLAKY}), and is to be mended" if name in known else f"add it to {FLAKY}"
        print(f"FLAKY: {name} failed, and passed alone: {what}", flush=True)
    return again or int(any(name in known for name in bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
