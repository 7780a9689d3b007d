"""Run pytest; what failed beside other tests is run once more, alone.

Tests here start trainings, clusters and containers of their own, several at a time on a few cores: a machine that is
late can fail a test that is right. A test that fails alone too has found something, and so has a run in which more
than a few fail. Both reports are printed, and what passed only alone is named at the end: it is to be looked at.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

MOST = 6
"""So many may fail in a run and still be run again."""


def failed(report: Path) -> list[str]:
    """Return which tests a JUnit report says have failed, as pytest takes them."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return sorted({f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}" for case in bad})


def main(arguments: Sequence[str], report: Path) -> int:
    """Run the tests, and once more those few that failed.

    Args:
        arguments: Of pytest.
        report: Where its report goes.

    Returns:
        pytest's exit code: that of the second run if there was one.
    """
    report.unlink(missing_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
    code = subprocess.run([*pytest, *arguments], check=False).returncode
    if code != 1 or not report.exists():
        return code
    names = failed(report)
    if not 0 < len(names) <= MOST:
        return code
    print(f"\n{len(names)} failed beside other tests; once more, alone:", flush=True)
    again = subprocess.run([*pytest, *names], check=False).returncode
    if again == 0:
        print("passed alone, failed beside others: " + ", ".join(names), flush=True)
    return again


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(".pytest_cache/tests.xml")))
