"""jobkit demo: its plan, its verdict, its picture, and once the whole of it."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit import contract
from jobkit.contract import Outcome
from jobkit.errors import ConfigError
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.store import Store
from launch.console import Console
from launch.drill import demo
from launch.drill.demo import DemoResult, Interruption
from launch.drill.observe import Ending
from launch.lifecycle.history import read_history
from tests.fakes.gcs_server import GcsServer
from tests.harness import browser

ROOT = Path(__file__).parent.parent.parent


def went(kind: str = "preemption", **changes: Any) -> Interruption:
    """Return an interruption that went as promised, but for `changes`."""
    ending = Ending(0, Outcome.PREEMPTED, "why", reached_step=92, resumed_step=92, commit_s=0.25, restart_s=4.0)
    if kind == "kill":
        ending = dataclasses.replace(ending, outcome=Outcome.KILLED, commit_s=None, resumed_step=80)
    return Interruption(kind, "trainer", 90, 90, dataclasses.replace(ending, **changes))


NEVER_SENT = Interruption("preemption", "trainer", 90)


def result(*interruptions: Interruption, identical: bool = True) -> DemoResult:
    """Return a demo's result."""
    comparison = {"equal": identical, "leaves": 122, "step": 500, "values": 510, "repeated": 12, "difference": None}
    if not identical:
        comparison["difference"] = {"name": "loss", "step": 91, "a": "1.0", "b": "1.5"}
    return DemoResult("run", 7, 500, 4, list(interruptions), comparison, 20.0, 50.0, "loss.png", "report.html")


def card(shown: DemoResult) -> str:
    """Return the card as an 80-column terminal shows it."""
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(demo._card(shown))
    return captured.get()


@given(st.integers(0, 10**6))
def test_plan(seed: int) -> None:
    """Whatever the seed: two preemptions and a kill, in rising order, far enough apart to hit an attempt each."""
    plan = demo.draw(seed)
    assert sorted((each.kind, each.target) for each in plan) == [
        ("kill", "trainer"),
        ("preemption", "supervisor"),
        ("preemption", "trainer"),
    ]
    steps = [each.planned_step for each in plan]
    assert steps[0] > 0
    assert steps[-1] < demo.STEPS - 20
    assert min(later - earlier for earlier, later in pairwise(steps)) >= 40
    assert demo.draw(seed) == plan


def test_seeds_differ() -> None:
    """The seed decides the moments and the order."""
    plans = [demo.draw(seed) for seed in range(20)]
    assert len({plan[0].planned_step for plan in plans}) > 5
    assert {plan[0].kind for plan in plans} == {"preemption", "kill"}


@pytest.mark.parametrize(
    ("interruption", "promised"),
    [
        (went(), True),
        (went("kill"), True),
        (NEVER_SENT, False),
        (went(outcome=Outcome.KILLED), False),
        (went("kill", outcome=Outcome.PREEMPTED), False),
        (went(resumed_step=None), False),
        (went(resumed_step=91), False),
        (went(outcome=None), False),
    ],
)
def test_as_promised(interruption: Interruption, promised: bool) -> None:
    """It counts only if it was sent, ended its attempt the right way, and a preemption lost no step."""
    assert interruption.as_promised is promised
    assert result(interruption).survived is promised


def test_card_of_success() -> None:
    """The card says attempts, what each interruption cost, and the verdict."""
    text = card(result(went(), went("kill")))
    assert "500 steps in 4 attempts" in text
    assert "SIGTERM, trainer       90           0     0.25 s    4.0 s  yes" in text
    assert "SIGKILL, trainer       90          12          -    4.0 s  yes" in text
    assert "final state and every loss bit-identical: yes" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_card_of_failure() -> None:
    """A difference is named, and so is an interruption that never happened."""
    text = card(result(NEVER_SENT, identical=False))
    assert "bit-identical: no" in text
    assert "first difference at step 91, loss: 1.0 / 1.5" in text
    assert "no (not sent)" in text
    assert not result(went(), identical=False).survived


def test_bars_on_a_terminal() -> None:
    """On a terminal each training has a bar with its step, and events are printed above them."""
    console = Console(force_terminal=True, width=100, no_color=True)
    with console.capture() as captured, demo._bars(console) as bars:
        bars.show("disturbed", 120, "stepping, loss 2.500, committed 100")
        bars.say("step 120: SIGKILL to the trainer of attempt 0")
    shown = captured.get()
    assert "  step 120: SIGKILL to the trainer of attempt 0\n" in shown
    assert "step 120/500 stepping, loss 2.500, committed 100" in shown


def test_lines_without_a_terminal() -> None:
    """Elsewhere there are plain lines, one in five seconds at most, and no control characters."""
    console = Console(force_terminal=False, width=100)
    with console.capture() as captured, demo._bars(console) as bars:
        for step in range(100):
            bars.show("disturbed", step, "stepping")
    assert captured.get() == "  disturbed: step 0/500, stepping\n"


def test_picture(tmp_path: Path) -> None:
    """The picture is drawn from the ledgers alone, with interruptions early and late."""
    for name in ("undisturbed", "disturbed"):
        store = Store(tmp_path / name)
        store.write("run.json", "{}")
        for attempt, (outcome, step) in enumerate([("killed", 40), ("preempted", 470), ("done", 500)]):
            ledger = Ledger(store.file(f"attempts/{attempt}/events-0.jsonl"))
            ledger.append("restored" if attempt else "fresh", step=[0, 30, 470][attempt])
            ledger.append("saved", step=40, durable_s=0.1, blocking_s=0.1)
            for at in range([0, 30, 470][attempt], step, 5):
                ledger.append("metrics", step=at, values={"loss": 5 / (at + 1)})
            ledger.append("metrics", step=step - 1, values={"val_loss": 2.0})
            ledger.close()
            told = {"outcome": outcome, "step": step, "reason": "why", "ended": time.time()}
            store.write(f"attempts/{attempt}/outcome.json", json.dumps(told))
    undisturbed, disturbed = (read_history(Store(tmp_path / name)) for name in ("undisturbed", "disturbed"))
    path = demo.draw_losses(tmp_path / "report/loss.png", undisturbed, disturbed)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


def test_directory_that_is_taken(tmp_path: Path) -> None:
    """A directory with anything in it is refused before anything runs."""
    (tmp_path / "precious").write_text("here")
    with pytest.raises(ConfigError, match="is not an empty directory"):
        demo.main(str(tmp_path), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_missing_packages(tmp_path: Path) -> None:
    """Without the extras one sentence says what to install, and nothing is written."""
    # An import system in which matplotlib is not there, as on a machine that has only the base.
    code = (
        "import importlib.util as u, sys\nreal = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'matplotlib' else real(name)\n"
        "sys.argv = ['jobkit', 'demo', '--run', sys.argv[1]]\nimport launch.cli.main\nlaunch.cli.main.main()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "jobkit: the demo needs matplotlib: pip install -e '.[train,report]' in jobkit's checkout\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_demo_on_a_bucket(tmp_path: Path) -> None:
    """`make demo RUN=gs://...`: real trainings and signals, compared from what has got into the bucket, a page."""
    with GcsServer() as server:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "launch",
                "demo",
                "--run",
                "gs://bucket/demo",
                "--seed",
                "4",
                "--steps",
                "200",
                "--json",
            ],
            cwd=tmp_path,
            env=os.environ
            | server.environment()
            | {"PYTHONPATH": str(ROOT), contract.ENV_HOME: str(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert any(name.endswith("disturbed/checkpoints/200/commit.json") for name in server.names())
        reported = _report_elsewhere(server, tmp_path)
    told = json.loads(done.stdout)
    assert (told["identical"], told["survived"], told["run"]) == (True, True, "gs://bucket/demo")
    assert (told["seed"], told["attempts"]) == (4, 4)
    assert [each["as_promised"] for each in told["interruptions"]] == [True] * 3
    assert [each["lost_steps"] == 0 for each in told["interruptions"] if each["kind"] == "preemption"] == [True] * 2
    assert "SIGKILL to the trainer of attempt" in done.stderr
    browser.inspect(Path(told["report"]))  # the screenshots lie beside it
    assert Path(told["plot"]).read_bytes().startswith(b"\x89PNG")
    assert [(one["name"], one["steps"], one["goodput"] > 0) for one in reported] == [
        ("disturbed", 200, True),
        ("undisturbed", 200, True),
    ]
    assert len(reported[0]["attempts"]) == told["attempts"]


def _report_elsewhere(server: GcsServer, path: Path) -> list[dict[str, Any]]:
    """Report what is in the bucket, on a machine that knows nothing of it."""
    environ = os.environ | server.environment() | {"PYTHONPATH": str(ROOT), contract.ENV_HOME: str(path / "elsewhere")}
    command = [sys.executable, "-m", "launch", "report", "--json", "gs://bucket/demo"]
    done = subprocess.run(command, cwd=path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list((path / "elsewhere").rglob("commit.json"))  # no checkpoint is fetched for it
    told: list[dict[str, Any]] = json.loads(done.stdout)
    return told
