"""Sweeps: how they are written down, and how they run on this machine."""

import contextlib
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.store import Store
from launch.backends import local_sweep, registry
from launch.backends.local import Local
from launch.lifecycle import lease, lock, run_status, submission
from launch.lifecycle.submission import make_point, new_run
from launch.spec import jobspec as specs
from launch.spec import sweep
from tests.harness import jobs
from tests.harness.jobs import until

NAMES = st.text("abcdefghxyz_", min_size=1, max_size=5)


@given(
    st.dictionaries(
        NAMES,
        st.lists(st.text("0123456789abc.-e", min_size=1, max_size=4), min_size=1, max_size=4, unique=True),
        min_size=1,
        max_size=4,
    )
)
def test_points_are_the_product(axes: dict[str, list[str]]) -> None:
    """Every combination of values is exactly one point, in the order of itertools.product, and fills the command."""
    points = [sweep.values(axes, number) for number in range(sweep.count(axes))]
    assert [tuple(point.values()) for point in points] == list(itertools.product(*axes.values()))
    command = [f"--{name}={{{name}}}" for name in axes]
    sweep.check(command, axes)
    assert sweep.fill(command, points[-1]) == tuple(f"--{name}={values[-1]}" for name, values in axes.items())


@given(st.sets(st.integers(0, 300)))
def test_array_indices(numbers: set[int]) -> None:
    """What is written for sbatch's --array names exactly the numbers, in few words."""
    text = sweep.compact(numbers)
    assert sweep.expand(text) == numbers
    assert text.count(",") <= max(0, len(numbers) - 1)


def test_ranges_and_lists() -> None:
    """Ranges have both ends, may be mixed with values, and values are kept as they were typed."""
    assert sweep.parse(["lr=1e-3,3e-4", "seed=-1..2,7"]) == {"lr": ("1e-3", "3e-4"), "seed": ("-1", "0", "1", "2", "7")}
    assert sweep.parse(["path=../data,a/../b,..", "x=main..dev"])["path"] == ("../data", "a/../b", "..")
    assert sweep.fill(["{{{a}}}", "x{a}{a}"], {"a": "1"}) == ("{1}", "x11")


@pytest.mark.parametrize(
    ("texts", "command", "message"),
    [
        (["lr"], "{lr}", "is not NAME=VALUES"),
        (["1r=3"], "{1r}", "is not NAME=VALUES"),
        (["lr=1,,2"], "{lr}", "has an empty value"),
        (["lr="], "{lr}", "has an empty value"),
        (["seed=9..0"], "{seed}", "is empty; write the smaller number first: 0..9"),
        (["seed=0..a"], "{seed}", "--sweep seed=0..a is no range, which has two whole numbers: 0..9"),
        (["seed=1,4...9"], "{seed}", "--sweep seed=4...9 is no range"),
        (["lr=0.1..0.5"], "{lr}", "is no range, which has two whole numbers: 0..9; or write a list"),
        (["seed=3.."], "{seed}", "is no range"),
        (["seed=0..999999999999"], "{seed}", "alone has 1000000000000 points; at most 10000"),
        (["a=0..999", "b=0..10"], "{a}{b}", "the sweep has 11000 points (1000 x 11); at most 10000"),
        (["lr=1,2", "lr=3"], "{lr}", "is given twice"),
        (["lr=1,2,1"], "{lr}", "--sweep lr has 1 twice"),
        (["lr=1,2"], "{lr} {rate}", "the command has {rate}, but the sweep names lr; add --sweep rate=..."),
        (["lr=1,2", "seed=1"], "{lr}", "--sweep seed is not used: write {seed} into the command"),
        (["lr=1,2"], "{lr} {", "'{' in the command is no name of the sweep; write a brace itself twice: {{"),
        (["lr=1,2"], '{lr} {"a":1}', "in the command is no name of the sweep"),
    ],
)  # fmt: skip
def test_bad_sweeps(
    texts: list[str], command: str, message: str, project: jobs.Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be meant is refused in one sentence, and nothing is left behind."""
    options = [word for text in texts for word in ("--sweep", text)]
    monkeypatch.chdir(project.path)
    done = jobs.command_line("submit", "--run", "new", *options, "--", "python", "job.py", *command.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (project.path / "new").exists()


def test_a_sweep_in_a_bucket(project: jobs.Project) -> None:
    """A sweep on an object store is refused before anything is asked of it."""
    done = project.cli("submit", "--run", "gs://nowhere/s", "--sweep", "a=1", "--", "python", "job.py", "{a}")
    assert (done.returncode, "has to lie on a file system" in done.stderr) == (2, True)


def test_parallelism_of_no_sweep(project: jobs.Project) -> None:
    """--array-parallelism needs a sweep, and a number of points."""
    for options in (["--array-parallelism", "2"], ["--array-parallelism", "0", "--sweep", "a=1"]):
        done = project.cli("submit", "--run", "new", *options, "--", "python", "job.py", "{a}")
        assert done.returncode == 2
        assert "give a number of points, 1 or more, of a --sweep" in done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Iterator[jobs.Project]:
    """Make a project whose sweeps are ended with it."""
    made = jobs.Project(tmp_path)
    try:
        yield made
    finally:
        for path in registry.find_runs(made.runs):
            if pid := jobs.runner_pid(Store(path)):
                os.kill(pid, signal.SIGKILL)
            for point in (path / "points").glob("*"):
                if pid := jobs.runner_pid(Store(point)):
                    os.kill(pid, signal.SIGKILL)
        made.close()


def start(project: jobs.Project, *plan: str, parallel: int | None = None, **axes: tuple[str, ...]) -> Store:
    """Submit a sweep."""
    return project.submit(*plan, sweep=axes, parallel=parallel)


def states(store: Store) -> list[str]:
    """Return the states of the points."""
    return [str(point.state) for point in registry.status(store).points]


def test_between_two_points(project: jobs.Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a sweep's runner lives a point that has none is not over, at any instant; nobody is told to resume."""
    spec = project.spec("commit:{a}", sweep={"a": ("1", "2")})
    with submission.new_run(submission.prepare(spec), "local") as (store, _, runner):
        pass
    point = Store(f"{store.url}/points/0")
    with contextlib.closing(runner):
        assert states(store) == ["queued", "queued"]
        submission.make_point(point)  # as the runner does a moment before it starts it
        assert states(store) == ["queued", "queued"]
        assert "resume" not in registry.status(store).reason
    listed = project.cli("checkpoints", store.url)
    assert listed.stdout.splitlines()[:2] == ["point 0: a=1", "no committed checkpoint"]
    points = json.loads(project.cli("checkpoints", store.url, "--json").stdout)
    assert [(one["run"], one["values"]) for one in points][1] == (f"{store.url}/points/1", {"a": "2"})
    refused = project.cli("checkpoints", store.url, "verify")
    assert (refused.returncode, "name one of its points, such as" in refused.stderr) == (2, True)
    told = registry.status(store)
    assert (told.state, told.runner) == (State.FAILED, "gone")
    assert told.reason == f"2 failed; continue with: jobkit resume {store.url}"

    def ends_meanwhile(store: Store) -> bool:
        monkeypatch.undo()
        submission.record(store, "ended", state="failed", reason="failed twice")
        return False

    monkeypatch.setattr(run_status, "held", ends_meanwhile)  # the reader is slow: the run is over when it reads on
    told = run_status.status(point)
    assert (told.runner, told.reason) == ("ended", "failed twice")


@pytest.mark.slow
def test_a_cancel_between_a_point_and_its_runner(project: jobs.Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that is cancelled when a point has been made, and has no runner yet that could be asked, cancels it."""
    spec = project.spec("{a}", sweep={"a": ("hold", "sleep:60")})
    with new_run(Local().check(spec), Local.name) as (store, spec, runner):
        pass
    acquire = lock.acquire

    def acquire_late(one: Store) -> lock.RunLock | None:
        registry.cancel(store.url, wait=False)
        return acquire(one)

    monkeypatch.setattr(local_sweep, "acquire", acquire_late)
    first, second = specs.points(store, spec)
    with contextlib.closing(runner):
        local_sweep._start(store, first)
        assert jobs.until_over(first, seconds=15).state is State.CANCELLED
        assert not local_sweep._start(store, second)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put the handlers of signals back that a test has changed."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_stop_the_moment_a_point_has_started(
    project: jobs.Project, monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    """SIGTERM when a point's runner is up and the sweep's process has not noted it: the point is asked to stop, too."""
    spec = project.spec("{a}", sweep={"a": ("hold", "commit:1")})
    with new_run(Local().check(spec), Local.name) as (store, spec, runner):
        pass
    first, second = specs.points(store, spec)
    hand_over = local_sweep._LOCAL.hand_over

    @contextlib.contextmanager
    def here(store: Store, given: list[str]) -> Iterator[tuple[lock.RunLock, lease.Lease, Callable[[], None]]]:
        yield runner, lease.Lease(store, 0), lambda: None

    def hand_over_and_stop(point: Store, claim: lock.Claim) -> State:
        try:
            return hand_over(point, claim)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(local_sweep.local, "detached", here)
    monkeypatch.setattr(local_sweep._LOCAL, "hand_over", hand_over_and_stop)
    with contextlib.closing(runner), contextlib.suppress(Exception):
        local_sweep.main([store.url])
    until(lambda: not lock.held(first), "the point has stopped", seconds=20)
    assert not specs.exists(second)


def test_a_point_whose_runner_is_killed_again_and_again(project: jobs.Project) -> None:
    """The sweep gives a point up after a while, says so, and goes on with the next; nothing is left to be resumed."""
    store = start(project, "{a}", a=("hold", "commit:1"))
    point = Store(f"{store.url}/points/0")
    killed: set[int] = set()
    for _ in range(4):
        pid = until(lambda: jobs.runner_pid(point) not in {0, *killed} and jobs.runner_pid(point), "it has a runner")
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
        assert states(store)[0] != "failed" or len(killed) == 4
    until(lambda: states(store) == ["failed", "done"], "the next point is done", seconds=40)
    until(lambda: not lock.held(store), "the sweep's runner ends")
    told = registry.status(store)
    assert (told.reason, told.runner) == ("1 done, 1 failed", "ended")
    assert told.points[0].reason == f"its runner was killed 4 times; continue with: jobkit resume {point.url}"


@pytest.mark.slow
def test_points_run_one_after_another(project: jobs.Project) -> None:
    """A local sweep runs its points in order, one at a time; one that fails stops no other."""
    store = start(project, "commit:{a},exit:{b}", a=("1", "2"), b=("0", "4"))
    until(lambda: registry.status(store).state.over, "all points are over", seconds=40)
    told = registry.status(store)
    assert told.state is State.FAILED
    assert told.reason == "2 done, 2 failed"
    assert [point.committed_step for point in told.points] == [1, 1, 2, 2]
    began = [run_status.status(Store(point.run)).started or 0.0 for point in told.points]
    assert began == sorted(began)
    ended = [
        next(event["t"] for event in run_status.events(Store(point.run)) if event["event"] == "ended")
        for point in told.points
    ]
    assert all(end <= begin for end, begin in zip(ended, began[1:], strict=False)), "two points ran at once"
    until(lambda: not lock.held(store), "the sweep's runner ends")


@pytest.mark.slow
def test_a_sweep_whose_runner_is_killed(project: jobs.Project) -> None:
    """SIGKILL of the sweep's runner: points that run go on, the rest is told to be resumed, and resume takes it up."""
    store = start(project, "sleep:1.5,commit:{a}", parallel=2, a=("1", "2", "3"))
    until(lambda: states(store)[:2] == ["running", "running"], "two points run")
    os.kill(jobs.runner_pid(store), signal.SIGKILL)
    until(lambda: states(store) == ["done", "done", "failed"], "the points that ran are done")
    assert registry.status(store).reason.endswith(f"continue with: jobkit resume {store.url}")
    assert project.cli("resume", store.url, "--wait").returncode == 0
    assert states(store) == ["done"] * 3
    assert [point.attempts for point in registry.status(store).points] == [1, 1, 1]


def test_cancel_of_a_sweep_and_of_a_point(project: jobs.Project) -> None:
    """A point that waits can be cancelled alone; the cancel of the sweep ends the rest, and nothing starts any more."""
    store = start(project, "hold,commit:{a}", a=("1", "2", "3"))
    until(lambda: states(store) == ["running", "queued", "queued"], "the first point runs")
    assert registry.cancel(f"{store.url}/points/2") is State.CANCELLED
    assert states(store) == ["running", "queued", "cancelled"]
    assert registry.cancel(store.url) is State.CANCELLED
    assert states(store) == ["cancelled"] * 3
    until(lambda: not lock.held(store), "the sweep's runner ends")
    assert not (store.path / "points" / "1" / "attempts").exists()
    moved = project.cli("resume", store.url, "--on", "slurm")
    assert moved.returncode == 2
    assert "goes on where it was submitted: --on local" in moved.stderr
    with pytest.raises(ConfigError, match="has no point 7"):
        registry.status(submission.open_run(f"{store.url}/points/7"))


class _Starting(Store):
    """A point that its runner makes between two looks of somebody who reads it."""

    def read(self, name: str, *, last_bytes: int | None = None) -> bytes:
        """Find nothing, the first time; the point is made right after."""
        found = self.path.exists()
        try:
            return super().read(name, last_bytes=last_bytes)
        finally:
            if not found:
                make_point(Store(self.url))


def test_a_point_that_starts_this_very_moment(project: jobs.Project) -> None:
    """Who reads a point while its run.json is being made reads the point, and `submit --wait` does not end over it."""
    plan = Local().check(project.spec("exit:{x}", run="s", sweep={"x": ("0", "0.0")}))
    with new_run(plan, "local") as (store, spec, lock):
        pass
    lock.close()
    starting = _Starting(f"{store.url}/points/1")
    assert specs.read(starting).values == {"x": "0.0"}
    assert specs.read(starting) == specs.read(Store(starting.url)) == spec.point(1)


@pytest.mark.parametrize("word", ["${HOME}", "{}", "{a b}", "print({x}) {x}", "{{x}}", "a{x}", '{"a": 1}', "f{x}=1"])
def test_braces_of_others(word: str) -> None:
    """Without a sweep only a word that is a placeholder, or ends as an option with one, is taken for one."""
    sweep.refuse_names(["python", word])


@pytest.mark.slow
def test_one_point_that_cannot_be_asked_keeps_no_other(project: jobs.Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel that cannot be written for one point is an error, and all others are cancelled nevertheless."""
    store = start(project, "{a}", parallel=2, a=("hold", "hold,exit:1"))
    first, second = specs.points(store, specs.read(store))
    for point in first, second:
        jobs.until_stepping(point)
    ask = submission.ask_to_cancel

    def refused(one: Store, word: str = "cancelled") -> bytes:
        if one.url == first.url:
            raise ConfigError("no space left")
        return ask(one, word)

    monkeypatch.setattr(submission, "ask_to_cancel", refused)
    with pytest.raises(ConfigError, match="no space left"):
        registry.cancel(store.url)
    assert run_status.status(second).state is State.CANCELLED
    monkeypatch.undo()
    registry.cancel(first.url)


@pytest.mark.slow
def test_a_point_that_begins_while_its_sweep_is_cancelled(
    project: jobs.Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was over at the first look, and was resumed before the cancel was written, is cancelled too."""
    store = start(project, "exit:1", "{a}", a=("hold", "hold,exit:1"))
    first, _ = specs.points(store, specs.read(store))
    until(lambda: states(store) == ["failed", "failed"], "both have failed", seconds=40)
    until(lambda: not lock.held(store), "the sweep's runner ends")
    ask = submission.ask_to_cancel

    def late(one: Store, word: str = "cancelled") -> bytes:
        if one.url == store.url:
            registry.resume(first.url)
            jobs.until_stepping(first, attempt=1)
        return ask(one, word)

    monkeypatch.setattr(submission, "ask_to_cancel", late)
    registry.cancel(store.url)
    assert first.exists(contract.CANCEL)
    assert states(store) == ["cancelled", "failed"]


def test_one_point_that_cannot_be_read_keeps_no_other(project: jobs.Project) -> None:
    """A damaged point is an error of the cancel; the sweep and all its other points are cancelled."""
    store = start(project, "{a}", parallel=2, a=("commit:1", "hold"))
    first, second = specs.points(store, specs.read(store))
    jobs.until_over(first)
    jobs.until_stepping(second)
    first.write(contract.RUN_JSON, b"{")
    with pytest.raises(JobkitError, match="is damaged"):
        registry.cancel(store.url)
    assert store.exists(contract.CANCEL)
    assert run_status.status(second).state is State.CANCELLED
