"""jobkit drill: what it asks of a program, how it judges, what it shows; and that it finds each planted bug."""

import argparse
import contextlib
import dataclasses
import datetime
import html
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.progress import Progress, TextColumn

import jobkit
from jobkit import contract, faults
from jobkit.checkpoint import state
from jobkit.checkpoint.kinds import part_of
from jobkit.checkpoint.schedule import SaveEvery
from jobkit.contract import Outcome, State
from jobkit.drill import looks
from jobkit.drill.held import Outside
from jobkit.drill.looks import Kind, Look, Looks
from jobkit.drill.settings import Drill, drill_from
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir import commits
from jobkit.rundir.ledger import attempt_events
from jobkit.rundir.store import Store
from launch.console import Console
from launch.drill import card as drill_card
from launch.drill import comparing, diagnosis, progress, reference, scenarios, suspects, verdict
from launch.drill.drill import shared_cache
from launch.drill.observe import Ending
from launch.drill.reference import Reference
from launch.drill.suspects import Diagnosis, Restart
from launch.drill.verdict import DrillResult, Trial
from launch.lifecycle.run_status import Status
from tests.harness import browser
from tests.harness.jobs import command_line
from tests.harness.slurm import Cluster

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "tests/drill_scripts"


def drill(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `jobkit drill` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "launch", "drill", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environ,
        capture_output=True,
        text=True,
        check=False,
    )


# What a program is asked.


def test_drill_travels_in_the_environment() -> None:
    """What the drill asks arrives as it was asked; outside of a drill there is nothing."""
    asked = Drill(until=60, save_every=15, pace_s=0.01, probe=(0, 1))
    assert drill_from({contract.ENV_DRILL: asked.to_json()}) == asked
    assert drill_from({}) is None
    assert drill_from({contract.ENV_DRILL: ""}) is None


@pytest.mark.parametrize(("own", "steps"), [("10m", 15), ("10 steps", 10), ("100 steps", 15), (None, 15)])
def test_saves_often_enough(own: str | None, steps: int) -> None:
    """A drill saves by steps, at least as often as it needs, and never by the clock."""
    strategy = SaveEvery.parse(own)
    Drill(save_every=15).adapt(strategy)
    assert (strategy.every_steps, strategy.every_s) == (steps, float("inf"))


@pytest.mark.parametrize(
    ("fault", "attempt", "passes"),
    [
        ("step:2@0=USR1", "0", 2),
        ("step:2@0=USR1", "1", 0),
        ("step=USR1", "5", 1),
        ("other=USR1", "0", 0),
        ("step:2@0=USR1+0.05", "0", 3),
    ],
)
def test_fault_at_a_point(monkeypatch: pytest.MonkeyPatch, fault: str, attempt: str, passes: int) -> None:
    """A fault names a point, which pass of it, the attempt and the signal."""
    taken: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: taken.append(number))
    monkeypatch.setattr(faults, "_passes", type(faults._passes)())
    monkeypatch.setenv(contract.ENV_FAULT, fault)
    monkeypatch.setenv(contract.ENV_ATTEMPT, attempt)
    try:
        hit = 0
        for number in range(1, 5):
            faults.reach("step")
            time.sleep(0.04)  # one that comes later comes in the next
            if taken and not hit:
                hit = number
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert hit == passes
    assert len(taken) == (passes > 0)


def test_clock_that_stands_still() -> None:
    """Every way to ask for the time of day gives the same, and durations go on."""
    code = (
        "import datetime; before = datetime.datetime, datetime.date\n"
        "from jobkit.drill.frozen_clock import freeze; freeze(1.7e9)\n"
        "import time\nfrom datetime import datetime as d\nfrom time import time as t\n"
        "assert (datetime.datetime, datetime.date) == before  # the types that libraries were compiled against\n"
        "assert d.today() == d.now() and datetime.date.today() == d.now().date()\n"
        "a = time.monotonic(); time.sleep(0.01)\n"
        "print(t(), time.time_ns(), d.now(datetime.UTC).isoformat(), time.gmtime().tm_year, time.monotonic() > a)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    when = datetime.datetime.fromtimestamp(1.7e9, datetime.UTC).isoformat()
    assert done.stdout.split() == ["1700000000.0", "1700000000000000000", when, "2023", "True"]


@pytest.mark.timing
def test_probe_measures_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger has each loop's total and the steps that took much longer than usual, without the drill's own pace."""
    monkeypatch.setenv(contract.ENV_DRILL, Drill(until=12, pace_s=0.01).to_json())
    with jobkit.Run(tmp_path / "r") as run:
        run.resume(count=0, optimizer=None)
        for step in run.steps(100):
            run.state.count += 1
            time.sleep(0.3 if step in (0, 5, 9) else 0.0)
    events = {event["event"]: event for event in attempt_events(Store(tmp_path / "r"), 0)}
    assert (events["loop"]["total"], events["finished"]["step"]) == (100, 12)
    slow = events["step_times"]["slow"]  # others, too, where the machine is busy
    assert {5, 9} <= {step for step, seconds in slow if 0.29 < seconds < 3}
    assert 0 not in dict(slow)
    assert reference.last_long([(5, 4.0), (9, 0.9), (10, 0.1)]) == (9, 0.9)
    assert reference.last_long([]) is None
    assert events["step_times"]["usual_s"] < 0.01


@pytest.mark.parametrize("known", [True, False])
def test_probe_tells_where_epochs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """A loop over data has the end that the data tells; where it tells none, the ledger says so, behind other loops
    too, and the reference is no whole training.
    """
    monkeypatch.setenv(contract.ENV_DRILL, Drill(until=9).to_json())
    rows = np.arange(6.0, dtype=np.float32)
    batches = jobkit.Batches(rows, batch_size=2) if known else jobkit.Batches(lambda seed, epoch: [rows[:2]] * 3)
    with jobkit.Run(tmp_path / "r", trackers=()) as run:
        run.resume(w=0.0, batches=batches, optimizer=None)
        for _ in run.steps(2):
            run.state.w += 1
        for epoch in run.epochs(5, batches):
            for batch in epoch:
                run.state.w += float(batch.sum())
    shown = replace(reference.read(Store(tmp_path / "r")), until=9)
    assert (shown.steps, shown.counted, shown.total, shown.whole) == (9, True, 17 if known else None, False)
    assert (replace(shown, until=17).whole, replace(shown, until=None).whole) == (True, True)
    assert named("notice-end").lacking(shown) == ""


class Held:
    """An object of the program's own, as a class of a trainer might be."""

    def __init__(self) -> None:
        self.count = 0
        self.generator = np.random.default_rng(0)


def counted() -> Any:
    """Yield numbers without end."""
    number = 0
    while True:
        number += 1
        yield number


@pytest.mark.slow
def test_probe_sees_what_is_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the loop, attributes, generators and global generators: each by name and kind."""
    monkeypatch.setenv(contract.ENV_DRILL, Drill(until=3, probe=(0, 1, 2)).to_json())
    held, numbers, constant, listed = Held(), counted(), np.ones(3), iter([1, 2, 3])
    with jobkit.Run(tmp_path / "r") as run:
        run.resume(count=0, optimizer=None)
        for step in run.steps(100):
            run.state.count += 1
            batch = np.full(2, step)
            held.count += 1
            held.generator.random()
            next(numbers), next(listed), random.random()
            del batch
    assert run.step == 3
    seen = looks.read(attempt_events(Store(tmp_path / "r"), 0))
    assert sorted(seen) == [0, 1, 2]
    first, second = seen[1].outside, seen[2].outside
    here = "in test_drill.py:test_probe_sees_what_is_no_part"
    kinds = {"held.count": Kind.NUMBER, "held.generator": Kind.RNG, "numbers": Kind.ITERATOR, "listed": Kind.ITERATOR}
    for name, kind in kinds.items():
        assert first[f"{name} {here}"].kind is kind
        assert first[f"{name} {here}"] != second[f"{name} {here}"], name
    assert first[f"constant {here}"] == second[f"constant {here}"]
    assert constant.sum() == 3
    assert seen[1].parts["count"] != seen[2].parts["count"]
    assert seen[1].random != seen[2].random
    assert seen[1].numpy == seen[2].numpy
    assert not [name for name in first if name.startswith(("run ", "pytest ", "pytest.", "sys ", "sys."))]


class Slotted:
    """An object without a __dict__."""

    __slots__ = ("level",)

    def __init__(self) -> None:
        self.level = 0

    def rise(self) -> int:
        """Count."""
        self.level += 1
        return self.level


def test_probe_sees_what_is_held_out_of_sight() -> None:
    """Slots, namespaces, and what only a bound method holds: a counter of one's own, a generator, a list."""
    slotted, options = Slotted(), types.SimpleNamespace(rate=1.0)
    parsed = argparse.Namespace(decay=1.0)
    rise, draw, keep = Slotted().rise, np.random.default_rng(0).normal, list[float]().append
    handed_on = np.random.default_rng(1)
    keep(handed_on.random())

    def look() -> dict[str, Any]:
        outside = Outside(set(), set())
        outside.walk(sys._getframe(1))
        here = " in test_drill.py:test_probe_sees_what_is_held_out_of_sight"
        return {name.removesuffix(here): one for name, one in outside.variables.items() if name.endswith(here)}

    looks = [look()]
    slotted.rise(), rise(), draw(), keep(1.0)
    options.rate, parsed.decay = 0.5, 0.5
    before, after = looks[0], look()
    names = {"slotted.level", "options.rate", "parsed.decay", "rise.level", "draw", "keep"}
    assert {name for name in before if after[name].crc != before[name].crc} == names
    assert after["draw"].kind is Kind.RNG
    assert after["handed_on"].live  # though the function itself does not read it again


class Patient:
    """Patience of the program's own, with the methods of a part."""

    def __init__(self) -> None:
        self.best = 1.0

    def state_dict(self) -> dict[str, float]:
        """Return what it knows."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take it back."""
        self.best = state["best"]


def test_probe_sees_what_could_have_been_a_part() -> None:
    """Objects with a position that nobody gave to the run, jobkit's own too: data as data, others as counters."""
    stopping, patient = jobkit.EarlyStopping(patience=3), Patient()
    batches, given = (jobkit.Batches(np.arange(6.0), batch_size=2) for _ in range(2))

    def look() -> dict[str, Any]:
        outside = Outside({id(given)}, set())
        outside.walk(sys._getframe(1))
        here = " in test_drill.py:test_probe_sees_what_could_have_been_a_part"
        return {name.removesuffix(here): one for name, one in outside.variables.items() if name.endswith(here)}

    before = look()
    stopping.update(1.0), next(batches), next(given)
    patient.best = 0.5
    after = look()
    changed = {name: after[name].kind for name in before if after[name].crc != before[name].crc}
    assert changed == {"stopping": Kind.NUMBER, "patient": Kind.NUMBER, "batches": Kind.ITERATOR}


def test_what_holds_itself_is_passed_over() -> None:
    """A container that is in itself, as `names = globals()`, is not followed; what is beside it is seen."""
    ring: dict[str, Any] = {"count": 1, "held": []}
    ring["held"].append(ring)
    beside = [ring["count"], {"twice": (1, 2), "thrice": (1, 2)}]
    outside = Outside(set(), set())
    outside.walk(sys._getframe())
    here = "in test_drill.py:test_what_holds_itself_is_passed_over"
    assert f"beside {here}" in outside.variables
    assert f"ring {here}" not in outside.variables
    assert len(beside) == 2


def test_probe_sees_what_was_given_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A boundary without its arrays is found though nothing is saved there; the verdict and the diagnosis say so."""
    monkeypatch.setenv(contract.ENV_DRILL, Drill(until=9).to_json())
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with jobkit.Run(tmp_path / "r", save_every="3 steps") as run:
        tree = run.resume(tree={"w": jnp.zeros(3), "key": jax.random.key(0)}, optimizer=None).tree
        for number in run.steps(100):
            tree = {"w": step(tree["w"]), "key": tree["key"]}
            if number == 0 or number % 3 == 2:
                run.state.tree = tree
    store = Store(tmp_path / "r")
    assert commits.steps(store)[-1] == 9
    assert [event for event in attempt_events(store, 0) if event["event"] == "save_failed"] == []
    trial = Trial("notice", "text")
    verdict.judge(trial, named("notice"), store, REFERENCE)
    assert trial.donated
    assert "a save after step 2 would have failed: tree/w had been given away (donate_argnums)" in trial.broken
    told = diagnosis.donated(store.url)
    assert told is not None
    assert (told.name, told.step, told.tensor) == ("donated buffer", 2, "tree/w")


def _save_donated(tree: Any) -> None:
    state.take({"tree": part_of("tree", tree)}).check_whole()


STUMBLES: dict[str, Callable[[Any], Any]] = {
    "waiting": jax.block_until_ready,
    "reading": lambda tree: np.asarray(tree["w"]),
    "computing": lambda tree: jax.jit(lambda tree: tree["w"] * 2)(tree),
    "saving": _save_donated,
}


@pytest.mark.parametrize("how", STUMBLES)
def test_whatever_is_said_of_what_was_given_away(tmp_path: Path, how: str) -> None:
    """Whoever touches a donated array says it in other words, in the ledger or in the log: all are understood."""
    tree = {"w": jnp.ones(3), "v": jnp.ones(2)}
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(tree)
    with pytest.raises((RuntimeError, ValueError, JobkitError)) as raised:
        STUMBLES[how](tree)
    logs, tells = Store(tmp_path / "logs"), Store(tmp_path / "tells")
    logs.write(contract.log_file(0), f"step 3\n{type(raised.value).__name__}: {raised.value}\ngoodbye\n")
    told = json.dumps({"t": 1.0, "event": "raised", "error": str(raised.value)})
    tells.write(contract.events_file(0, 0), told + "\n")
    for store in (logs, tells):
        found = diagnosis.donated(str(tmp_path / "none"), store.url)
        assert found is not None
        assert found.name == "donated buffer"
    logs.write(contract.log_file(0), "the old index has been deleted\n")
    assert diagnosis.donated(logs.url) is None


# How it judges.

REFERENCE = Reference(
    run="r/reference", steps=60, step_s=0.1, start_s=3.0, save_s=0.2, save_every=15, pace_s=0.0, total=60, usual_s=0.1
)  # fmt: skip


def wrote(path: Path, *endings: tuple[str, int], resumed: tuple[int | None, ...] = ()) -> Store:
    """Write a run whose attempts ended so: outcome and step; `resumed` is where the later ones went on, if they did."""
    store = Store(path / "run")
    for attempt, (outcome, step) in enumerate(endings):
        told = {"outcome": outcome, "step": step, "reason": "why", "ended": 10.0}
        store.write(f"attempts/{attempt}/outcome.json", json.dumps(told))
        if attempt and resumed[attempt - 1] is not None:
            event = {"t": 12.0, "event": "restored", "step": resumed[attempt - 1]}
            store.write(f"attempts/{attempt}/events-0.jsonl", json.dumps(event) + "\n")
    store.write("checkpoints/60/commit.json", "{}")
    return store


def named(name: str) -> scenarios.Scenario:
    return next(one for one in scenarios.ALL if one.name == name)


@pytest.mark.parametrize(
    ("name", "endings", "resumed", "broken"),
    [
        ("notice", [("preempted", 37), ("done", 60)], (37,), ""),
        ("notice", [("preempted", 37), ("done", 60)], (36,), "1 steps were lost on a notice"),
        ("notice", [("killed", 37), ("done", 60)], (37,), "attempt 0 ended killed (why), not preempted"),
        ("notice", [("killed", 30), ("preempted", 37), ("done", 60)], (30, 37), "it took 3 attempts and should have"),
        ("after", [("killed", 60), ("done", 60)], (60,), ""),
        ("after", [("killed", 60), ("failed", 60)], (60,), "it did not get to its end: why"),
        ("notice", [("preempted", 37), ("failed", 40)], (37,), "it did not get to its end: why"),
        ("kill", [("killed", 37), ("done", 60)], (30,), ""),
        ("kill", [("killed", 37), ("done", 60)], (15,), "the interval and the save in flight are at most 21"),
        ("damage", [("killed", 37), ("done", 60)], (15,), ""),
        ("twice", [("killed", 37), ("killed", -1), ("done", 60)], (None, 30), ""),
        ("twice", [("killed", 37), ("killed", -1), ("done", 60)], (None, 0), "37 steps were lost on a kill"),
        ("notice-end", [("done", 60)], (), ""),
        ("notice-end", [("preempted", 59), ("done", 60)], (59,), "it took 2 attempts and should have taken 1"),
        ("zombie", [("storage", 37), ("done", 60)], (30,), ""),
    ],
)
def test_judgement(
    tmp_path: Path, name: str, endings: list[tuple[str, int]], resumed: tuple[int, ...], broken: str
) -> None:
    """A notice costs nothing, a kill the interval and the save in flight; every attempt has to end as it must."""
    trial = Trial(name, "text")
    verdict.judge(trial, named(name), wrote(tmp_path, *endings, resumed=resumed), REFERENCE)
    assert [line for line in trial.broken if broken in line] if broken else trial.broken == []
    assert trial.survived is not bool(broken)


def test_what_was_not_hit_is_not_judged(tmp_path: Path) -> None:
    """A run that was over before it could be hit breaks no promise and shows none: that is no certificate."""
    trial = Trial("notice", "text", identical=True)
    verdict.judge(trial, named("notice"), wrote(tmp_path, ("done", 60)), REFERENCE)
    assert (trial.missed, trial.broken, trial.survived) == ("the run was over before it could be hit", [], False)
    missed = DrillResult(("train",), "d", REFERENCE, [trial], None, 1.0)
    assert (missed.verdict, missed.verdict.exit_code) == (verdict.Verdict.NOT_JUDGED, 2)
    assert DrillResult(("train",), "d", REFERENCE, [], None, 1.0).verdict.exit_code == 2
    missed.trials.append(Trial("kill", "text", broken=["it ended with other bits"]))
    assert missed.verdict.exit_code == 1
    assert DrillResult(("train",), "d", REFERENCE, [Trial("kill", "text")], None, 1.0).verdict.exit_code == 0


def test_occasions() -> None:
    """Moments come from the reference: the last long step, what follows the last commit, or what is asked for."""
    assert named("evaluation").lacking(REFERENCE) == "no step took much longer than the others"
    own = replace(REFERENCE, total=None, counted=False)
    assert [one.name for one in scenarios.ALL if one.lacking(own)] == ["notice-end", "evaluation"]
    assert diagnosis.notice(own).startswith("after_rename:")
    assert diagnosis.notice(replace(REFERENCE, total=None)) == f"step:{REFERENCE.middle}@0=TERM"
    shown = replace(REFERENCE, long_step=(49, 0.9), loops=2, tail_s=8.0, at=50, save_every=12)
    assert named("evaluation").lacking(shown) == ""
    assert named("evaluation").fault(shown) == "step:50@0=KILL+0.500"
    assert named("after").fault(shown) == "finished:2@0=KILL+4.000"
    assert named("after").fault(REFERENCE) == "finished:1@0=KILL"
    assert (shown.middle, shown.hit_save) == (50, 5)
    assert (
        named("after").lacking(replace(REFERENCE, loops=0))
        == "the program ended before the run saw the end of its loop"
    )


def test_commit_that_was_forgotten(tmp_path: Path) -> None:
    """A restart behind what was committed is no loss of an interval but a broken promise."""
    store = wrote(tmp_path, ("killed", 37), ("done", 60), resumed=(15,))
    store.write("attempts/0/events-0.jsonl", json.dumps({"t": 5.0, "event": "saved", "step": 30}) + "\n")
    trial = Trial("kill", "text")
    verdict.judge(trial, named("kill"), store, REFERENCE)
    assert "it went on from step 15 although step 30 had been committed" in trial.broken


def test_moments_fit_the_run() -> None:
    """Whatever the reference showed, the moments lie inside it."""
    for steps in (6, 7, 24, 100, 1000):
        shown = Reference("r", steps, 0.01, 3.0, 0.1, max(1, steps // 4), 0.0)
        assert 0 < shown.middle < steps
        assert shown.hit_save * shown.save_every <= steps


def seen(step: int, **changes: Any) -> Look:
    """Return a look at which everything is as usual but for `changes`, as the ledger has it."""
    event: dict[str, Any] = {
        "event": "probed",
        "step": step,
        "parts": {"params/w": f"w{step}"},
        "outside": {"steady in a.py:main": ["number", "same"]},
        "random": "same",
        "numpy": "same",
    }
    for name, value in changes.items():
        event[name] = {**event.get(name, {}), **value} if isinstance(value, dict) else value
    return looks.read([event])[step]


def test_harmless_differences_are_no_cause() -> None:
    """What stands still, and what the loop sets anew at every step, is not taken for state that was lost."""
    one = {step: seen(step, outside={"loss in a.py:main": ["array", f"l{step}", 7, False]}) for step in (1, 2, 30, 31)}
    one[0] = seen(0)
    two = {30: seen(30, outside={"loss in a.py:main": ["array", "other", 7, False]})}
    assert suspects.lost(Restart(one, two, {})) is None


def test_generator_comes_before_counter() -> None:
    """Of several things that were not carried over the likeliest is named."""
    outside = {"count in a.py:main": ["number", "c{}"], "key in a.py:main": ["rng", "k{}"]}

    def at(step: int, mark: str = "") -> Look:
        filled = {name: [kind, crc.format(step) + mark] for name, (kind, crc) in outside.items()}
        return seen(step, outside=filled)

    one = {step: at(step) for step in (0, 1, 2, 30, 31, 32)}
    found = suspects.lost(Restart(one, {30: at(30, "!")}, {}))
    assert found is not None
    assert found.name == "unsaved RNG: key in a.py:main"
    assert found.evidence[-1] == "also another after the restart: count in a.py:main"


def test_run_that_ended_early_is_judged_by_another() -> None:
    """Whether a generator moves, and where it stood, an undisturbed run tells where the interrupted one ended at its
    first save already, before it was looked at.
    """
    usual = {step: seen(step, outside={"order in a.py:main": ["rng", f"o{step}", 7]}) for step in (0, 1, 2, 3)}
    after = {1: seen(1, outside={"order in a.py:main": ["rng", "o0", 7]})}
    for steps in (0, 1), (0,):
        found = suspects.lost(Restart({step: usual[step] for step in steps}, after, usual))
        assert found is not None
        assert found.name == "unsaved RNG: order in a.py:main"


def test_data_that_hides_its_position() -> None:
    """Where the iterator cannot be looked into, the batch of the first resumed step tells."""
    one = {step: seen(step) for step in (0, 30)}
    one[31] = seen(31, outside={"batch in a.py:main": ["array", "b31"], "loss in a.py:main": ["array", "l31"]})
    two = {
        30: seen(30),
        31: seen(31, outside={"batch in a.py:main": ["array", "b0"], "loss in a.py:main": ["array", "l"]}),
    }
    found = suspects.lost(Restart(one, two, {}))
    assert found is not None
    assert found.name == "unsaved data position: batch in a.py:main"


def test_part_that_is_changed_after_its_restore() -> None:
    """A leaf that is not what was saved, before the first step, comes before everything else."""
    one = {step: seen(step, outside={"key in a.py:main": ["rng", str(step)]}) for step in (0, 1, 30, 31)}
    two = {30: seen(30, outside={"key in a.py:main": ["rng", "x"]}, parts={"params/w": "w0"})}
    found = suspects.lost(Restart(one, two, {}))
    assert found is not None
    assert found.name == "a part that is changed after it was restored: params/w"


def test_library_that_moves_a_generator_is_no_cause() -> None:
    """A global generator that starts in another state each time would have made undisturbed runs differ."""
    one = {step: seen(step, numpy=f"n{step}") for step in (0, 1, 2, 30)}
    two = {30: seen(30, numpy="x")}
    usual = {step: seen(step, numpy=f"m{step}") for step in (0, 1, 2)}
    assert suspects.lost(Restart(one, two, usual)) is None
    found = suspects.lost(Restart(one, two, {step: one[step] for step in (0, 1, 2)}))
    assert found is not None
    assert found.name == "unsaved RNG: numpy's global generator (np.random)"


def test_data_that_does_not_tell_where_it_stands_is_named() -> None:
    """A thread draws from it ahead of the steps, elsewhere in each run, or it looks the same at every step: where
    nothing else differs it is named. Of what other threads hold it is said that it cannot be seen.
    """

    def at(step: int, mark: str = "", threads: tuple[str, ...] = ()) -> Look:
        outside = {"rows in a.py:main": ["rng", f"r{step}{mark}", 7]}
        return seen(step, outside=outside, threads=list(threads))

    for threads, name in (("ahead in a.py",), "unsaved RNG: rows in a.py:main"), ((), None):
        one = {step: at(step, threads=threads) for step in (0, 1, 2, 30)}
        usual = {step: at(step, "?") for step in (0, 1, 2)}
        found = suspects.lost(Restart(one, {30: at(30, "!")}, usual))
        assert (found.name if found is not None else None) == name
    hidden = {step: seen(step, outside={"rows in a.py:main": ["iterator", "r", 7]}) for step in (0, 1, 2, 30)}
    restart = Restart(hidden, {30: hidden[30]}, {})
    assert suspects.lost(restart) is None
    found = suspects.hidden(restart)
    assert found is not None
    assert (found.name, found.line) == ("unsaved data position: rows in a.py:main", 7)
    assert suspects.hidden(Restart(hidden, {}, {})) is None
    blind = {0: seen(0, threads=["ahead in a.py"])}
    assert "ahead in a.py" in suspects.unknown(Restart(blind, {}, {})).evidence[-1]


def test_copy_of_a_part_is_no_cause() -> None:
    """A variable that is what a part is, at every look, is saved with it; one that differs from it once is not."""

    def at(step: int, mark: str = "") -> Look:
        return seen(step, outside={"params in a.py:main": ["array", f"p{step}{mark}", 7, True, not mark]})

    one = {step: at(step) for step in (0, 1, 2, 30)}
    assert suspects.lost(Restart(one, {30: at(30, "!")}, {})) is None
    found = suspects.lost(Restart(one | {2: at(2, "?")}, {30: at(30, "!")}, {}))
    assert found is not None
    assert found.name == "unsaved part: params in a.py:main"


def test_warning_names_variable_and_line(tmp_path: Path) -> None:
    """What changes, is no part and is another after the restart is warned of, not what always differs; of data only
    what begins anew, since what was made from the step has yielded the same.
    """
    outside = {
        "ema in a.py:main": ["array", "e{}", 12, True],
        "rates in a.py:main": ["iterator", "a{}", 8, True],
        "began in a.py:main": ["number", "t{}", 3, True],
        "rows in a.py:main": ["iterator", "i{}", 5, True],
    }

    def at(step: int, mark: str = "", **marks: str) -> Look:
        filled = {
            name: [kind, crc.format(step) + mark + marks.get(name.split()[0], ""), *more]
            for name, (kind, crc, *more) in outside.items()
        }
        return seen(step, outside=filled)

    one = {step: at(step) for step in (0, 1, 2, 30)}
    after = at(30, "!")
    after.outside["rates in a.py:main"] = one[0].outside["rates in a.py:main"]
    interrupted = ended(tmp_path / "notice", looks=(one, {30: after}))
    usual = ended(tmp_path / "reference", looks=({step: at(step, began="!") for step in (0, 1, 2)},))
    told = diagnosis.warnings(interrupted, usual)
    says = "changes from step to step, is no part"
    begins = [f"rates in a.py:main, line 8: {says}", f"ema in a.py:main, line 12: {says}"]
    assert len(told) == 2
    assert all(map(str.startswith, told, begins))
    blind = ended(tmp_path / "blind", looks=(one, {}))
    assert diagnosis.warnings(blind, usual) == ["which variables a restart does not bring back could not be seen"]


def ended(path: Path, outcome: str = "done", looks: tuple[Looks, ...] = ()) -> Store:
    """Write a run of one attempt or more whose last one ended so, with what a probe saw in each."""
    store = Store(path)
    for attempt, seen_then in enumerate(looks or ({},)):
        last = attempt == max(len(looks), 1) - 1
        told = {"outcome": outcome if last else "preempted", "step": 60, "reason": "SIGSEGV", "ended": 10.0}
        store.write(f"attempts/{attempt}/outcome.json", json.dumps(told))
        events = [json.dumps({"t": 5.0, "event": "probed", **look.to_event()}) for look in seen_then.values()]
        store.write(f"attempts/{attempt}/events-0.jsonl", "\n".join(events) + "\n")
    return store


def diagnosed(tmp_path: Path, runs: dict[str, Store], equal: Callable[[str, str], bool]) -> Diagnosis:
    """Diagnose a run that was preempted; of the runs asked for, those in `runs` are given, all others crashed."""
    place = ended(tmp_path / "d/reference").path.parent
    ended(place / "notice", looks=({}, {}))

    def finish(wanted: Mapping[str, Mapping[str, str]]) -> list[Store]:
        return [runs.get(name) or ended(place / name, "failed") for name in wanted]

    def compare(one: str, other: str) -> dict[str, Any]:
        same = equal(Path(one).name, Path(other).name)
        leaf = None if same else {"name": "w", "step": 60, "a": "1", "b": "2"}
        return {"equal": same, "leaf": leaf, "metric": None, "metrics": []}

    shown = dataclasses.replace(REFERENCE, run=str(place / "reference"), total=60)
    return diagnosis.diagnose(str(place / "notice"), shown, compare, finish)


def test_clock_that_crashes_the_program_costs_no_diagnosis(tmp_path: Path) -> None:
    """Where no run with a still clock comes to its end, the rest of the diagnosis goes on, and says so."""
    counts = {step: seen(step, outside={"count in a.py:main": ["number", str(step), 7, True]}) for step in (0, 1, 2)}
    restarted = {37: seen(37, outside={"count in a.py:main": ["number", "0", 7, True]})}
    stopped = {37: seen(37, outside={"count in a.py:main": ["number", "37", 7, True]})}
    runs = {
        "again": ended(tmp_path / "again", looks=(counts,)),
        "again-notice": ended(tmp_path / "again-notice", looks=(counts | stopped, restarted)),
    }
    found = diagnosed(tmp_path, runs, lambda one, other: "again-notice" not in (one, other))
    assert found.name == "step-dependent state outside the parts: count in a.py:main"
    assert "whether it depends on the time of day is not known" in "".join(found.evidence)
    assert "SIGSEGV" in "".join(found.evidence)


def test_crash_with_a_still_clock_where_no_two_runs_are_equal(tmp_path: Path) -> None:
    """An unrepeatable program that does not run with a still clock is diagnosed from two runs without one."""
    looks = [{0: seen(0), 1: seen(1, outside={"noise in a.py:main": ["array", mark, 7, False]})} for mark in "ab"]
    runs = {"again": ended(tmp_path / "again", looks=(looks[0],))}
    runs |= {name: ended(tmp_path / name, looks=(looks[1],)) for name in ("again-2", "hashed", "hashed-again")}
    runs["again-notice"] = ended(tmp_path / "again-notice", looks=({}, {}))
    found = diagnosed(tmp_path, runs, lambda one, other: False)
    assert found.name == "nondeterministic operation: noise in a.py:main"
    assert "whether it depends on the time of day is not known" in "".join(found.evidence)


def test_a_hash_that_is_fixed_makes_runs_equal(tmp_path: Path) -> None:
    """Runs that are equal with PYTHONHASHSEED alone depend on the order of a set, and it is said so."""
    looks = [{0: seen(0), 1: seen(1, outside={"noise in a.py:main": ["array", mark, 7, False]})} for mark in "ab"]
    runs = {"again": ended(tmp_path / "again", looks=(looks[0],))}
    runs |= {name: ended(tmp_path / name, looks=(looks[1],)) for name in ("again-2", "hashed", "hashed-again")}
    runs["again-notice"] = ended(tmp_path / "again-notice", looks=({}, {}))
    found = diagnosed(tmp_path, runs, lambda one, other: {one, other} == {"hashed", "hashed-again"})
    assert found.name == "hash order"
    assert "with PYTHONHASHSEED=0 they are equal" in "".join(found.evidence)


@pytest.mark.parametrize(
    ("still", "name"), [(True, "wall-clock dependence"), (False, "unsaved data position: rows in a.py:main")]
)
def test_the_clock_comes_before_what_hides_its_position(tmp_path: Path, still: bool, name: str) -> None:
    """An iterator that the drill cannot look into is accused only where a clock that stands still changes nothing."""
    hidden = {step: seen(step, outside={"rows in a.py:main": ["iterator", "r", 7]}) for step in (0, 1, 2, 37)}
    runs = {name: ended(tmp_path / name, looks=(hidden,)) for name in ("again", "still", "still-interrupted")}
    runs["again-notice"] = ended(tmp_path / "again-notice", looks=(hidden, {37: hidden[37]}))
    differing = {"again-notice"} if still else {"again-notice", "still-interrupted"}
    found = diagnosed(tmp_path, runs, lambda one, other: not differing & {one, other})
    assert found.name == name


def test_diagnosis_that_comes_to_nothing(tmp_path: Path) -> None:
    """Where the undisturbed run for the diagnosis crashes, there is none, and the reason is told."""
    with pytest.raises(JobkitError, match="came to nothing: SIGSEGV"):
        diagnosed(tmp_path, {}, lambda one, other: False)
    assert diagnosis.failed("it crashed").name == "the diagnosis failed"


def test_interruption_of_the_other_kind(tmp_path: Path) -> None:
    """What only a kill shows is found with a kill: on a notice a counter in a file is as far as the state is."""
    wrote = {step: seen(step, files={"n.txt": "rw"}) for step in (0, 1, 2, 30)}
    runs = {
        "again": ended(tmp_path / "again", looks=(wrote,)),
        "again-notice": ended(tmp_path / "again-notice", looks=(wrote, {37: seen(37)})),
        "again-kill": ended(tmp_path / "again-kill", looks=(wrote, {30: seen(30), 31: seen(31, files={"n.txt": "r"})})),
    }
    found = diagnosed(tmp_path, runs, lambda one, other: "again-kill" not in (one, other))
    assert found.name == "state in a file: n.txt"
    assert "on a notice nothing is lost: only a kill makes it" in found.evidence


def test_comparison_that_dies_is_not_the_last(tmp_path: Path) -> None:
    """Where the process that compares dies, that comparison fails, and the next one has a new process."""
    with contextlib.closing(comparing.Comparer(tmp_path)) as comparer:
        comparer._process.kill()
        comparer._process.wait()
        with pytest.raises(JobkitError, match="could not be compared: python -m"):
            comparer.compare(str(tmp_path / "a"), str(tmp_path / "b"))
        with pytest.raises(JobkitError, match="has no committed checkpoint"):
            comparer.compare(str(tmp_path / "a"), str(tmp_path / "b"))


# What it shows.


def result(**changes: Any) -> DrillResult:
    """Return a drill's result in which one scenario went well and one did not."""
    endings = [Ending(0, Outcome.PREEMPTED, "why", 37, 37, 0.25, 4.0), Ending(1, Outcome.DONE, "finished", 60)]
    good = Trial("notice", "notice in mid-run", ["SIGTERM to attempt 0 (step 37)"], endings, [], True)
    bad = Trial("kill", "SIGKILL in mid-run", [], [], ["it ended with <other> bits"], False)
    missed = Trial("kill-save", "SIGKILL while a save is written", missed="the run was over before")
    trials = {"good": [good], "both": [good, bad], "missed": [good, missed], "none": []}[changes.get("which", "both")]
    why = Diagnosis("rng", "key in a.py:main", ["seen"], 37, "params/w") if bad in trials else None
    more = {name: changes.get(name, ()) for name in ("aside", "files_aside", "warnings", "untried")}
    shown = changes.get("shown", REFERENCE)
    return DrillResult(("python", "train.py", "--note", "<b>"), "/runs/d", shown, trials, why, 61.0, **more)


def texts(told: DrillResult) -> dict[str, str]:
    """Return what a person reads of a drill: the card and the page, each in one line."""
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(drill_card.card(told))
    card = " ".join(captured.get().replace("│", " ").split())
    return {"card": card, "page": html.unescape(drill_card.page(told))}


@pytest.mark.parametrize(
    ("changes", "verdict_", "headline"),
    [
        ({"which": "good"}, "certified", "certified: every promise held, in all 60 steps"),
        ({"which": "both"}, "not certified", "not certified: 1 of 2 scenarios broke a promise"),
        ({"which": "missed"}, "could not judge", "could not judge: kill-save could not be hit"),
        ({"which": "none"}, "could not judge", "could not judge: nothing that was asked for could be tried"),
        (
            {"which": "good", "shown": replace(REFERENCE, total=6000, until=60)},
            "certified",
            "certified for the first 60 of 6000 steps: every promise held",
        ),
        (
            {"which": "good", "shown": replace(REFERENCE, total=None, until=60)},
            "certified",
            "certified for the first 60 steps: every promise held",
        ),
        (
            {"which": "good", "shown": replace(REFERENCE, total=6000, until=100)},
            "certified",
            "certified: every promise held, in all 60 steps",
        ),
    ],
)
def test_verdict_comes_first(changes: dict[str, Any], verdict_: str, headline: str) -> None:
    """Card, page and JSON begin with the same verdict, which says for how many of the steps it holds."""
    told = result(**changes)
    document = drill_card.document(told)
    assert (document["verdict"], document["headline"]) == (verdict_, headline)
    assert document["passed"] is (verdict_ == "certified")
    for text in texts(told).values():
        assert 0 < text.find(headline) < text.find("a step, the first after")


def test_a_card_has_room_for_a_few_promises() -> None:
    """Of many broken promises of one scenario the card has the first ones and their number; JSON has all."""
    told = result()
    told.trials[1].broken = [f"promise {number}" for number in range(20)]
    for text in texts(told).values():
        assert "promise 4" in text
        assert "promise 5" not in text
        assert "and 15 more, see --json" in text
    assert len(drill_card.document(told)["scenarios"][1]["broken"]) == 20


def test_shared_compilations_are_no_files_of_the_program(tmp_path: Path) -> None:
    """What the runs of a drill compile lies in one of them: no snapshot copies it, no comparison of files sees it."""
    cache = Path(shared_cache(tmp_path)["JAX_COMPILATION_CACHE_DIR"])
    assert cache.parent.parent == tmp_path
    assert contract.is_own(cache.name)


def test_what_was_not_tried_is_told() -> None:
    """What lies behind the drilled steps, what the program gave no occasion for, what was missed or not asked for."""
    whole = result(which="good")
    part = result(
        which="missed",
        shown=replace(REFERENCE, total=6000, until=60),
        untried=[
            verdict.Untried("evaluation", "SIGKILL in the longest step", "no step took much longer"),
            verdict.Untried("kill-save", "SIGKILL while a save is written", "the run was over before"),
            *(verdict.Untried(name, name, "not asked for") for name in ("twice", "node")),
        ],
    )
    for text in texts(part).values():
        assert "what comes after step 60, such as a learning rate that drops, early stopping" in text
        assert "SIGKILL in the longest step: no step took much longer" in text
        assert "SIGKILL while a save is written: the run was over before" in text
        assert "not asked for: twice, node" in text
    assert all("not tried" not in text for text in texts(whole).values())
    told = drill_card.document(part)
    assert told["steps"] == {"drilled": 60, "of": 6000, "all": False}
    assert told["not_seen"].startswith("what comes after step 60")
    assert [each["name"] for each in told["not_tried"]] == ["evaluation", "kill-save", "twice", "node"]
    assert (drill_card.document(whole)["not_seen"], drill_card.document(whole)["not_tried"]) == ("", [])


def test_picture(tmp_path: Path) -> None:
    """The picture has a line for all that the card says: it grows with them; no text is taken for a formula."""
    sizes = {}
    for name, told in {"good": result(which="good"), "bad": result(warnings=("$x_{$ is no part",) * 9)}.items():
        path = drill_card.write_picture(tmp_path / f"{name}.png", told)
        assert path.read_bytes().startswith(b"\x89PNG")
        sizes[name] = struct.unpack(">II", path.read_bytes()[16:24])
    assert sizes["good"][0] == sizes["bad"][0] == 1100
    assert sizes["bad"][1] > sizes["good"][1] + 200
    with pytest.raises(ConfigError, match="cannot write"):
        drill_card.write_picture(tmp_path / "good.png" / "x.png", result())


def test_card() -> None:
    """The card has a row per scenario, what broke, why, and the verdict; it fits a terminal."""
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(drill_card.card(result()))
        console.print(drill_card.card(result(which="good")))
    text = captured.get()
    assert re.search(r"notice in mid-run +yes +37 +0 +0.25 s +4.00 s +same", text)
    assert re.search(r"SIGKILL in mid-run +no +- +- +- +- +differ", text)
    assert "why: unsaved RNG: key in a.py:main" in text
    assert "first at step 37: params/w" in text
    assert "trained while a save is in flight, here 21" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def doing(step: int, attempt: int, state: State = State.RUNNING) -> Status:
    """Return the status of a run at a step."""
    return Status(run="r", name="r", backend="local", state=state, attempt=attempt, step=step)


def test_progress_on_a_terminal() -> None:
    """On a terminal every run that moves has a line, and what has ended stays above them."""
    console = Console(force_terminal=True, width=100, no_color=True)
    columns = TextColumn("{task.description} "), TextColumn("{task.fields[detail]}")
    with console.capture() as captured, Progress(*columns, console=console, auto_refresh=False) as drawn:
        rows = progress.Rows(console, drawn)
        rows.moved("notice", doing(12, 0))
        rows.moved("kill", doing(40, 1))
        drawn.refresh()
        rows.moved("notice", doing(60, 1, State.DONE))
        rows.say(f"  {result().trials[0].in_short}")
        before = len(drawn.tasks)
        rows.moved("kill", doing(41, 1))
        drawn.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", captured.get())
    assert before == 1
    assert re.search(r"notice +attempt 0, step 12", shown)
    assert "ok    notice: notice in mid-run; 0 steps lost" in shown
    assert re.search(r"kill +attempt 1, step 41", shown)


def test_page() -> None:
    """The page is one file without script or request, and the command in it is text."""
    text = drill_card.page(result())
    assert "&lt;other&gt; bits" in text
    assert "<b>&#39;" not in text
    assert "--note &#39;&lt;b&gt;&#39;" in text
    assert "unsaved RNG: key in a.py:main" in text
    assert not re.search(r"<script|<link|<img|src=|url\(|@import|http", text)
    assert "prefers-color-scheme: dark" in text
    assert "what is trained while a save is in flight, here 21" in text


@pytest.mark.slow
def test_page_in_a_browser(tmp_path: Path) -> None:
    """Light, dark and on a phone: no request to anywhere, no complaint, no sideways scrolling."""
    program = browser.find()
    if program is None:
        pytest.skip(f"Chromium is missing: {browser.HOW}")
    path, colors = tmp_path / "card.html", []
    path.write_text(drill_card.page(result()))
    with browser.Browser(program) as running:
        for width, dark in ((1100, False), (1100, True), (390, False)):
            running.open(path, width=width, dark=dark)
            assert running.requests() == []
            assert running.complaints() == []
            assert running.evaluate("document.documentElement.scrollWidth") <= width
            colors.append(running.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colors[0] == colors[2] != colors[1]


def test_document() -> None:
    """--json has what the card has."""
    told = drill_card.document(result())
    assert (told["passed"], told["diagnosis"]["name"]) == (False, "unsaved RNG: key in a.py:main")
    assert [each["survived"] for each in told["scenarios"]] == [True, False]
    assert told["scenarios"][0]["lost_steps"] == 0
    assert told["reference"]["allowed_loss"] == 21
    good = result(which="good", aside=("memory", "step_s"))
    assert drill_card.document(good)["passed"] is True
    assert drill_card.document(good)["metrics_aside"] == ["memory", "step_s"]
    for text in texts(good).values():
        assert "not compared, since undisturbed runs differ in them too" in text
        assert "metrics: memory, step_s" in text


def test_warnings_are_shown_everywhere() -> None:
    """What costs no certificate is on the card, on the page and in the JSON: warnings, and files that always differ."""
    warned = result(which="good", warnings=("ema <local>",), files_aside=("times.txt",))
    for text in texts(warned).values():
        assert "warnings" in text
        assert "ema <local>" in text
        assert "files: times.txt" in text
        assert "certified: every promise held" in text
    told = drill_card.document(warned)
    assert (told["passed"], told["warnings"], told["files_aside"]) == (True, ["ema <local>"], ["times.txt"])


# The command line.


def test_list(tmp_path: Path) -> None:
    """--list names the scenarios and runs nothing."""
    done = drill("--list", "--json", "--quick", cwd=tmp_path)
    assert done.returncode == 0
    assert [each["name"] for each in json.loads(done.stdout)] == ["compile", "notice", "after", "kill-commit", "damage"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no command to drill"),
        (["--only", "flood", "--", "true"], "there is no scenario 'flood'; known are start, resumed, compile, notice"),
        (["--steps", "few", "--", "true"], "'--steps': 'few' is not a valid integer"),
        (["--steps", "9", "--full", "--", "true"], "--full and --steps 9: give one of them"),
        (["--steps", "9", "--at", "8", "--", "true"], "--at 8 with --steps 9: interrupt it before step 8"),
        (["--", "pyhton", "train.py"], "the command 'pyhton' does not exist on PATH"),
        (["--run", "full", "--", "true"], "is not an empty directory"),
        (["--html", "no/such/page.html", "--", "true"], "there is no directory"),
        (["--png", "no/such/card.png", "--", "true"], "--png no/such/card.png: there is no directory"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for and makes no sense is a user's mistake: exit 2 and a sentence, before anything runs."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    monkeypatch.chdir(tmp_path)
    done = command_line("drill", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "thesis.tex"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--", "python", "-c", "raise SystemExit('out of data')"], "without any interruption it ended with"),
        (["--", "true"], "the program never opened a jobkit.Run"),
        (["--timeout", "1s", "--", "sleep", "30"], "the program did not end within 1.0 s"),
    ],
)
def test_what_cannot_be_drilled(tmp_path: Path, arguments: list[str], told: str) -> None:
    """A program that cannot be drilled is the user's mistake: exit 2 and a sentence, and nothing is left running."""
    done = drill(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    from jobkit.supervise import processes

    assert not processes.with_environment(contract.ENV_RUN, str(tmp_path))


def test_what_cannot_be_judged_is_told_to_a_machine(tmp_path: Path) -> None:
    """--json has a document also where there is nothing to drill, with the reason; exit 2."""
    done = drill("--json", "--", "true", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["verdict"], told["passed"], told["command"]) == ("could not judge", False, ["true"])
    assert told["headline"].startswith("could not judge: the program never opened a jobkit.Run")


PLANTED = {
    "unsaved_key": "unsaved RNG: key in unsaved_key.py:main",
    "unsaved_key_timed": "unsaved RNG: key in unsaved_key_timed.py:main",
    "unsaved_numpy": "unsaved RNG: numpy's global generator (np.random)",
    "unsaved_data": "unsaved data position: data in unsaved_data.py:main",
    "unsaved_part": "unsaved part: average in unsaved_part.py:main",
    "step_counter": "step-dependent state outside the parts: count in step_counter.py:main",
    "wall_clock": "wall-clock dependence",
    "nondeterministic": "nondeterministic operation: noise in nondeterministic.py:main",
    "donated": "donated buffer",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", PLANTED)
def test_planted_bug_is_named(tmp_path: Path, script: str) -> None:
    """Each script has one bug; the drill exits 1, names it, and keeps the runs."""
    done = drill(
        "--only", "notice", "--json", "--run", str(tmp_path / "d"), "--", "python", f"{script}.py", cwd=SCRIPTS
    )
    assert done.returncode == 1, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["passed"] is False
    assert told["diagnosis"]["name"] == PLANTED[script], told
    assert (tmp_path / "d/notice/checkpoints").is_dir()


@pytest.mark.slow
def test_times_are_not_held_against_a_program(tmp_path: Path) -> None:
    """A metric that differs between undisturbed runs of equal state is named, and the program is certified."""
    place = ["--run", str(tmp_path / "d"), "--json"]
    done = drill("--only", "kill", "--only", "notice", *place, "--", "python", "logs_times.py", cwd=SCRIPTS)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["metrics_aside"] == ["step_s"]
    assert told["diagnosis"] is None
    assert [each["identical"] for each in told["scenarios"]] == [True, True]


@pytest.mark.slow
def test_moments(tmp_path: Path) -> None:
    """Before the first step, in an evaluation, behind the last commit: each shows what a kill in mid-run does not."""
    only = [word for name in ("resumed", "kill", "evaluation", "after") for word in ("--only", name)]
    done = drill(*only, "--json", "--run", str(tmp_path / "d"), "--", "python", "moments.py", cwd=SCRIPTS)
    assert done.returncode == 1, done.stdout + done.stderr
    told = json.loads(done.stdout)
    broken = {each["name"]: " ".join(each["broken"]) for each in told["scenarios"]}
    assert broken.pop("kill") == ""
    assert {name: re.findall(r"\w+Error", text)[0] for name, text in broken.items()} == {
        "resumed": "FileNotFoundError",
        "evaluation": "ValueError",
        "after": "UnboundLocalError",
    }
    assert told["reference"]["long_step"][0] == 57
    evaluation = next(each for each in told["scenarios"] if each["name"] == "evaluation")
    assert evaluation["endings"][0]["reached_step"] == 57
    assert told["diagnosis"] is None


@pytest.mark.slow
def test_what_lies_outside_the_window_is_told(tmp_path: Path) -> None:
    """A mistake that shows after 50,000 steps is not seen: the certificate is for the first steps, and says so."""
    html, png = tmp_path / "card.html", tmp_path / "card.png"
    drawn = ("--html", str(html), "--png", str(png), "--run", str(tmp_path / "e"))
    done = drill("--only", "kill", *drawn, "--", "python", "late.py", cwd=SCRIPTS)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"certified for the first (\d+) of 100000 steps: every promise held", done.stdout)
    assert found is not None, done.stdout
    assert f"what comes after step {found[1]}, such as a learning rate that drops" in done.stdout
    assert f"{found[0]}, in 1 of {len(scenarios.ALL)} scenarios" in html.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_interrupted_at_a_step(tmp_path: Path) -> None:
    """--at drills as far as that step: a mistake that shows there alone is found, and named."""
    command = ["--", "python", "late.py", "60"]  # the kill goes back to a save behind that step
    done = drill("--only", "kill", "--at", "130", "--json", "--run", str(tmp_path / "d"), *command, cwd=SCRIPTS)
    assert done.returncode == 1, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["steps"] == {"drilled": 143, "of": 100_000, "all": False}
    assert 130 <= told["scenarios"][0]["at_steps"][0] < 143
    assert told["diagnosis"]["name"] == "step-dependent state outside the parts: beyond in late.py:main"


@pytest.mark.slow
def test_epochs_whose_end_only_the_data_knows(tmp_path: Path) -> None:
    """They are cut where --steps says, the interrupted runs as well, and certified for those steps alone."""
    asked = ("--only", "kill", "--steps", "40", "--json", "--run", str(tmp_path / "d"))
    done = drill(*asked, "--", "python", "epochs_open.py", cwd=SCRIPTS)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["headline"].startswith("certified for the first 40 steps: every promise held")
    assert told["steps"] == {"drilled": 40, "of": None, "all": False}
    assert (told["scenarios"][0]["identical"], told["warnings"]) == (True, [])


@pytest.mark.slow
def test_cut_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """What the code behind an epoch saves where the drill ends it is in the reference too: that is no difference."""
    asked = ("--only", "kill", "--json", "--run", str(tmp_path / "d"))
    done = drill(*asked, "--", "python", "epochs_sound.py", "0.12", cwd=SCRIPTS)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["steps"]["of"], told["steps"]["all"], told["metrics_aside"]) == (300, False, [])
    assert told["scenarios"][0]["identical"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_text_example_is_certified(tmp_path: Path) -> None:
    """`jobkit drill -- python -m jobkit.examples.text` exits 0: every scenario that can be, and nothing is left."""
    page = tmp_path / "card.html"
    done = drill("--html", str(page), "--json", "--", "python", "-m", "jobkit.examples.text", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    untried = [each["name"] for each in told["not_tried"]]
    assert untried in ([], ["evaluation"])  # on a fast machine the example's evaluation is no long step
    assert [each["name"] for each in told["scenarios"]] == [
        one.name for one in scenarios.ALL if one.name not in untried
    ]
    assert all(each["identical"] for each in told["scenarios"])
    assert told["headline"].startswith("certified")
    assert told["headline"] in page.read_text()
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.slow
def test_interrupted_drill_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C ends every process that the drill started and removes its runs."""
    command = [sys.executable, "-m", "launch", "drill", "--run", "d", "--", "python", str(SCRIPTS / "sound.py")]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as started:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("d/*/attempts/0/supervisor.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        assert started.wait(60) == 130
    from jobkit.supervise import processes

    assert not processes.with_environment(contract.ENV_RUN, str(tmp_path / "d/reference"))
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    """On SLURM the job is requeued and killed where it runs, and ends with the reference's bits."""
    arguments = ["--on", "slurm", "-p", "requeue5", "--steps", "40", "-j", "2", "--run", str(tmp_path / "d"), "--json"]
    only = ["--only", "requeue", "--only", "kill-commit"]
    done = drill(*arguments, *only, "--", "python", str(SCRIPTS / "sound.py"), cwd=tmp_path, **cluster.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert [(each["name"], each["identical"]) for each in told["scenarios"]] == [
        ("requeue", True),
        ("kill-commit", True),
    ]
    assert "scontrol requeue" in told["scenarios"][0]["done"][0]
    assert cluster.run("squeue", "--noheader").strip() == ""
    assert not (tmp_path / "d").exists()
