"""Seeing and managing runs at the command line: names, runs that were started by hand, help."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from jobkit import contract
from jobkit.rundir.ledger import attempt_events
from jobkit.rundir.store import Store
from launch.cli.main import cli
from launch.console import Console
from launch.lifecycle import run_status, submission
from launch.lifecycle.run_status import Status
from launch.report import follow
from launch.spec import jobspec as specs
from tests.harness import jobs
from tests.harness.jobs import Project, until, until_over

TRAIN = """\
import sys, time
import jobkit

with jobkit.Run("runs/hand", save_every="5 steps", trackers=()) as run:
    state = run.resume(total=0)
    for step in run.steps(int(sys.argv[1])):
        state.total += 1
        run.log(loss=1 / state.total)
        time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    for made in jobs.project(tmp_path):
        made.runs = made.path / "runs"
        (made.path / "train.py").write_text(TRAIN)
        yield made


def call(project: Project, *arguments: str, **environ: str) -> Result:
    """Run a command in this process, from the project directory."""
    with contextlib.chdir(project.path):
        return CliRunner().invoke(cli, arguments, env={"COLUMNS": "100"} | environ)


def by_hand(project: Project, steps: int, step_s: float) -> "subprocess.Popen[bytes]":
    """Start train.py as a person does, without a launcher."""
    return subprocess.Popen([sys.executable, "train.py", str(steps), str(step_s)], cwd=project.path)


def test_alone_it_prints_help(project: Project) -> None:
    """`jobkit` alone prints what --help does, and exits 0."""
    alone, asked = project.cli(), project.cli("--help")
    assert (alone.returncode, alone.stdout, alone.stderr) == (0, asked.stdout, "")
    assert "checkpoints" in alone.stdout


def test_help_is_grouped_by_backend(project: Project) -> None:
    """Options for some backends alone stand under their names, with defaults, the same for submit and resume."""
    for command in ("submit", "resume"):
        text = call(project, command, "--help").stdout
        general, _, rest = text.partition("\nOptions for SLURM:")
        slurm, _, rest = rest.partition("\nOptions for gcp:")
        gcp, _, aws = rest.partition("\nOptions for aws:")
        assert "--wait" in general
        assert "--partition" not in general
        assert "--partition TEXT     Partition. [default: the cluster's]" in slurm
        assert "--machine-type" in gcp
        assert re.search(r"--memory SIZE +Memory of the container\. \[default: 14GiB\]", aws)


@pytest.mark.slow
def test_names_as_ls_prints_them(project: Project) -> None:
    """Every command takes the name that ls prints; a run under the path itself comes first; a point has one too."""
    until_over(project.submit("commit:3,exit:0", run="group/w2"))
    (name,) = (line.split()[0] for line in call(project, "ls").stdout.splitlines()[1:])
    assert name == "group/w2"
    for words in (["status"], ["logs"], ["report"], ["explain"], ["checkpoints"], ["resume"]):
        done = call(project, *words, name)
        assert done.exit_code == 0, done
    assert "already done" in str(call(project, "cancel", name).exception)
    assert "trains just now" in str(call(project, "save", name).exception)
    until_over(project.submit("exit:0", run="../group/w2"))
    assert json.loads(call(project, "status", name, "--json").stdout)["run"] == str(project.path / "group/w2")
    assert "nothing is not a run" in str(call(project, "status", "nothing").exception)


@pytest.mark.slow
def test_a_run_that_was_started_by_hand(project: Project) -> None:
    """What nobody submitted is listed and told of: while it trains, after a SIGKILL, and when it is done."""
    store = Store(project.runs / "hand")

    def seen() -> dict[str, object]:
        (row,) = json.loads(call(project, "ls", "--json").stdout)
        assert row["backend"] == "by hand"
        return {name: row[name] for name in ("state", "attempts", "reason")}

    with by_hand(project, 100_000, 0.02) as program:
        until(lambda: any(event["event"] == "saved" and event["step"] for event in attempt_events(store, 0)), "saved")
        assert seen() == {"state": "running", "attempts": 1, "reason": ""}
        shown = call(project, "status", "hand").stdout
        assert re.search(r"^step +\d+ of 100000 \(0 %\), about \d+ min", shown, re.MULTILINE), shown
        assert re.search(r"^elapsed +\d", shown, re.MULTILINE)
        assert f"none: it was started by hand and not submitted, on {os.uname().nodename}" in shown
        refused = call(project, "rm", "hand", "--yes").exception
        assert "is running: end it first with 'jobkit stop " in str(refused)
        os.kill(program.pid, signal.SIGKILL)
    killed = seen()
    assert killed["state"] == "failed"
    assert "left no word; started again it goes on from step" in str(killed["reason"])
    with by_hand(project, 1, 0) as program:
        assert program.wait(60) == 0
    assert seen()["state"] == "done"
    told = call(project, "explain", "hand").stdout
    assert "The run was started by hand" in told
    assert "The run was submitted" not in told
    assert "Attempt 0 was killed" in told
    assert "ended as done" in told
    assert json.loads(call(project, "report", "hand", "--json").stdout)["attempts"][1]["outcome"] == "done"
    logs = project.cli("logs", "hand")
    assert (logs.returncode, "was started by hand and not submitted" in logs.stderr) == (2, True)


def fabricate(project: Project, name: str, **options: Any) -> Store:
    """Write down a run that has been submitted and no more."""
    store = Store(project.runs / name)
    store.make(shared=False)
    assert specs.create(store, project.spec("exit:0", run=name, **options), "local")
    return store


NAMES = ["a", "train-20261129-101010", "group/train-20261129-101010", "demo-20261129-101010/undisturbed", "n" * 70]


@pytest.mark.parametrize("width", [80, 100])
def test_ls_fits_the_terminal(project: Project, width: int) -> None:
    """No line is wider than the terminal, no name is cut, and every word that there is to say is there."""
    for name in NAMES:
        fabricate(project, name)
    lines = call(project, "ls", COLUMNS=str(width)).stdout.splitlines()
    heads = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert sorted(heads) == sorted(["RUN", *NAMES])
    assert all(len(line) <= width for line in lines if str(project.runs) not in line), lines
    whole = " ".join(" ".join(lines).split())
    for name in NAMES:
        assert f"the local runner is gone; continue with: jobkit resume {project.runs / name}" in whole
    assert re.search(r"^ *\S* +failed +\d+ s +local +- +-$", "\n".join(lines), re.MULTILINE)


def test_ls_folds_kept_drills(project: Project) -> None:
    """The runs of a kept drill are one line, which says how to list them; as JSON all are there."""
    for name in ("drill-1/reference", "drill-1/kill", "train"):
        fabricate(project, name)
    shown = call(project, "ls").stdout
    assert [line.split()[0] for line in shown.splitlines() if line[0] != " "] == ["RUN", "train", "drill-1:"]
    assert shown.endswith("drill-1: 2 runs of a kept drill; jobkit ls runs/drill-1\n")
    names = [line.split()[0] for line in call(project, "ls", "runs/drill-1").stdout.splitlines() if line[0] != " "]
    assert sorted(names) == ["RUN", "runs/drill-1/kill", "runs/drill-1/reference"]
    assert "runs/drill-1/kill" in call(project, "status", "runs/drill-1/kill").stdout
    assert len(json.loads(call(project, "ls", "--json").stdout)) == 3


LOGS = {0: "".join(f"line {number}\n" for number in range(20_000)), 1: "", 2: "one\ntwo\nthree"}


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 9_000, 20_002, 20_003, 30_000])
def test_the_last_lines_of_logs(project: Project, count: int) -> None:
    """--tail prints the last lines of all attempts, each under its attempt, as if the log were one."""
    store = fabricate(project, "r")
    for number, text in LOGS.items():
        store.write(contract.log_file(number), text)
    shown = call(project, "logs", "--tail", str(count), "r").stdout
    lines = [line for line in shown.splitlines() if not line.startswith("==> ")]
    assert lines == "".join(LOGS.values()).splitlines()[max(0, 20_003 - count) :]
    assert ("==> attempt 0 <==" in shown, "==> attempt 2 <==" in shown) == (count > 3, count > 0)
    one = call(project, "logs", "--tail", str(count), "--attempt", "0", "r").stdout
    assert one.splitlines() == LOGS[0].splitlines()[max(0, 20_000 - count) :]


def test_where_a_run_is(project: Project) -> None:
    """Status names backend and machine while a run goes on, and of SLURM job and partition."""
    store = project.submit("hold")
    jobs.until_stepping(store)
    shown = call(project, "status", "r").stdout
    assert re.search(rf"^backend +local, on {os.uname().nodename}$", shown, re.MULTILINE), shown
    assert call(project, "cancel", "r").exit_code == 0
    slurm = Status(
        run="/r", name="r", backend="slurm", state=contract.State.RUNNING, job="12", partition="low", node="n1"
    )
    assert dict(follow.rows(slurm))["backend"] == "slurm, job 12, partition low, on n1"


def test_the_live_view_of_a_sweep(project: Project) -> None:
    """Who waits for a sweep sees each point in a line: its values, state, steps of how many, metrics."""
    points = [
        Status(
            run=f"/s/points/{number}", name=f"s-{number}", backend="local", state=state, values={"lr": f"1e-{number}"},
            attempt=0, attempts=1, step=5 * number, total_steps=40, metrics={"loss": 0.5},
        )
        for number, state in enumerate(2 * [contract.State.RUNNING, contract.State.DONE])
    ]  # fmt: skip
    status = Status(run="/s", name="s", backend="local", state=contract.State.RUNNING, points=points)
    console = Console(file=io.StringIO(), width=80)
    console.print(follow._card(status))
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    head = next(index for index, line in enumerate(lines) if line.startswith("POINT"))
    assert [line.split()[:5] for line in lines[head + 1 :]] == [
        [str(number), f"1e-{number}", state, "0", f"{5 * number}/40"]
        for number, state in enumerate(2 * ["running", "done"])
    ]
    assert run_status.to_json(status)


@pytest.mark.parametrize(("state", "code"), [("done", 0), ("failed", 1), ("cancelled", 3)])
def test_wait_exits_as_submit_does(project: Project, state: str, code: int) -> None:
    """`jobkit wait` exits 0 for done, 1 for failed, 3 for cancelled, and says how the run ended."""
    store = fabricate(project, "r")
    submission.record(store, "ended", state=state, reason="so it was")
    done = call(project, "wait", "r")
    assert (done.exit_code, done.stdout) == (code, f"{state}: so it was\n")
    told = call(project, "wait", "r", "--json")
    assert (told.exit_code, json.loads(told.stdout)["state"]) == (code, state)


def test_wait_for_a_run_that_goes_on(project: Project) -> None:
    """`jobkit wait` returns when the run is over, and not before."""
    store = project.submit("sleep:1,commit:2,exit:0")
    done = call(project, "wait", "r")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1].startswith("done after 1 attempt, committed step 2")
    until_over(store)


SAMPLE = re.compile(r'(jobkit_run_[a-z_]+)\{run="((?:[^"\\\n]|\\.)*)",name="((?:[^"\\\n]|\\.)*)"\} (-?[0-9.e+-]+)')


def test_prometheus(project: Project) -> None:
    """Every line is what Prometheus reads, each metric with help and type, and the values are those of the status."""
    store = fabricate(project, 'a"b\\c')
    store.write(
        contract.events_file(0, 0),
        '{"t":1.0,"event":"opened"}\n{"t":2.0,"event":"fresh","step":0}\n{"t":3.0,"event":"loop","step":0,"total":40}\n'
        '{"t":4.0,"event":"first_step","step":1}\n{"t":5.0,"event":"metrics","step":9,"values":{"loss":1}}\n',
    )
    store.write(contract.events_file(1, 0), '{"t":6.0,"event":"opened"}\n{"t":7.0,"event":"fresh","step":0}\n')
    store.write(f"{contract.attempt_dir(0)}/{contract.OUTCOME}", '{"outcome":"killed","reason":"SIGKILL"}')
    lines = call(project, "status", 'a"b\\c', "--prometheus").stdout.splitlines()
    values = {}
    for line in lines:
        if not line.startswith("#"):
            sample = SAMPLE.fullmatch(line)
            assert sample, line
            assert re.sub(r"\\(.)", r"\1", sample[2]) == store.url
            values[sample[1].removeprefix("jobkit_run_")] = float(sample[4])
    for name in values:
        assert f"# TYPE jobkit_run_{name} gauge" in lines
        assert any(line.startswith(f"# HELP jobkit_run_{name} ") for line in lines)
    assert {"attempts": 2, "lost_steps": 9, "committed_step": -1, "running": 0, "over": 1}.items() <= values.items()
    assert call(project, "status", 'a"b\\c', "--prometheus", "--json").exit_code != 0
