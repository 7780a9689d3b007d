"""`--after RUN`: a run starts once another one has finished well, and never if that does not."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobkit.contract import State
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from launch.backends import after, registry
from launch.backends.local import Local
from launch.lifecycle import run_status, submission
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec
from tests.harness import jobs
from tests.harness.jobs import Project, until, until_over, until_stepping


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project."""
    yield from jobs.project(tmp_path)


def preempt(store: Store) -> None:
    """Have the first attempt of a run, which goes on until then, make way for the next."""
    until_stepping(store)
    os.kill(jobs.supervisor_pid(store), signal.SIGTERM)


def until_waiting(store: Store, other: Store) -> None:
    """Wait until a run has a runner that waits for another run."""
    until(lambda: jobs.runner_pid(store), "it has a runner")
    status = run_status.status(store)
    assert (status.state, status.runner, status.attempts) == (State.QUEUED, "alive", 0), status
    assert status.reason == f"starts once {other.url} has finished well"


@pytest.mark.slow
def test_it_starts_when_the_other_is_done(project: Project) -> None:
    """Named as `ls` prints it, waited for through a preemption; whoever waits sees what for, and the end."""
    first = project.submit("hold", "exit:0", run="first")
    words = ("--run", "runs/second", "--after", "first", "--wait", "--", "python", "project/job.py", "exit:0")
    with project.start("submit", *words, cwd=project.path.parent) as waiting:
        second = Store(project.runs / "second")
        until(lambda: specs.exists(second), "it is submitted")
        until_waiting(second, first)
        preempt(first)
        out, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, out
    assert f"queued, starts once {first.url} has finished well" in out
    assert (jobs.outcomes(first), jobs.outcomes(second)) == (["preempted", "done"], ["done"])
    (ended,) = jobs.events(first, "ended")
    begun = run_status.status(second).started
    assert begun is not None
    assert begun > ended["t"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_it_ends_failed_where_the_other_does_not_finish(project: Project, how: str) -> None:
    """Nothing of it runs, the exit code is 1, a resume is refused until the other is done, and starts it then."""
    first = project.submit("hold", "exit:78", "exit:0", run="first")
    second = project.submit("exit:0", run="second", after=first.url)
    until_waiting(second, first)
    if how == "fails":
        preempt(first)
    else:
        until_stepping(first)
        registry.cancel(first.url)
    over = until_over(second)
    assert (over.state, over.attempts) == (State.FAILED, 0)
    word = "failed: no restart can help" if how == "fails" else "cancelled: cancelled by"
    assert over.reason.startswith(f"not started, since {first.url} is {word}"), over.reason
    assert over.reason.endswith(f"; once it is done: jobkit resume {second.url}")
    assert project.cli("wait", second.url).returncode == 1
    (*_, end) = json.loads(project.cli("explain", second.url, "--json").stdout)["story"]
    assert end["text"].endswith(f" Not started{over.reason.removeprefix('not started')}.")
    with pytest.raises(ConfigError, match=rf"and {first.url} is .*; resume that first"):
        registry.resume(second.url)
    refused = project.cli("submit", "--run", "../runs/third", "--after", first.url, "--", "python", "job.py", "exit:0")
    assert (refused.returncode, Path(project.runs / "third").exists()) == (2, False), refused.stderr
    assert "see to that first, or leave --after out" in refused.stderr
    registry.resume(first.url)
    if how == "is cancelled":
        until_over(first)  # its second attempt ends as before
        registry.resume(first.url)
    assert until_over(first).state is State.DONE
    registry.resume(second.url)
    assert until_over(second).state is State.DONE


@pytest.mark.slow
def test_cancelled_resumed_and_killed_while_it_waits(project: Project) -> None:
    """A cancel ends the waiting; a resume waits again, and so does one after the runner was killed."""
    first = project.submit("hold", "exit:0", run="first")
    second = project.submit("exit:0", run="second", after=first.url)
    until_waiting(second, first)
    registry.cancel(second.url)
    over = until_over(second)
    assert (over.state, over.attempts) == (State.CANCELLED, 0)
    registry.resume(second.url)
    until_waiting(second, first)
    os.kill(jobs.runner_pid(second), signal.SIGKILL)
    until(lambda: run_status.status(second).runner == "gone", "its runner is gone")
    registry.resume(second.url)
    until_waiting(second, first)
    preempt(first)
    assert until_over(second).state is State.DONE
    assert until_over(first).state is State.DONE


@pytest.mark.slow
def test_a_killed_runner_that_nobody_replaces_is_an_end(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other has no runner any more: somebody may start one yet, so it is an end only a while later."""
    first = project.submit("hold", "exit:0", run="first")
    until_stepping(first)
    spec = JobSpec(command=("true",), after=first.url)
    store = made(project, "second", spec=spec)
    watch = after.Watch(store, spec, lambda stores: {})
    assert watch.look().state is State.RUNNING
    os.kill(jobs.runner_pid(first), signal.SIGKILL)
    until(lambda: run_status.status(first).runner == "gone", "its runner is gone")
    assert watch.look().state is State.QUEUED
    monkeypatch.setattr(after, "_SURE_S", 0.0)
    found = watch.look()
    assert found.state is State.FAILED
    assert f"{first.url} is failed: the local runner is gone; continue with: jobkit resume" in found.reason
    monkeypatch.undo()
    registry.resume(first.url)
    assert until_over(first).state is State.DONE
    assert watch.look() == after.Other(State.DONE)


def made(project: Project, run: str, *, on: str = "local", ended: State | None = None, spec: JobSpec) -> Store:
    """Make a run that nobody starts."""
    store = Store(project.runs / run)
    store.make()
    specs.create(store, spec, on)
    submission.record(store, "submitted", command=list(spec.command))
    if ended is not None:
        submission.record(store, "ended", state=ended, reason="as it is")
    return store


SPEC = JobSpec(command=("true",))
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("new", {}, "a run cannot start after itself; name another one"),
    ("nowhere", {}, "is not a run"),
    ("failed", {}, "failed is failed: as it is; see to that first, or leave --after out"),
    ("cancelled", {}, "cancelled is cancelled: as it is; see to that first"),
    ("away", {}, "is --on gcp, whose end is not seen --on local; wait for it here: jobkit wait .* && jobkit submit"),
    ("by-hand", {}, "was started by hand and not submitted"),
    ("done", {"sweep": {"x": ("1", "2")}, "command": ("echo", "{x}")}, "is for one run, and this is a sweep; wait for"),
    ("done", {"run": "by-hand"}, "has begun already, by hand: leave it out, or give a new --run"),
]


@pytest.fixture
def others(project: Project) -> Project:
    """Make runs of every kind beside each other."""
    made(project, "failed", ended=State.FAILED, spec=SPEC)
    made(project, "cancelled", ended=State.CANCELLED, spec=SPEC)
    made(project, "done", ended=State.DONE, spec=SPEC)
    made(project, "done-away", on="gcp", ended=State.DONE, spec=SPEC)
    made(project, "away", on="gcp", spec=SPEC)
    made(project, "new", spec=SPEC)
    by_hand = Store(project.runs / "by-hand")
    by_hand.make()
    by_hand.write("strategy.json", "{}")
    return project


@pytest.mark.parametrize(("other", "fields", "said"), MISTAKES)
def test_what_cannot_be_waited_for_is_refused(others: Project, other: str, fields: dict[str, Any], said: str) -> None:
    """At the submit, with the remedy; nothing is written."""
    before = sorted(others.runs.iterdir())
    given: dict[str, Any] = {"command": ("true",), "cwd": str(others.path), "after": str(others.runs / other)}
    given |= fields | {"run": str(others.runs / fields.get("run", "new"))}
    with pytest.raises(ConfigError, match=said):
        Local().check(JobSpec(**given))
    assert sorted(others.runs.iterdir()) == before


@pytest.mark.parametrize("other", ["done", "done-away"])
def test_what_is_done_is_waited_for_no_more(others: Project, other: str) -> None:
    """A run that is done already is accepted, wherever it was, and let pass."""
    url = str(others.runs / other)
    spec = others.spec("exit:0", run="next", after=os.path.relpath(url))
    plan = Local().check(spec)
    assert plan.spec.after == url
    assert after.look(plan.spec.after, "local", lambda stores: {}) == after.Other(State.DONE)


@pytest.mark.parametrize("name", ["gcp", "aws"])
def test_a_cloud_waits_for_no_run(name: str) -> None:
    """Neither a submit nor a move of a run that has not begun."""
    spec = JobSpec(command=("true",), run="gs://bucket/run", after="gs://bucket/other")
    with pytest.raises(ConfigError, match=f"a job --on {name} cannot wait for a run; wait for it here: jobkit wait gs"):
        registry.named(name).check(spec)


def test_what_has_begun_waits_no_more(others: Project) -> None:
    """An attempt of its own ends all waiting, and then a resume asks nothing of the other run."""
    spec = JobSpec(command=("true",), after=str(others.runs / "failed"))
    store = made(others, "second", ended=State.FAILED, spec=spec)
    assert after.due(store, spec)
    with pytest.raises(ConfigError, match="resume that first"):
        after.check_resumed(Local(), store, spec)
    store.file("attempts/0").mkdir(parents=True)
    assert not after.due(store, spec)
    after.check_resumed(Local(), store, spec)


def test_all_points_of_a_sweep_count(project: Project) -> None:
    """A sweep is done when all its points are, goes on while one does, and fails with one."""
    spec = JobSpec(command=("echo", "{x}"), sweep={"x": ("1", "2")}, run=str(project.runs / "sweep"))
    sweep = made(project, "sweep", spec=spec)
    points = [made(project, f"sweep/points/{number}", spec=spec.point(number)) for number in range(2)]
    assert not after.look(sweep.url, "local", lambda stores: {}).sure
    submission.record(points[0], "ended", state=State.DONE, reason="")
    submission.record(points[1], "ended", state=State.FAILED, reason="as it is")
    found = after.look(sweep.url, "local", lambda stores: {})
    assert (found.state, found.reason, found.sure) == (State.FAILED, f"{points[1].url} is failed: as it is", True)
    submission.record(points[1], "resumed")
    submission.record(points[1], "ended", state=State.DONE, reason="")
    assert after.look(sweep.url, "local", lambda stores: {}) == after.Other(State.DONE)


def test_a_dry_run_shows_it(others: Project) -> None:
    """A dry run says after which run it starts, and an empty name is refused."""
    words = ("--run", "../runs/next", "--dry-run", "--", "python", "job.py", "exit:0")
    shown = others.cli("submit", "--after", "../runs/done", *words)
    assert f"after        {others.runs / 'done'} has finished well" in shown.stdout, shown.stderr
    refused = others.cli("submit", "--after", "", *words)
    assert (refused.returncode, "--after is empty" in refused.stderr) == (2, True)
