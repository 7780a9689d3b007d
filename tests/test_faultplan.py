"""A notice while the training thread is stuck: the last boundary is saved when the deadline demands, by all processes.

Together with tests/test_group.py the fault plan of several processes: who gets the notice (one, some, all of 2 and of
4) x the phase it comes in. What is stuck waits for minutes, so that only the guard can end it.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobkit import commits, contract
from jobkit.ledger import read_events
from jobkit.storage import Store
from tests import training
from tests.test_group import STEPS, logs

GRACE_S = 12.0


@dataclass
class Stuck:
    """A hook: some processes get stuck at a point, and some get a notice while they are.

    Args:
        point: 'begin' of a step (waiting for data, or compiling) or 'step' (its end: evaluating).
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
    started = training.start_many(url, count, steps=STEPS, hook=hook, pause_s=0.03, environment=grace)
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
