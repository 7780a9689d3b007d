"""--max-time and --max-cost: the run commits and stops for good, over all its attempts, and says why."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from launch.backends import registry
from launch.lifecycle import run_status
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec
from tests.harness import jobs
from tests.harness.jobs import Project, until_over


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project."""
    yield from jobs.project(tmp_path)


@pytest.mark.slow
def test_a_run_that_has_used_up_its_time(project: Project) -> None:
    """What attempts have taken counts together; the run saves, ends as cancelled, and goes on with a higher limit."""
    store = project.submit("step:90,commit:3,exit:75", "hold", "commit:9999999,exit:0", max_time_s=6.0, grace_s=2.0)
    over = until_over(store)
    assert (over.state, jobs.outcomes(store)) == (State.CANCELLED, ["preempted", "preempted"]), over
    assert over.reason.startswith("stopped: its 6.0 s (--max-time) are used up; continue with: jobkit resume"), over
    assert not store.exists("cancel.json")
    assert run_status.status(store).committed_step is not None
    assert sum(one.duration_s or 99.0 for one in run_status.status(store).endings) < 6.0 + 5.0
    assert "It was stopped: its 6.0 s (--max-time) are used up" in project.cli("explain", store.url).stdout
    registry.resume(store.url)  # no more time, no attempt
    assert until_over(store).attempts == 2
    done = project.cli("resume", "--wait", "--max-time", "1h", store.url)
    assert (done.returncode, specs.read(store).max_time_s) == (0, 3600.0), done.stderr


@pytest.mark.slow
def test_a_run_that_has_used_up_its_money(project: Project) -> None:
    """An hour's price makes a limit of time of one of money; whoever waits sees that it was cancelled."""
    words = ("--run", "../runs/r", "--wait", "--price-per-hour", "3600", "--max-cost", "3")
    done = project.cli("submit", *words, "--", "python", "job.py", "hold")
    assert done.returncode == 3, done.stderr
    assert "its 3 of money (--max-cost) are used up" in done.stdout


@pytest.mark.slow
def test_while_a_machine_is_off_nothing_is_used_up(project: Project) -> None:
    """An attempt that went down with its machine ended with its last sign of life; a clock that is set is no time."""
    store, hour = Store(project.runs / "r"), 3600.0
    store.make(shared=False)
    spec = project.spec("exit:9", "commit:1,exit:0", max_time_s=48 * hour, root=str(project.path))
    assert specs.create(store, spec, "local")
    began, seen = time.time() - 60 * hour, time.time() - 58 * hour
    store.write(contract.events_file(0, "supervisor"), json.dumps({"t": began, "event": "started", "pid": 1}) + "\n")
    store.write(contract.log_file(0), "step 1\n")
    for path in (store.file(contract.events_file(0, "supervisor")), store.file(contract.log_file(0))):
        os.utime(path, (seen, seen))
    clock_was_set = {"exit_code": 75, "started": began, "ended": time.time(), "duration_s": 5.0}
    store.write(f"{contract.attempt_dir(1)}/{contract.OUTCOME}", json.dumps(clock_was_set))
    registry.resume(store.url)
    over = until_over(store)
    assert (over.state, over.attempts) == (State.DONE, 3), over
    assert over.endings[0].duration_s == pytest.approx(2 * hour, abs=1.0)
    assert 0 < json.loads(store.read(f"{contract.attempt_dir(2)}/{contract.OUTCOME}"))["duration_s"] < 60


@pytest.mark.slow
def test_a_limit_hides_no_failure(project: Project) -> None:
    """A run that fails for good when hardly any of its time is left has failed, and says how."""
    over = until_over(project.submit("exit:4", max_time_s=20.0, grace_s=20.0))
    assert (over.state, over.reason.split(" (")[0]) == (State.FAILED, "failed"), over


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_cost": 3.0}, "give --price-per-hour too"),
        ({"max_time_s": 0.0}, "max-time is 0; give more than 0"),
        ({"max_cost": -1.0, "price_per_hour": 1.0}, "max-cost is -1; give more than 0"),
    ],
)
def test_limits_that_make_no_sense(fields: dict[str, Any], said: str) -> None:
    """A limit that cannot be kept is refused."""
    with pytest.raises(ConfigError, match=said):
        specs.check(JobSpec(command=("true",), **fields))


def test_what_is_used_up() -> None:
    """A limit counts once it is reached, in time or in money."""
    spec = JobSpec(command=("true",), max_time_s=7200.0, max_cost=5.0, price_per_hour=10.0)
    assert [bool(spec.used_up(spent_s)) for spent_s in (0.0, 1799.0, 1800.0)] == [False, False, True]
    free = JobSpec(command=("true",), max_cost=5.0, price_per_hour=0.0)
    specs.check(free)
    assert not free.used_up(1e9)
    assert "max-time" in JobSpec(command=("true",), max_time_s=7200.0).used_up(7200.0)
