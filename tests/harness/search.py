"""Search for what breaks a property: `python -m tests.harness.search [SEED] [--for SECONDS]`.

`make test` tries the same examples every time. Here the property tests get others, in another order: those of a seed,
then those of the next, until the time is up. What a seed has found it finds again; its number is printed first.
"""

import argparse
import datetime
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

UNTIL = "TESTS_UNTIL"
"""When a test may begin at the latest, by time.time()."""
DEADLINE = float(os.environ.get(UNTIL, "inf"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let every test be among the first some day."""
    random.Random(config.getoption("--hypothesis-seed")).shuffle(items)


def pytest_runtest_setup() -> None:
    """Begin nothing more when the time is up."""
    if time.time() > DEADLINE:
        pytest.skip("the time is up")


def main() -> int:
    """Search until something is found or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, help="the first one; that of the day where none is given")
    parser.add_argument("--for", dest="limit_s", type=float, default=120.0, metavar="SECONDS")
    own = parser.parse_args()
    seed = own.seed if own.seed is not None else int(f"{datetime.datetime.now(datetime.UTC):%Y%m%d}00")
    files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "from hypothesis " in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.harness.search", "-n", "2", "--dist", "worksteal"]
    command += ["-m", "hypothesis and not slow", "--hypothesis-profile=search", *files]
    until, code = time.time() + own.limit_s, 0
    while not code and time.time() < until:
        print(f"to search here again: make search SEED={seed}", flush=True)
        environment = os.environ | {UNTIL: str(until)}
        code = subprocess.run([*command, f"--hypothesis-seed={seed}"], env=environment, check=False).returncode
        seed += 1
    return code


if __name__ == "__main__":
    sys.exit(main())
