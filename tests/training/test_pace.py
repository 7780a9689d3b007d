"""Programs that make no step any more: when that is noticed, what it is worth, and who is told."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit import contract
from jobkit.contract import State
from jobkit.rundir.ledger import Ledger, writer_events
from jobkit.rundir.store import Store
from jobkit.supervise.heartbeat import Beat, Phase
from jobkit.supervise.stall import Known, Watchdog, learn
from jobkit.supervise.stall_monitor import StallMonitor
from launch.lifecycle import run_status, troubles
from launch.lifecycle.history import read_history
from launch.report.goodput import measure
from tests.harness import ledgers
from tests.harness.jobs import Project, until
from tests.harness.jobs import project as make_project

TICK_S = 0.25


class Watched:
    """A program that a watchdog looks at four times a second, on a clock of its own."""

    def __init__(self, dog: Watchdog) -> None:
        self.dog, self.now, self.step = dog, 0.0, 0

    def beat(self, phase: Phase = Phase.STEPPING) -> None:
        """Have it give a sign of progress."""
        self.last = Beat(7, phase, self.step, 0, self.now)

    def trains(self, count: int, step_s: float) -> None:
        """Have it make so many steps."""
        for _ in range(count):
            self.hangs(step_s)
            self.step += 1
            self.beat()
        self.looks()

    def looks(self) -> None:
        """Look once."""
        self.dog.look(self.last, self.now)

    def hangs(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while self.now // TICK_S < end // TICK_S:
            self.now = (self.now // TICK_S + 1) * TICK_S
            self.looks()
        self.now = end


def watched(known: Known | None = None, *, stall_s: float | None = None) -> Watched:
    """Return a program at the end of its first step."""
    program = Watched(Watchdog(known, stall_s=stall_s))
    program.beat(Phase.FIRST_STEP)
    program.looks()
    return program


def test_quick_steps_are_missed_after_a_minute() -> None:
    """Of steps of 20 ms none for a minute is a silence, which knows how long a step takes; one step ends it."""
    program = watched()
    program.trains(2000, 0.02)
    program.hangs(59)
    assert program.dog.silence() is None
    program.hangs(2)
    silence = program.dog.silence()
    assert silence is not None
    assert silence.step == 2000
    assert 60 < silence.waited_s < 62
    assert silence.usual_s == pytest.approx(0.02, rel=0.1)
    program.trains(1, 0.02)
    assert program.dog.silence() is None


@pytest.mark.slow
@given(st.floats(0.01, 400.0), st.integers(8, 40))
def test_slow_steps_are_waited_for(step_s: float, count: int) -> None:
    """Whatever a step takes, ten times that is no silence, nor a minute; more than both is."""
    program = watched()
    program.trains(count, step_s)
    program.trains(max(0, round(3 / step_s)), step_s)
    bound_s = max(60.0, 10 * step_s)
    program.hangs(bound_s - 20 * TICK_S if bound_s > 60 else 59)
    assert program.dog.silence() is None
    program.hangs(25 * TICK_S)
    assert program.dog.silence() is not None


def test_a_long_evaluation_is_known_from_then_on() -> None:
    """The first evaluation of ten minutes is a silence; the next one is not, nor in a later attempt."""
    program = watched()
    program.trains(500, 0.1)
    program.hangs(600)
    assert program.dog.silence() is not None
    program.trains(500, 0.1)
    program.hangs(600)
    assert program.dog.silence() is None
    later = watched(Known(longest_step_s=program.dog.pace.longest_s))
    later.trains(500, 0.1)
    later.hangs(600)
    assert later.dog.silence() is None


def test_what_compiles_or_saves_is_no_silence() -> None:
    """Before an attempt is warm, in a save, and where no steps were seen at all, nothing is missed."""
    program = watched()
    program.trains(2, 1.0)
    program.hangs(1800)
    assert program.dog.silence() is None
    program.trains(500, 0.1)
    program.beat(Phase.SAVING)
    program.looks()
    program.hangs(1800)
    assert program.dog.silence() is None
    fresh = watched()
    fresh.step = 1000  # the first save of a loop of one's own
    fresh.beat()
    fresh.looks()
    fresh.hangs(1800)
    assert fresh.dog.silence() is None


def test_a_beat_is_a_sign() -> None:
    """Who calls run.beat() inside an evaluation is not missed."""
    program = watched()
    program.trains(500, 0.1)
    for _ in range(30):
        program.hangs(50)
        program.beat()
        program.looks()
    assert program.dog.silence() is None


def test_the_longest_step_is_learned(tmp_path: Path) -> None:
    """What an attempt says of its longest step at its end, the next one knows; anything else there is passed over."""
    store = Store(tmp_path / "run")
    for number, told in enumerate([2.5, 7.25, "x", None]):
        ledger = Ledger(store.file(contract.events_file(number, "supervisor")))
        ledger.append("exited", longest_s={}, longest_step_s=told)
        ledger.close()
    assert learn(store, 4, "supervisor").longest_step_s == 7.25


def test_it_is_written_down_once(tmp_path: Path) -> None:
    """A silence has one event in the ledger however often it is looked at, and one when it is over."""
    clock = Watched(Watchdog())
    store = Store(tmp_path / "run")
    monitor = StallMonitor(
        Known(), tmp_path, Ledger(store.file(contract.events_file(0, "supervisor"))), tmp_path / "log"
    )
    monitor._dog = clock.dog
    clock.beat(Phase.FIRST_STEP)
    clock.trains(500, 0.02)
    for _ in range(300):
        clock.hangs(1.0)
        monitor._note_silence()
    for _ in range(3):
        clock.trains(1, 0.02)
        monitor._note_silence()
    silent, heard = writer_events(store, 0, "supervisor")
    assert (silent["event"], silent["step"], silent["budget_s"]) == ("silent", 500, 3600.0)
    assert 60 < silent["waited_s"] < 63
    assert heard["event"] == "heard_again"
    assert heard["after_s"] == pytest.approx(300, abs=2)


# What it is worth, and who sees it.


def silent(path: Path, *, ago_s: float, again: bool = False, budget_s: float | None = 3600.0) -> ledgers.Written:
    """Write a run of 20 ms steps that fell silent at step 5000, 100 s after its start."""
    now = time.time()
    run, start = ledgers.Written(path), now - ago_s - 100
    run.launcher(start, "submitted")
    run.supervisor(0, start, "started", pid=1)
    run.program(0, start, "fresh", step=0)
    run.program(0, start, "first_step", step=1)
    run.program(0, now - ago_s, "metrics", step=5000, values={"loss": 1.0})
    told = {"step": 5000, "waited_s": 60.25, "usual_s": 0.02, "budget_s": budget_s}
    run.supervisor(0, now - ago_s + 60.25, "silent", **told)
    if again:
        run.supervisor(0, now, "heard_again", after_s=ago_s)
    return run


def test_silence_is_no_goodput(tmp_path: Path) -> None:
    """Six minutes of silence after 100 s of training are stalled, not training, while they last and afterwards."""
    for again in (False, True):
        history = read_history(silent(tmp_path / str(again), ago_s=360, again=again).store, over=False)
        found = measure(history)
        assert {str(phase): round(spent) for phase, spent in found.time.seconds.items() if spent >= 0.5} == {
            "train": 100,
            "stalled": 360,
        }
        assert found.time.goodput == pytest.approx(100 / 460, rel=0.01)


def test_everybody_says_the_same(tmp_path: Path) -> None:
    """Status, the lines of --wait, and a listing say since when there is no step, and what will become of it."""
    from launch.cli.ls import _table
    from launch.report import follow

    run = silent(tmp_path / "run", ago_s=360)
    status = run_status.status(run.store, assume_held=True)
    text = "no step for 6 min (usually 0.02 s); restarted after 1 h: --stall"
    assert status.state is State.RUNNING
    assert [one.text for one in status.troubles] == [text]
    assert ("trouble", text) in list(follow.rows(status))
    assert text in _table([(str(tmp_path), status)])
    assert follow._change_line(status).endswith(", no step")
    assert text in follow._moving(status)
    assert json.loads(run_status.to_json(status))["troubles"] == [{"kind": "silent", "short": "no step", "text": text}]
    assert run_status.status(silent(tmp_path / "again", ago_s=360, again=True).store, assume_held=True).troubles == []
    over = silent(tmp_path / "over", ago_s=360)
    over.launcher(time.time(), "ended", state="cancelled")
    assert run_status.status(over.store, assume_held=False).troubles == []


def test_a_run_that_ends_is_not_requeued(tmp_path: Path) -> None:
    """Between the decision to stop and the end a run is ending; it is requeued where the decision is to go on."""
    run = ledgers.Written(tmp_path / "run")
    run.launcher(0, "submitted")
    run.supervisor(0, 1, "started", pid=1)
    run.outcome(0, outcome="done", reason="finished", step=7, committed_step=7, ended=5.0)
    said = []
    for action, reason in (("restart", "killed"), ("stop", "done")):
        run.launcher(6, "decision", action=action, reason=reason)
        status = run_status.status(run.store, assume_held=True)
        said.append((str(status.state), status.reason))
    assert said == [("requeued", "killed"), ("running", "ending: done")]


def test_what_nobody_restarts() -> None:
    """Without a watchdog that is said; what a ledger does not tell is left out."""
    event = {"t": time.time(), "event": "silent", "waited_s": 7200, "budget_s": None}
    told = troubles.of(event)
    assert told is not None
    assert told.text == "no step for 2 h; never restarted: --stall"
    assert troubles.of({"event": "silent", "t": "x", "waited_s": []}) is not None
    assert troubles.of({"event": "opened", "t": 0}) is None


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project."""
    yield from make_project(tmp_path)


@pytest.mark.slow
def test_a_program_that_hangs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real program stops after steps of 20 ms: after a minute everybody knows, once, and when it goes on, too."""
    monkeypatch.setenv("TELL", f"sh -c 'cat >> {project.path}/told; echo >> {project.path}/told'")
    store = project.submit("step:300,sleep:75,hold", notify=("env:TELL",))
    until(lambda: run_status.status(store).troubles, "it is noticed", seconds=120)
    assert "no step for " in project.cli("status", store.url).stdout
    assert "(usually 0.0" in project.cli("ls", str(project.runs)).stdout
    until(lambda: not run_status.status(store).troubles, "it goes on", seconds=60)
    until((project.path / "told").exists, "it is told")
    project.cli("cancel", store.url)
    told = [json.loads(line) for line in (project.path / "told").read_text().splitlines()]
    assert [one["event"] for one in told if not one["final"]] == ["silent"]
    assert told[0]["reason"].endswith("; restarted after 1 h: --stall")
