"""Seeing and managing runs at the command line: names, runs that were started by hand, help."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jobkit.rundir.ledger import attempt_events
from jobkit.rundir.store import Store
from launch.cli.main import cli
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
        assert "--memory SIZE   Memory of the container. [default: 14GiB]" in aws


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
