"""jobkit drill: what it asks of a program, how it judges, what it shows; and that it finds each planted bug."""

import datetime
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from rich.live import Live

import jobkit
from jobkit import commits, contract, faults, state
from jobkit.contract import Outcome
from jobkit.drilled import Drill, drill_from
from jobkit.errors import JobkitError
from jobkit.ledger import attempt_events
from jobkit.storage import Store
from jobkit.strategy import SaveEvery
from launch import diagnosis, drill_card, scenarios, verdict
from launch.diagnosis import Diagnosis
from launch.drive import Ending
from launch.scenarios import Shown
from launch.verdict import Found, Result
from tests import browser
from tests.slurm import Cluster

ROOT = Path(__file__).parent.parent
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
    [("step:2@0=USR1", "0", 2), ("step:2@0=USR1", "1", 0), ("step=USR1", "5", 1), ("other=USR1", "0", 0)],
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
            if taken and not hit:
                hit = number
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert hit == passes
    assert len(taken) == (passes > 0)


def test_clock_that_stands_still() -> None:
    """Every way to ask for the time of day gives the same, and durations go on."""
    code = (
        "from jobkit.frozen import freeze; freeze(1.7e9)\n"
        "import time, datetime\nfrom datetime import datetime as d\nfrom time import time as t\n"
        "a = time.monotonic(); time.sleep(0.01)\n"
        "print(t(), time.time_ns(), d.now(datetime.UTC).isoformat(), time.gmtime().tm_year, time.monotonic() > a)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    when = datetime.datetime.fromtimestamp(1.7e9, datetime.UTC).isoformat()
    assert done.stdout.split() == ["1700000000.0", "1700000000000000000", when, "2023", "True"]


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
    seen = {e["step"]: e for e in attempt_events(Store(tmp_path / "r"), 0) if e["event"] == "probed"}
    assert sorted(seen) == [0, 1, 2]
    first, second = seen[1]["outside"], seen[2]["outside"]
    here = "in test_drill.py:test_probe_sees_what_is_no_part"
    kinds = {"held.count": "number", "held.generator": "rng", "numbers": "iterator", "listed": "iterator"}
    for name, kind in kinds.items():
        assert first[f"{name} {here}"][0] == kind
        assert first[f"{name} {here}"] != second[f"{name} {here}"], name
    assert first[f"constant {here}"] == second[f"constant {here}"]
    assert constant.sum() == 3
    assert seen[1]["parts"]["count"] != seen[2]["parts"]["count"]
    assert seen[1]["random"] != seen[2]["random"]
    assert seen[1]["numpy"] == seen[2]["numpy"]
    assert not [name for name in first if name.startswith(("run ", "pytest", "sys"))]


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
    found = Found("notice", "text")
    verdict.judge(found, named("notice"), store, SHOWN)
    assert found.donated
    assert "a save after step 2 would have failed: tree/w had been given away (donate_argnums)" in found.broken
    told = diagnosis._donated(store.url)
    assert told is not None
    assert (told.name, told.step, told.tensor) == ("donated buffer", 2, "tree/w")


def _save_donated(tree: Any) -> None:
    state.take({"tree": state.part_of("tree", tree)}).check_whole()


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
        found = diagnosis._donated(str(tmp_path / "none"), store.url)
        assert found is not None
        assert found.name == "donated buffer"
    logs.write(contract.log_file(0), "the old index has been deleted\n")
    assert diagnosis._donated(logs.url) is None


# How it judges.

SHOWN = Shown(run="r/reference", steps=60, step_s=0.1, start_s=3.0, save_s=0.2, save_every=15, pace_s=0.0)


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
        ("notice", [("done", 60)], (), "it took 1 attempts and should have taken 2"),
        ("notice", [("preempted", 37), ("failed", 40)], (37,), "it did not get to its end: why"),
        ("kill", [("killed", 37), ("done", 60)], (30,), ""),
        ("kill", [("killed", 37), ("done", 60)], (15,), "22 steps were lost on a kill, and a save interval is 15"),
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
    """A notice may cost nothing, a kill a save interval, and every attempt has to end as it must."""
    found = Found(name, "text")
    verdict.judge(found, named(name), wrote(tmp_path, *endings, resumed=resumed), SHOWN)
    assert [line for line in found.broken if broken in line] if broken else found.broken == []
    assert found.survived is not bool(broken)


def test_commit_that_was_forgotten(tmp_path: Path) -> None:
    """A restart behind what was committed is no loss of an interval but a broken promise."""
    store = wrote(tmp_path, ("killed", 37), ("done", 60), resumed=(15,))
    store.write("attempts/0/events-0.jsonl", json.dumps({"t": 5.0, "event": "saved", "step": 30}) + "\n")
    found = Found("kill", "text")
    verdict.judge(found, named("kill"), store, SHOWN)
    assert "it went on from step 15 although step 30 had been committed" in found.broken


def test_moments_fit_the_run() -> None:
    """Whatever the reference showed, the moments lie inside it."""
    for steps in (6, 7, 24, 100, 1000):
        shown = Shown("r", steps, 0.01, 3.0, 0.1, max(1, steps // 4), 0.0)
        assert 0 < shown.middle < steps
        assert shown.hit_save * shown.save_every <= steps


def seen(step: int, **changes: Any) -> dict[str, Any]:
    """Return a fingerprint in which everything is as usual but for `changes`."""
    event: dict[str, Any] = {
        "step": step,
        "parts": {"params/w": f"w{step}"},
        "outside": {"steady in a.py:main": ["number", "same"]},
        "random": "same",
        "numpy": "same",
        "rngs": [],
    }
    for name, value in changes.items():
        event[name] = event[name] | value if isinstance(value, dict) else value
    return event


def test_harmless_differences_are_no_cause() -> None:
    """What stands still, and what the loop sets anew at every step, is not taken for state that was lost."""
    one = {step: seen(step, outside={"loss in a.py:main": ["array", f"l{step}"]}) for step in (1, 2, 30, 31)}
    one[0] = seen(0)
    two = {step: dict(event) for step, event in one.items()}
    two[30] = seen(30, outside={"steady in a.py:main": ["number", "other"]})
    assert diagnosis._lost(one, two, 30) is None


def test_generator_comes_before_counter() -> None:
    """Of several things that were not carried over the likeliest is named."""
    outside = {"count in a.py:main": ["number", "c{}"], "key in a.py:main": ["rng", "k{}"]}

    def at(step: int, mark: str = "") -> dict[str, Any]:
        filled = {name: [kind, crc.format(step) + mark] for name, (kind, crc) in outside.items()}
        return seen(step, outside=filled)

    one = {step: at(step) for step in (0, 1, 2, 30, 31, 32)}
    found = diagnosis._lost(one, one | {30: at(30, "!")}, 30)
    assert found is not None
    assert found.name == "unsaved RNG: key in a.py:main"
    assert found.evidence[-1] == "also another after the restart: count in a.py:main"


def test_data_that_hides_its_position() -> None:
    """Where the iterator cannot be looked into, the batch of the first resumed step tells."""
    one = {step: seen(step) for step in (0, 30)}
    one[31] = seen(31, outside={"batch in a.py:main": ["array", "b31"], "loss in a.py:main": ["array", "l31"]})
    two = {
        30: seen(30),
        31: seen(31, outside={"batch in a.py:main": ["array", "b0"], "loss in a.py:main": ["array", "l"]}),
    }
    found = diagnosis._lost(one, two, 30)
    assert found is not None
    assert found.name == "unsaved data position: batch in a.py:main"


def test_part_that_is_changed_after_its_restore() -> None:
    """A leaf that is not what was saved, before the first step, comes before everything else."""
    one = {step: seen(step, outside={"key in a.py:main": ["rng", str(step)]}) for step in (0, 1, 30, 31)}
    two = {30: seen(30, outside={"key in a.py:main": ["rng", "x"]}, parts={"params/w": "w0"})}
    found = diagnosis._lost(one, two, 30)
    assert found is not None
    assert found.name == "a part that is changed after it was restored: params/w"


# What it shows.


def result(**changes: Any) -> Result:
    """Return a drill's result in which one scenario went well and one did not."""
    ending = Ending(0, Outcome.PREEMPTED, "why", 37, 37, 0.25, 4.0)
    good = Found("notice", "notice in mid-run", ["SIGTERM to attempt 0 (step 37)"], [ending], [], True)
    bad = Found("kill", "SIGKILL in mid-run", [], [], ["it ended with <other> bits"], False)
    found = {"good": [good], "both": [good, bad]}[changes.get("which", "both")]
    why = Diagnosis("rng", "key in a.py:main", "save it", ["seen"], 37, "params/w") if len(found) > 1 else None
    return Result(("python", "train.py", "--note", "<b>"), "/runs/d", SHOWN, found, why, 61.0)


def test_card() -> None:
    """The card has a row per scenario, what broke, why, and the verdict; it fits a terminal."""
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(drill_card.card(result()))
        console.print(drill_card.card(result(which="good")))
    text = captured.get()
    assert re.search(r"notice in mid-run +0 +0.25 s +4.00 s +same +yes", text)
    assert re.search(r"SIGKILL in mid-run +- +- +- +differ +no", text)
    assert "unsaved RNG: key in a.py:main" in text
    assert "first at step 37: params/w" in text
    assert "not certified: a promise did not hold" in text
    assert "certified: every promise held" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_progress_on_a_terminal() -> None:
    """On a terminal every run that moves has a line, and what has ended stays above them."""
    console = Console(force_terminal=True, width=100, no_color=True)
    with console.capture() as captured, Live(console=console, auto_refresh=False) as live:
        telling = drill_card._Live(console, live)
        telling.moved("notice", "attempt 0, step 12")
        telling.moved("kill", "attempt 1, step 40")
        live.refresh()
        telling.ended(result().found[0])
        telling.moved("kill", "attempt 1, step 41")
        live.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", captured.get())
    assert re.search(r"notice +attempt 0, step 12", shown)
    assert "ok    notice: notice in mid-run; 0 steps lost" in shown
    assert re.search(r"kill +attempt 1, step 41", shown)


def test_page() -> None:
    """The page is one file without script or request, and the command in it is text."""
    text = drill_card.page(result())
    assert "&lt;other&gt; bits" in text
    assert "<b>&#x27;" not in text
    assert "--note &#x27;&lt;b&gt;&#x27;" in text
    assert "unsaved RNG: key in a.py:main" in text
    assert not re.search(r"<script|<link|<img|src=|url\(|@import|http", text)
    assert "prefers-color-scheme: dark" in text


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
    assert drill_card.document(result(which="good"))["passed"] is True


# The command line.


def test_list(tmp_path: Path) -> None:
    """--list names the scenarios and runs nothing."""
    done = drill("--list", "--json", "--quick", cwd=tmp_path)
    assert done.returncode == 0
    assert [each["name"] for each in json.loads(done.stdout)] == ["compile", "notice", "kill-commit", "damage"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no command to drill"),
        (["--only", "flood", "--", "true"], "there is no scenario 'flood'; known are start, compile, notice"),
        (["--steps", "few", "--", "true"], "--steps 'few': give a number of steps, 6 or more, or 'all'"),
        (["--", "pyhton", "train.py"], "the command 'pyhton' does not exist on PATH"),
        (["--run", "full", "--", "true"], "is not an empty directory"),
        (["--html", "no/such/page.html", "--", "true"], "there is no directory"),
        (["--", "python", "-c", "raise SystemExit('out of data')"], "without any interruption it ended with"),
        (["--", "true"], "the program never opened a jobkit.Run"),
        (["--timeout", "1s", "--", "sleep", "30"], "the program did not end within 1.0 s"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], told: str) -> None:
    """A program that cannot be drilled is the user's mistake: exit 2 and a sentence, and nothing is left running."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    done = drill(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    from jobkit import processes

    assert not processes.with_environment(contract.ENV_RUN, str(tmp_path))


PLANTED = {
    "unsaved_key": "unsaved RNG: key in unsaved_key.py:main",
    "unsaved_numpy": "unsaved RNG: numpy's global generator (np.random)",
    "unsaved_data": "unsaved data position: data in unsaved_data.py:main",
    "unsaved_part": "unsaved part: average in unsaved_part.py:main",
    "step_counter": "step-dependent state outside the parts: count in step_counter.py:main",
    "wall_clock": "wall-clock dependence",
    "nondeterministic": "nondeterministic operation",
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
@pytest.mark.timeout(1200)
def test_text_example_is_certified(tmp_path: Path) -> None:
    """`jobkit drill -- python -m jobkit.examples.text` exits 0: every scenario, and nothing is left."""
    page = tmp_path / "card.html"
    done = drill("--html", str(page), "--json", "--", "python", "-m", "jobkit.examples.text", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert [each["name"] for each in told["scenarios"]] == [one.name for one in scenarios.ALL]
    assert all(each["identical"] for each in told["scenarios"])
    assert "certified: every promise held" in page.read_text()
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
    from jobkit import processes

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
