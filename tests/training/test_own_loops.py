"""Loops of one's own in reports: what they trained, compiled and lost, though only their saves tell of steps."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import jobkit
from jobkit import contract
from jobkit.compare import compare
from jobkit.contract import State
from jobkit.run import boundary
from jobkit.rundir import commits
from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
from launch.backends.local import Local
from launch.lifecycle import run_status, troubles, verbs
from launch.lifecycle.history import read_history
from launch.report.explain import explain
from launch.report.goodput import Goodput, lost_of, measure
from launch.report.phases import RunPhase
from launch.report.terminal import figures
from tests.harness import jobs, ledgers
from tests.harness.jobs import Project


def epochs(path: Path, *, told: bool = True) -> ledgers.Written:
    """Write a run in epochs of 30 s that is killed in its third, and goes on after the second to its end.

    Args:
        path: The run directory.
        told: Whether the program says that its loop is its own, as an older version does not.
    """
    run = ledgers.Written(path)
    run.launcher(0, "submitted")
    for number, (start, begun, saves) in enumerate([(0, 0, (100, 200)), (80, 200, (300, 400))]):
        run.supervisor(number, start, "started", pid=1)
        event = {"event": "restored" if number else "fresh", "step": begun}
        run.program(number, start + 1, "opened")
        run.program(number, start + 2, **event, seconds=0.5)
        for index, step in enumerate(saves):
            t = start + 2 + 30 * (index + 1)
            if told and index == 0:
                run.program(number, t, "own_loop", step=step)
                run.program(number, t, "compiled", step=step, hits=0, misses=2, seconds=4.0)
            run.program(number, t + 1, "saved", step=step, reason="asked", blocking_s=0.5, durable_s=1.0, bytes=10)
    run.supervisor(0, 77, "exited", exit_code=137, outcome="killed", reason="killed by SIGKILL")
    run.outcome(0, outcome="killed", reason="killed by SIGKILL", step=200, committed_step=200, ended=77.0)
    run.launcher(78, "decision", action="restart")
    run.supervisor(1, 145, "exited", exit_code=0, outcome="done", reason="finished")
    run.outcome(1, outcome="done", reason="finished", step=400, committed_step=400, ended=145.0)
    run.launcher(145, "ended", state="done", reason="done")
    return run


def figured(run: ledgers.Written) -> Goodput:
    """Measure a run."""
    return measure(read_history(run.store))


def test_epochs_that_a_kill_took_back(tmp_path: Path) -> None:
    """Every figure as worked out here.

    attempt 0   0..77: start 2, compile 4, train to 62 less the first save's 0.5; from the start
                of the save of step 200, at 62, all is lost: 15 s
    idle        77..80
    attempt 1   80..145: start 1.5 + restore 0.5, compile 4, train to 145 less two saves of 0.5
    """
    found = figured(epochs(tmp_path / "r"))
    assert {str(phase): spent for phase, spent in found.time.seconds.items() if spent} == {
        "start": 3.5, "restore": 0.5, "compile": 8.0, "train": 55.5 + 58.0, "lost": 15.0, "save": 1.5, "idle": 3.0,
    }  # fmt: skip
    assert found.time.goodput == pytest.approx(113.5 / 145)
    assert [lost_of(one) for one in found.attempts] == ["?", "0"]
    assert lost_of(found) == "?"
    assert dict(figures(found))["steps lost"].startswith("unknown, 15 s of training")


def test_an_older_ledger(tmp_path: Path) -> None:
    """Where no event says so the saves do: nothing counts as compiling, the lost epoch is lost all the same."""
    found = figured(epochs(tmp_path / "r", told=False))
    assert (found.time.seconds[RunPhase.COMPILE], found.time.seconds[RunPhase.LOST]) == (0.0, 15.0)
    assert found.time.seconds[RunPhase.TRAIN] == 59.5 + 62.0


def test_the_story_of_a_lost_epoch(tmp_path: Path) -> None:
    """Explain does not say that no step was lost where an epoch was trained again."""
    history = read_history(epochs(tmp_path / "r").store)
    told = [one.text for one in explain(measure(history), history).story if one.cause == "killed"]
    assert told == [
        "Attempt 0 was killed by SIGKILL at step 200. What it had trained since step 200 was lost; it cost 24 s "
        "(15 s of training, 3.0 s waiting, 1.5 s starting, 0.5 s restoring, 4.0 s compiling)."
    ]


def test_steps_are_told_from_own_loops(tmp_path: Path) -> None:
    """A program with steps() that also saves when asked is none with a loop of its own, nor is one that only began."""
    run = ledgers.interrupted(tmp_path / "r")
    before = figured(run)
    run.program(1, 248, "saved", step=90, reason="asked", blocking_s=0.0, durable_s=0.0)
    assert figured(run).time.seconds[RunPhase.COMPILE] == before.time.seconds[RunPhase.COMPILE]
    begun = ledgers.Written(tmp_path / "begun")
    begun.program(0, 1, "fresh", step=0)
    begun.program(0, 1, "saved", step=0, reason="start", blocking_s=0.0, durable_s=0.0)
    begun.supervisor(0, 30, "exited", outcome="failed")
    assert figured(begun).time.seconds[RunPhase.COMPILE] == 29.0


def test_a_status_is_never_behind_its_commits(tmp_path: Path) -> None:
    """After a program that was started by hand, which no supervisor writes an end of, the step is the committed one."""
    run = epochs(tmp_path / "r")
    run.store.write("checkpoints/500/commit.json", "{}")
    status = run_status.status(run.store, assume_held=False)
    assert (status.step, status.committed_step) == (500, 500)


def test_a_loop_of_ones_own_by_hand(tmp_path: Path) -> None:
    """Without a supervisor the program itself says that it came to its end: what it did after its last save is kept."""
    with jobkit.Run(tmp_path / "r") as run:
        state = run.resume(count=0, optimizer=None)
        for epoch in range(3):
            state.count += 1
            run.save(epoch + 1)
        run.log(accuracy=0.5)
        time.sleep(0.6)
    found = measure(read_history(Store(tmp_path / "r")))
    assert (found.progress.steps, lost_of(found), found.time.seconds[RunPhase.LOST]) == (3, "0", 0.0)
    assert found.time.seconds[RunPhase.TRAIN] > 0.5
    assert [event["step"] for event in read_events(Store(tmp_path / "r")) if event["event"] == "finished"] == [3]


OWN = """\
import os, signal, sys, time
import jax, jax.numpy as jnp
import jobkit

work = jax.jit(lambda value: value + 1)
with jobkit.Run() as run:
    state = run.resume(value=jnp.zeros(()), epoch=0, optimizer=None)
    for epoch in run.through(range(state.epoch, 5)) if sys.argv[1] == "through" else range(state.epoch, 5):
        for step in range(10):
            state.value = work(state.value)
            time.sleep(0.15)
            if (run.attempt, epoch, step) == (0, 3, 8):
                os.kill(os.getpid(), signal.SIGKILL)
        state.epoch = epoch + 1
        run.save(10 * (epoch + 1), wait=True)
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project."""
    yield from jobs.project(tmp_path)


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.parametrize("how", ["through", "plain"])
def test_a_real_loop_of_ones_own(project: Project, how: str) -> None:
    """Killed in its fourth epoch a real one has trained, lost what it did of it, and compiled as long as it did."""
    (project.path / "own.py").write_text(OWN)
    store = verbs.submit(Local(), msgspec.structs.replace(project.spec(), command=(sys.executable, "own.py", how)))
    status = jobs.until_over(store, seconds=120)
    assert (status.state, jobs.outcomes(store)) == (State.DONE, ["killed", "done"]), store.read(contract.log_file(0))
    found = measure(read_history(store))
    assert 1.2 < found.time.seconds[RunPhase.LOST] < 3.0
    assert found.time.seconds[RunPhase.TRAIN] > 5.5  # 50 steps of 0.15 s, less what is lost of them
    assert (
        found.time.seconds[RunPhase.TRAIN] + found.time.seconds[RunPhase.LOST]
        > 4 * found.time.seconds[RunPhase.COMPILE]
    )
    assert lost_of(found) == "?"
    (own,) = [event for event in read_events(store) if event["event"] == "own_loop" and event["attempt"] == 0]
    assert own["step"] == 10
    assert run_status.status(store).step == 50


def _train_blind(url: Path, *, loop: str) -> list[troubles.Trouble]:
    """Log thrice before any step of the run, then loop in some way; return what a status says at both times."""
    with jobkit.Run(url, trackers=()) as run:
        run.resume(w=0.0, optimizer=None)
        for number in range(3):
            run.log(loss=number)
        store = Store(url)
        found = troubles.standing([troubles.unsaved(store, run.attempt)])
        if loop == "steps":
            for _ in run.steps(2):
                run.state.w += 1
        elif loop == "asks":
            assert not run.should_save(1)
        else:
            run.save(1)
        found += troubles.standing([troubles.unsaved(store, run.attempt)])
    return found


@pytest.mark.parametrize("loop", ["steps", "own", "asks"])
def test_a_program_that_trains_past_its_run_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    """One that logs while the run sees no step hears so on stderr, once; status and explain say it while it lasts."""
    assert boundary._LOGS_S <= 30
    monkeypatch.setattr(boundary, "_LOGS_S", 0.0)
    (trouble,) = _train_blind(tmp_path / "r", loop=loop)
    assert trouble.short == "no step is counted"
    assert "run.steps(n)" in trouble.text
    assert capfd.readouterr().err.count("warning: the program logs, and the run has seen no step of it") == 1
    history = read_history(Store(tmp_path / "r"))
    (told,) = [one.text for one in explain(measure(history), history).story if "trained past the run" in one.text]
    assert told.startswith("Attempt 0 trained past the run: the program logs,")
    assert told.endswith("Later it did.")


@pytest.mark.parametrize("saves", ["each", "due", "never"])
def test_logging_in_rounds_that_are_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, saves: str
) -> None:
    """What is logged in a round is no sign of a lost training while the program saves rounds, or asks whether to; once
    one has passed without either it is.
    """
    monkeypatch.setattr(boundary, "_LOGS_S", 0.0)
    with jobkit.Run(tmp_path / "r", trackers=()) as run:
        run.resume(w=0.0, optimizer=None)
        for number in run.through(range(2)):
            run.state.w += 1
            for _ in range(5):
                run.log(loss=1.0)
            if saves == "each" or (saves == "due" and run.should_save(number + 1)):
                run.save(number + 1)
            assert ("the program logs" in capfd.readouterr().err) is (saves == "never" and number == 1)


def test_logging_before_a_loop_is_nothing_to_be_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A few values that are logged at the start, and any in a loop of the run, are as they should be."""
    with jobkit.Run(tmp_path / "r", trackers=()) as run:
        run.resume(w=0.0, optimizer=None)
        for _ in range(20):
            run.log(parameters=100)
        for _ in run.steps(2):
            run.log(loss=1.0)
    assert "the program logs" not in capfd.readouterr().err


def _rounds(url: Path, save_every: Any, *, shape: str = "range", hit: int = -1, between: bool = False) -> None:
    """Train for ten rounds in a loop of its own that saves when that is due; a signal comes in one, or between two."""

    def numbers(run: jobkit.Run) -> Iterator[int]:
        for number in range(run.step, 10):
            if between and number == hit:
                os.kill(os.getpid(), signal.SIGTERM)
            yield number

    with jobkit.Run(url, save_every=save_every, keep=100, trackers=()) as run:
        state = run.resume(w=1.0, optimizer=None)
        loops = {
            "range": lambda: run.through(range(run.step, 10)),
            "items": lambda: run.through(numbers(run)),
            "break": lambda: run.through(range(run.step, 20)),
            "plain": lambda: range(run.step, 10),
        }
        for number in loops[shape]():
            state.w = 0.5 * state.w + number
            if number == hit and not between:
                os.kill(os.getpid(), signal.SIGTERM)
            if run.should_save(number + 1):
                run.save(number + 1)
            if shape == "break" and number == 9:
                break


@pytest.mark.parametrize("save_every", ["4 steps", None])
@pytest.mark.parametrize("shape", ["range", "items", "break", "plain"])
def test_rounds_that_are_saved_when_that_is_due(tmp_path: Path, shape: str, save_every: str | None) -> None:
    """On a notice, in a round or between two of them, the newest round is committed, and so is what the loop ends with,
    however that is.
    """
    _rounds(tmp_path / "whole", save_every, shape=shape)
    assert commits.steps(Store(tmp_path / "whole"))[-1] == 10
    with pytest.raises(jobkit.Preempted):
        _rounds(tmp_path / "run", save_every, shape=shape, hit=3)
    assert commits.steps(Store(tmp_path / "run"))[-1] == 4
    if shape == "items":
        with pytest.raises(jobkit.Preempted):
            _rounds(tmp_path / "run", save_every, shape=shape, hit=7, between=True)
        assert commits.steps(Store(tmp_path / "run"))[-1] == 8
    for _ in range(2):
        _rounds(tmp_path / "run", save_every, shape=shape)
        assert compare(tmp_path / "whole", tmp_path / "run").equal


def test_a_save_is_due_by_the_interval(tmp_path: Path) -> None:
    """Between, rounds are saved as `save_every` says."""
    with jobkit.Run(tmp_path / "r", save_every=4, trackers=()) as run:
        run.resume(w=0.0, optimizer=None)
        due = []
        while run.committed_step < 0 or run._session.checkpoints.saving:  # the start is on its way
            time.sleep(0.01)
        for number in run.through(range(10)):
            run.state.w += 1
            if run.should_save(number + 1):
                due.append(number + 1)
                run.save(number + 1, wait=True)
    assert (due, run.committed_step) == ([4, 8], 10)


def test_should_save_inside_steps(tmp_path: Path) -> None:
    """There the run saves by itself, and says so."""
    with jobkit.Run(tmp_path / "r", trackers=()) as run:
        run.resume(w=0.0, optimizer=None)
        for step in run.steps(1):
            run.state.w += 1
            with pytest.raises(jobkit.ConfigError, match="save by themselves"):
                run.should_save(step)


def _asks_rarely(url: Path, done: list[int]) -> None:
    with jobkit.Run(url, save_every=None, trackers=()) as run:
        run.resume(w=0.0, optimizer=None)
        for number in run.through(range(40)):
            done.append(number)
            if number == 12:
                os.kill(os.getpid(), signal.SIGTERM)
            if number % 10 == 9 and run.should_save(number + 1):
                run.save(number + 1)


def test_a_notice_waits_one_round_for_the_question(tmp_path: Path) -> None:
    """Where the program asks only in some rounds whether to save, it leaves after one round more all the same."""
    done: list[int] = []
    with pytest.raises(jobkit.Preempted):
        _asks_rarely(tmp_path / "r", done)
    assert done[-1] == 13
    assert commits.steps(Store(tmp_path / "r"))[-1] == 0
