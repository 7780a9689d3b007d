"""The fault plan of several processes: who gets the notice (one, some, all of 2 and of 4) x the phase it comes in.

Here: a training thread that is stuck (what is stuck waits for minutes, so that only the guard can end it), the middle
of a restore, of a save, of a commit and of retention. In tests/training/test_group.py: the steps, while processes drift
apart; in tests/training/test_many.py: imports.
"""

import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobkit import contract
from jobkit.rundir import commits
from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
from tests.harness import training
from tests.harness.jobs import until
from tests.training.test_group import STEPS, logs

GRACE_S = 9.0


@dataclass
class Stuck:
    """A hook: some processes get stuck at a point, and some get a notice while they are.

    Args:
        point: 'begin' of a step (waiting for data, or compiling), 'step' (its end: evaluating) or 'restoring'.
        step: Completed steps when it happens.
        stuck: Which processes wait.
        noticed: Which processes get SIGTERM.
        slow_s: What each process sleeps per step, times its index: they drift apart as far as they can.
    """

    point: str
    step: int
    stuck: tuple[int, ...]
    noticed: tuple[int, ...]
    slow_s: float = 0.0

    def __call__(self, point: str, run: Any) -> None:
        """Pass a point."""
        import jax

        index = jax.process_index()
        if point == "step":
            time.sleep(self.slow_s * index)
        if point == self.point and run.step == self.step and index in {*self.stuck, *self.noticed}:
            if index in self.noticed:
                os.kill(os.getpid(), signal.SIGTERM)
            if index in self.stuck:
                time.sleep(600)


CASES: dict[str, tuple[int, Stuck]] = {
    "alone, waiting for data": (1, Stuck("begin", 12, (0,), (0,))),
    "alone, evaluating": (1, Stuck("step", 12, (0,), (0,))),
    "alone, compiling": (1, Stuck("begin", 0, (0,), (0,))),
    "one of two waits for data and is told": (2, Stuck("begin", 12, (1,), (1,))),
    "one of two waits for data, the other is told": (2, Stuck("begin", 12, (1,), (0,))),
    "both of two evaluate, the first is told": (2, Stuck("step", 12, (0, 1), (0,))),
    "both of two compile": (2, Stuck("begin", 0, (0, 1), (0, 1))),
    "one of two waits behind a save in flight": (2, Stuck("begin", 10, (0,), (1,))),
    "two of four wait, drifted apart, and one is told": (4, Stuck("begin", 12, (1, 3), (3,), 0.02)),
    "all of four evaluate and all are told": (4, Stuck("step", 12, (0, 1, 2, 3), (0, 1, 2, 3))),
    "one of two is in its last step and is told": (2, Stuck("step", STEPS - 1, (1,), (1,))),
}
"""How many processes, and what happens to them."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Train without interruption in 1, 2 and 4 processes; return the digests of the ends."""
    found = {}
    for count in (1, 2, 4):
        url = tmp_path_factory.mktemp("undisturbed") / "run"
        assert training.join_many(training.start_many(url, count, steps=STEPS)) == [0] * count, logs(url)
        found[count] = training.digest(url)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_last_boundary_is_saved(case: str, tmp_path: Path, undisturbed: dict[int, str]) -> None:
    """Stuck between two boundaries, whoever is told: the last boundary is committed under the deadline, 75 for all."""
    count, hook = CASES[case]
    url = tmp_path / "run"
    grace = {contract.ENV_GRACE: f"{GRACE_S}"}
    started = training.start_many(url, count, steps=STEPS, hook=hook, pause_s=0.1, environment=grace)
    assert training.join_many(started) == [75] * count, logs(url)
    store = Store(url)
    stopped = [event for event in read_events(store) if event["event"] == "stopped"]
    assert [event["step"] for event in stopped] == [hook.step] * count
    assert commits.steps(store)[-1] == hook.step
    assert all(event["notice_to_commit_s"] < GRACE_S for event in stopped)
    assert not any("why" in event for event in stopped)
    assert any(event["event"] == "plan" and event["by"] == "guard" for event in read_events(store))
    assert training.join_many(training.start_many(url, count, steps=STEPS)) == [0] * count, logs(url)
    assert training.digest(url) == undisturbed[count]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Train the first 10 steps in 2 and in 4 processes; return the run directories, to copy."""
    found = {}
    for count in (2, 4):
        found[count] = tmp_path_factory.mktemp("begun") / "run"
        assert training.join_many(training.start_many(found[count], count, steps=10)) == [0] * count
    return found


RESTORING: dict[str, tuple[int, Stuck]] = {
    "one of two": (2, Stuck("restoring", 0, (), (1,))),
    "the first of two": (2, Stuck("restoring", 0, (), (0,))),
    "some of four, one of which is stuck": (4, Stuck("restoring", 0, (2,), (2, 3))),
    "all of four, and all are stuck": (4, Stuck("restoring", 0, (0, 1, 2, 3), (0, 1, 2, 3))),
}
"""How many processes, and what happens to them while they restore step 10."""


@pytest.mark.slow
@pytest.mark.parametrize("case", RESTORING)
def test_a_notice_while_they_restore(
    case: str, tmp_path: Path, begun: dict[int, Path], undisturbed: dict[int, str]
) -> None:
    """In the middle of a restore: all stop at the restored step or right behind it, under the deadline, 75 for all."""
    count, hook = RESTORING[case]
    url = Path(shutil.copytree(begun[count], tmp_path / "run"))
    grace_s = 8.0
    started = training.start_many(url, count, steps=STEPS, hook=hook, environment={contract.ENV_GRACE: f"{grace_s}"})
    assert training.join_many(started) == [75] * count, logs(url)
    stopped = [event for event in read_events(Store(url)) if event["event"] == "stopped"]
    steps = [event["step"] for event in stopped]
    assert steps == [commits.steps(Store(url))[-1]] * count
    assert steps[0] == 10 or (steps[0] == 11 and not hook.stuck)
    assert all(event["notice_to_commit_s"] < grace_s for event in stopped)
    assert not any("why" in event for event in stopped)
    assert training.join_many(training.start_many(url, count, steps=STEPS)) == [0] * count, logs(url)
    assert training.digest(url) == undisturbed[count]


ONE, FIRST, ALL = (1,), (0,), (0, 1, 2, 3)
MIDDLE: dict[str, tuple[str, Sequence[int]]] = {
    "data is written, one of two": ("during_write", ONE),
    "data is written, all of four": ("during_write", ALL),
    "before the commit, the first of two": ("before_rename", FIRST),
    "before the commit, one of two": ("before_rename", ONE),
    "an old step goes, one of two": ("before_retention", ONE),
    "an old step goes, all of four": ("before_retention", ALL),
}
"""Where in a save, and who is told."""


@pytest.mark.slow
@pytest.mark.parametrize("case", MIDDLE)
def test_a_notice_in_the_middle_of_a_save(case: str, tmp_path: Path, undisturbed: dict[int, str]) -> None:
    """While data is written, before the commit, while an old step goes: one step for all, committed, and bit-equal."""
    point, told = MIDDLE[case]
    count, url = 2 if len(told) < 2 else 4, tmp_path / "run"
    # Who comes to the point in the save of step 20 stops there, until the notice is given.
    halts = {contract.ENV_FAULT: f"{point}:3=STOP"}
    started = training.start_many(url, count, steps=STEPS, pause_s=0.15, environment=halts)
    pids = [process.pid or 0 for process in started]
    those = pids if point == "during_write" else pids[:1]
    until(lambda: all(_halted(pid) for pid in those), f"they come to {point}", seconds=90)
    for index in told:
        os.kill(pids[index], signal.SIGTERM)
    for pid in those:
        os.kill(pid, signal.SIGCONT)
    assert training.join_many(started) == [75] * count, logs(url)
    store = Store(url)
    stopped = [event["step"] for event in read_events(store) if event["event"] == "stopped"]
    assert stopped == [commits.steps(store)[-1]] * count
    assert 20 <= stopped[0] < STEPS
    assert training.join_many(training.start_many(url, count, steps=STEPS)) == [0] * count, logs(url)
    assert training.digest(url) == undisturbed[count]


def _halted(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
