"""A run of very many attempts: what looking at it reads does not grow with them, or grows no faster than they do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.lifecycle.history import read_history
from tests.harness import ledgers

COUNT = """
import collections, json, sys
opened = collections.Counter()
def hook(event, args):
    # Without a mode it is the os.open of an opener, for one that is counted already.
    if event == "open" and args[1] and isinstance(args[0], str) and args[0].startswith(sys.argv[-1] + "/"):
        opened[args[0]] += 1
sys.addaudithook(hook)
from launch.cli.main import main
try:
    main()
finally:
    print(json.dumps(opened), file=sys.stderr)
"""


def opened(*words: str) -> dict[str, int]:
    """Return which files of a run a command opens, and how often."""
    done = subprocess.run([sys.executable, "-c", COUNT, *words], capture_output=True, text=True, check=True)
    return dict[str, int](json.loads(done.stderr.splitlines()[-1]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ledgers.Written:
    """A run of 500 attempts."""
    return ledgers.many(tmp_path_factory.mktemp("many") / "run", 500, events=60)


def test_a_status_reads_the_newest_attempts_alone(run: ledgers.Written) -> None:
    """Of hundreds of attempts a status, which is asked for four times a second, opens what the newest hundred wrote."""
    found = opened("status", str(run.path))
    old = [name for name in found if "/attempts/" in name and int(name.split("/attempts/")[1].split("/")[0]) < 400]
    assert old == []
    assert sum(found.values()) < 700


@pytest.mark.slow
@pytest.mark.parametrize("command", ["report", "explain"])
def test_a_report_reads_each_ledger_once(run: ledgers.Written, command: str) -> None:
    """Beside what the status reads, each file of an attempt is opened once."""
    found = opened(command, str(run.path))
    old = {name: count for name, count in found.items() if "/attempts/3" in name}
    assert max(old.values()) == 1


def logged(events: list[dict[str, Any]]) -> list[int]:
    """Return the steps of the logged values."""
    return [event["step"] for event in events if event["event"] == "metrics"]


def test_history_has_room_for_thousands(run: ledgers.Written, tmp_path: Path) -> None:
    """The more attempts, the fewer logged values of each are held: the last one always, and all other events."""
    few = ledgers.many(tmp_path / "few", 2, events=60)
    whole, thin = (read_history(one.store, curves=False).lives[1] for one in (few, run))
    assert len(logged(whole.program)) == 48
    assert 20 <= len(logged(thin.program)) <= 41
    assert logged(thin.program)[-1] == logged(whole.program)[-1]
    others = [[event for event in life.program if event["event"] != "metrics"] for life in (whole, thin)]
    assert others[0] == others[1]
    assert thin.outcome == whole.outcome
