"""Goodput: three histories worked out by hand, and shares that sum to 1 whatever a ledger holds."""

import json
import math
import random
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import astuple

from launch.lifecycle.history import History, Life, read_history
from launch.report.goodput import Goodput, measure
from launch.report.phases import RunPhase
from tests.harness import ledgers
from tests.harness.jobs import ROOT, Project

OVER = {"over": True}


def figures(run: ledgers.Written, *, now: float | None = None) -> Goodput:
    """Measure a run that was written by hand; alive until `now` if that is given."""
    history = read_history(run.store)
    history.now = now
    return measure(history)


def seconds(found: Goodput) -> dict[str, float]:
    """Return the phases that took any time."""
    return {str(phase): spent for phase, spent in found.time.seconds.items() if spent}


def test_smooth(tmp_path: Path) -> None:
    """A run without interruption: every figure as worked out here.

    1000 submitted   queue 10   until 1010 started
    1010             start 5    until 1015 fresh
    1015             compile 5  until 1020 first_step, of which 1016..1017 the start save blocked: save 1, compile 4
    1020             train      until 1095, of which 1055..1057 the save of step 50 blocked: train 35 + 38 = 73, save 2
    1095             save 5     until 1100: the last save waits until it is durable (5 s), whatever its blocking_s says
    1100 finished    stop 2     until 1102 exited
    1102             idle 1     until 1103 ended
    Total 103, held 92, saves 1 + 2 + 5 = 8.
    """
    found = figures(ledgers.smooth(tmp_path / "r"))
    assert seconds(found) == {
        "train": 73.0, "save": 8.0, "stop": 2.0, "start": 5.0, "compile": 4.0, "queue": 10.0, "idle": 1.0,
    }  # fmt: skip
    assert (found.time.total_s, found.time.held_s, found.time.off_s) == (103.0, 92.0, 0.0)
    assert found.time.goodput == pytest.approx(73 / 103)
    assert found.time.goodput_held == pytest.approx(73 / 92)
    assert astuple(found.progress) == (100, 100, 0, 0)
    assert astuple(found.preemption) == (0, 0, 0, None, None)
    assert found.first_step_s is not None
    assert found.first_step_s.max == 10.0  # 1010 to 1020
    assert (found.saving.saves, found.saving.save_bytes) == (3, 4_200)
    assert found.saving.blocking_s is not None
    assert found.saving.durable_s is not None
    assert (found.saving.blocking_s.total, found.saving.blocking_s.median) == (8.0, 2.0)  # 1, 2, 5
    assert (found.saving.durable_s.total, found.saving.durable_s.max) == (12.0, 5.0)  # 2, 5, 5
    assert astuple(found.compiling) == (3, 1, 2.5)
    assert found.money.cost is found.money.cost_lost is None
    assert found.attempts[0].ending_s == 0.0


def test_interrupted(tmp_path: Path) -> None:
    """A kill and a preemption on a cluster: every figure as worked out here.

    queue      0..60 until the job starts, and 255..355 until it starts again: 160
    idle       60..70, then 171..180 between the attempts in one job, then 355..357: 21
    attempt 0  70..171: start 10, compile 10 (80..90); the save of step 50 began at 144 - 4 = 140 and blocked 1 s.
               Attempt 1 restored 50, so all from 140 on is lost: train 90..140 = 50, lost 140..171 = 31 (80 - 50 steps)
    attempt 1  180..255: restore 4 (188..192), start 180..188 = 8, compile 8, train 200..250 = 50 (the step in progress
               at the notice is completed: that is training), emergency 250..254 = 4, stop 1
    attempt 2  357..402: restore 1 (363..364), start 6, compile 6, train 370..399 = 29, save 1, stop 2
    Total 402, held 101 + 75 + 45 = 221, train 129. At 36 an hour a second costs 0.01: 2.21, of which 0.92 not training.
    Ending 0 cost 31 lost + 9 idle + attempt 1's 8 start, 4 restore, 8 compile = 60; ending 1 cost 4 emergency + 1 stop
    + 102 waiting + 6 + 1 + 6 = 120.
    """
    found = figures(ledgers.interrupted(tmp_path / "r"))
    assert seconds(found) == {
        "train": 129.0, "lost": 31.0, "save": 1.0, "emergency": 4.0, "stop": 3.0, "start": 24.0, "restore": 5.0,
        "compile": 24.0, "queue": 160.0, "idle": 21.0,
    }  # fmt: skip
    assert (found.time.total_s, found.time.held_s) == (402.0, 221.0)
    # 80 + 50 + 30 steps were executed, 130 of them different ones.
    assert astuple(found.progress) == (130, 160, 30, 30)
    assert astuple(found.preemption)[:4] == (1, 1, 1, 1.0)
    assert found.preemption.notice_to_commit_s is not None
    assert (found.preemption.notice_to_commit_s.count, found.preemption.notice_to_commit_s.max) == (1, 4.0)
    assert found.first_step_s is not None
    assert (found.first_step_s.median, found.first_step_s.total) == (20.0, 53.0)  # 20, 20, 13
    assert found.money.cost == pytest.approx(2.21)
    assert found.money.cost_lost == pytest.approx(0.92)
    assert [one.ending_s for one in found.attempts] == [60.0, 120.0, 0.0]
    assert [one.lost_steps for one in found.attempts] == [30, 0, 0]
    assert found.attempts[0].node == "n1"


def test_troubled(tmp_path: Path) -> None:
    """A stall, a notice served too late, a resume by hand and a damaged checkpoint, seen while it runs, at 1172.

    queue      0..1
    attempt 0  1..112: start 1, compile 8, then training from 10; stalled from 110 - 60 = 50 to the end: 62.
               Attempt 2 began afresh, so that all 40 steps of it are lost: lost 10..50 = 40
    idle       112..114, and 150..151 until the end: 3
    attempt 1  114..150: restore 2 (116..118), start 2, compile 2, all 22 steps lost: 120..142 = 22; emergency from
               142, never committed: 8
    off        151..1151
    idle       1151..1152: 1 (4 in all)
    attempt 2  1152..1172: start 3, compile 5, train 1160..1172 = 12
    Total 1172 - 1000 = 172, held 111 + 36 + 20 = 167.
    """
    found = figures(ledgers.troubled(tmp_path / "r"), now=1172.0)
    assert seconds(found) == {
        "train": 12.0, "lost": 62.0, "stalled": 62.0, "emergency": 8.0, "start": 6.0, "restore": 2.0, "compile": 15.0,
        "queue": 1.0, "idle": 4.0,
    }  # fmt: skip
    assert (found.time.total_s, found.time.held_s, found.time.off_s) == (172.0, 167.0, 1000.0)
    # 40 + 22 + 11 executed: 0..40, 30..52, 0..11; 52 different ones.
    assert astuple(found.progress) == (11, 73, 62, 21)
    assert astuple(found.preemption)[:4] == (1, 1, 0, 0.0)
    assert (found.stalls, found.preemption.notice_to_commit_s, found.ended) == (1, None, None)
    assert [one.ended for one in found.attempts] == [112.0, 150.0, None]


def test_command(tmp_path: Path) -> None:
    """`jobkit report --json` tells these very figures: one object for a run, a list for several, without jax."""
    project = Project(tmp_path)
    runs = [ledgers.smooth(tmp_path / "runs/a"), ledgers.interrupted(tmp_path / "runs/b")]
    for run in runs:
        done = project.cli("report", "--json", str(run.path), PYTHONPATH=f"{no_jax(tmp_path)}:{ROOT}")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == json.loads(to_json(run))
    both = json.loads(project.cli("report", "--json", str(tmp_path / "runs")).stdout)
    assert [one["name"] for one in both] == ["a", "b"]


def to_json(run: ledgers.Written) -> str:
    """Return what is to be printed for a run that is over."""
    from launch.lifecycle import run_status

    history = read_history(run.store, state="done", reason="done")
    return run_status.to_json(measure(history).for_json())


def test_json_has_no_groups(tmp_path: Path) -> None:
    """All figures stand beside each other in JSON, in an order that stays."""
    names = (
        "run name state reason submitted ended total_s held_s off_s seconds shares goodput goodput_held steps "
        "executed_steps lost_steps repeated_steps notices to_save saved_on_notice save_hit_rate notice_to_commit_s "
        "first_step_s saves failed_saves blocking_s durable_s save_bytes compile_hits compile_misses compile_s stalls "
        "price_per_hour cost cost_lost attempts intervals"
    )
    document = json.loads(to_json(ledgers.interrupted(tmp_path / "r")))
    assert list(document) == names.split()
    assert list(document["seconds"]) == list(document["shares"]) == [str(one) for one in RunPhase if one != "off"]
    assert document["intervals"][0] == {"start": 0.0, "end": 60.0, "phase": "queue", "attempt": None}


def no_jax(path: Path) -> Path:
    """Make a directory of modules that refuse to be imported."""
    directory = path / "no-jax"
    directory.mkdir(exist_ok=True)
    for name in ("jax", "numpy", "matplotlib", "orbax"):
        (directory / f"{name}.py").write_text(f"raise ImportError('{name} must not be loaded')")
    return directory


# A run that is alive, or that left little behind.


def test_nothing_yet(tmp_path: Path) -> None:
    """A run that was submitted and waits is all queue; one without an event has no time at all."""
    run = ledgers.Written(tmp_path / "r")
    assert figures(run).time.total_s == 0.0
    assert set(figures(run).time.shares.values()) == {0.0}
    run.launcher(5, "submitted")
    assert seconds(figures(run, now=25.0)) == {"queue": 20.0}


def test_without_a_launcher(tmp_path: Path) -> None:
    """A program that was started by hand has its time cut by its own events alone."""
    run = ledgers.Written(tmp_path / "r")
    run.program(0, 10, "opened")
    run.program(0, 11, "fresh", step=0)
    run.program(0, 13, "first_step", step=1)
    run.program(0, 20, "finished", step=8)
    assert seconds(figures(run)) == {"start": 1.0, "compile": 2.0, "train": 7.0}


def test_kept_steps_between_known_points(tmp_path: Path) -> None:
    """Where the save that was restored left no event, the moment it stands for is found between the steps around it.

    Attempt 0 trains from 10 (step 1) to 30 (step 21), a second a step; step 11 was restored, so 20..30 is lost.
    """
    run = ledgers.Written(tmp_path / "r")
    run.supervisor(0, 0, "started")
    run.program(0, 5, "fresh", step=0)
    run.program(0, 10, "first_step", step=1)
    run.supervisor(0, 30, "exited", outcome="killed")
    run.outcome(0, outcome="killed", step=21, committed_step=11)
    assert seconds(figures(run)) == {"start": 5.0, "compile": 5.0, "train": 10.0, "lost": 10.0}


def test_an_old_attempt_still_writes(tmp_path: Path) -> None:
    """What an attempt writes after its successor began moves nothing of the successor's time."""
    run = ledgers.Written(tmp_path / "r")
    for attempt, start in ((0, 0), (1, 50)):
        run.supervisor(attempt, start, "started")
        run.program(attempt, start + 1, "fresh", step=0)
        run.program(attempt, start + 2, "first_step", step=1)
    run.program(0, 80, "notice", step=70)
    run.program(0, 90, "stopped", step=70)
    run.supervisor(0, 95, "exited", outcome="preempted")
    run.supervisor(1, 100, "exited", outcome="failed")
    found = figures(run)
    assert found.time.total_s == 100.0
    assert [(one.started, one.ended) for one in found.attempts] == [(0.0, 50.0), (50.0, 100.0)]


def test_a_long_history_keeps_its_ends(tmp_path: Path) -> None:
    """Of many thousand logged values few are looked at, the last one among them: the last step is known from it."""
    run = ledgers.Written(tmp_path / "r")
    run.supervisor(0, 0, "started")
    run.program(0, 1, "fresh", step=0)
    run.program(0, 2, "first_step", step=1)
    path = run.store.file("attempts/0/events-0.jsonl")
    lines = (
        f'{{"t":{2 + step / 10},"event":"metrics","step":{step},"values":{{"loss":1}}}}\n' for step in range(20_001)
    )
    path.write_text(path.read_text() + "".join(lines))
    history = read_history(run.store)
    assert len(history.lives[0].program) < 2_500
    assert measure(history).attempts[0].to_step == 20_000
    assert seconds(measure(history)) == {"start": 1.0, "compile": 1.0, "lost": 2000.0}  # nothing was committed


def test_a_clock_that_is_set_back(tmp_path: Path) -> None:
    """Within one file the order written counts: what comes after the clock was set back happened no earlier.

    Opened at 12; then the clock is set back by 7, so that `fresh` says 6 and `first_step` 8. Both count as 12.
    """
    run = ledgers.Written(tmp_path / "r")
    run.supervisor(0, 10, "started")
    run.program(0, 12, "opened")
    run.program(0, 6, "fresh", step=0)
    run.program(0, 8, "first_step", step=1)
    run.supervisor(0, 30, "exited", outcome="done")
    run.outcome(0, outcome="done", step=5, committed_step=5)
    assert seconds(figures(run)) == {"start": 2.0, "train": 18.0}


# Any history.

NAMES = [
    "submitted", "resumed", "cancelled", "decision", "ended", "job_started", "requeued", "started", "notice", "exited",
    "opened", "fresh", "restored", "first_step", "saved", "skipped", "save_failed", "stalled", "stopped", "finished",
    "metrics", "plan", "compiled", "raised", "strange", "silent", "heard_again",
]  # fmt: skip
times = st.floats(-1e9, 1e10) | st.integers(0, 1000)
numbers = st.integers(-5, 200) | st.floats(allow_nan=True) | st.none() | st.just("x")
fields = ["step", "seconds", "blocking_s", "durable_s", "waited_s", "notice_to_commit_s", "hits", "bytes", "reason"]
events = st.builds(
    lambda t, event, more: {"t": t, "event": event} | more,
    times,
    st.sampled_from(NAMES),
    st.dictionaries(st.sampled_from(fields), numbers, max_size=4),
)
outcomes = st.dictionaries(st.sampled_from(["step", "committed_step", "started", "ended", "outcome"]), numbers)
lives = st.builds(
    Life, st.integers(0, 5), st.lists(events, max_size=12), st.lists(events, max_size=6),
    st.dictionaries(st.sampled_from(["1", "2"]), st.lists(events, max_size=2)), outcomes,
)  # fmt: skip
histories = st.builds(
    lambda launcher, lives, now, price: History(
        launcher=launcher, lives=list({life.number: life for life in lives}.values()), now=now, price_per_hour=price
    ),
    st.lists(events, max_size=10),
    st.lists(lives, max_size=5),
    st.none() | times,
    st.none() | st.floats(0, 100),
)


def check_sums(found: Goodput) -> None:
    """Check what holds for every history."""
    intervals = found.intervals
    for earlier, later in pairwise(intervals):
        assert earlier.end == later.start
    assert all(interval.seconds > 0 for interval in intervals)
    whole = intervals[-1].end - intervals[0].start if intervals else 0.0
    assert math.isclose(found.time.total_s + found.time.off_s, whole, rel_tol=1e-9, abs_tol=1e-6)
    assert math.isclose(sum(found.time.shares.values()), 1.0 if found.time.total_s else 0.0, rel_tol=1e-9)
    assert math.isclose(math.fsum(found.time.seconds.values()), found.time.total_s, abs_tol=1e-6)
    assert all(0 <= share <= 1 for share in found.time.shares.values())
    held = math.fsum(one.held_s for one in found.attempts)
    assert math.isclose(held, found.time.held_s, rel_tol=1e-9, abs_tol=1e-6)
    assert found.time.held_s <= found.time.total_s * (1 + 1e-9) + 1e-6
    for one in found.attempts:
        assert math.isclose(math.fsum(one.seconds.values()), one.held_s, rel_tol=1e-9, abs_tol=1e-6)
        assert one.lost_steps <= (one.to_step or 0) - (one.from_step or 0)
    notices, to_save, saved_on_notice, *_ = astuple(found.preemption)
    assert 0 <= saved_on_notice <= to_save <= notices <= len(found.attempts)
    assert 0 <= found.progress.repeated_steps <= found.progress.executed_steps
    assert 0 <= found.progress.lost_steps <= found.progress.executed_steps


@given(histories)
@settings(deadline=None, max_examples=120)
def test_any_history(history: History) -> None:
    """Whatever the ledgers hold, the intervals follow one another and the shares sum to 1."""
    check_sums(measure(history))


@given(st.randoms(use_true_random=False), st.sampled_from([ledgers.smooth, ledgers.interrupted, ledgers.troubled]))
@settings(deadline=None, max_examples=40)
def test_a_real_history_damaged(dice: random.Random, write: Any) -> None:
    """Tear lines, lose files, let clocks jump, add more processes: the shares of what is left still sum to 1."""
    with tempfile.TemporaryDirectory() as directory:
        run = write(Path(directory) / "r")
        for path in sorted(run.path.rglob("*.jsonl")) + sorted(run.path.rglob("outcome.json")):
            if dice.random() < 0.15:
                path.unlink()
                continue
            if path.suffix == ".json":
                continue
            lines = [line for line in path.read_bytes().splitlines() if dice.random() < 0.9]
            if lines and dice.random() < 0.5:
                lines[-1] = lines[-1][: dice.randrange(len(lines[-1]))]
            jump = dice.choice([0, 0, -500, 3600])
            since = dice.randrange(len(lines) + 1)
            moved = [_move(line, jump) if index >= since else line for index, line in enumerate(lines)]
            path.write_bytes(b"\n".join(moved))
        run.store.write("attempts/0/events-1.jsonl", '{"t":55,"event":"notice","source":"x"}\n')
        check_sums(figures(run, now=dice.choice([None, 90.0, 5000.0])))


def _move(line: bytes, jump: float) -> bytes:
    try:
        event = json.loads(line)
    except ValueError:
        return line
    return json.dumps(event | {"t": event["t"] + jump}).encode()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50), st.booleans()), min_size=1, max_size=6))
@settings(deadline=None)
def test_any_training(lifes: list[tuple[int, int, bool]]) -> None:
    """However attempts rewind and die, a second a step: training is a second for each step that the run still has.

    Each attempt goes back some steps, trains some, and ends killed or, having saved all, preempted.
    """
    with tempfile.TemporaryDirectory() as directory:
        run = ledgers.Written(Path(directory) / "r")
        t, reached, committed, owned = 0.0, 0, 0, []
        for number, (back, ahead, saves) in enumerate(lifes):
            first = max(0, committed - back)
            owned = owned[:first]
            run.supervisor(number, t, "started")
            run.program(number, t + 5, "restored" if number else "fresh", step=first, seconds=1.0)
            t += 10
            run.program(number, t, "first_step", step=first)  # the first step, compiled, is not counted here
            reached = first + ahead
            for step in range(first, reached):
                run.program(number, t + step - first, "metrics", step=step, values={"loss": 1.0})
            owned += [number] * ahead
            t += ahead
            committed = reached if saves else first
            owned = owned[:committed]
            if saves:
                run.program(number, t, "saved", step=reached, reason="interval", blocking_s=0.0, durable_s=0.0)
            run.supervisor(number, t, "exited", outcome="preempted" if saves else "killed")
            run.outcome(number, outcome="preempted" if saves else "killed", step=reached, committed_step=committed)
        found = figures(run)
        check_sums(found)
        assert found.progress.steps == committed
        assert math.isclose(found.time.seconds[RunPhase.TRAIN], len(owned), abs_tol=1e-6)
        assert math.isclose(
            found.time.seconds[RunPhase.LOST], sum(ahead for _, ahead, _ in lifes) - len(owned), abs_tol=1e-6
        )
