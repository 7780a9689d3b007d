"""Runs that begin with what another training has committed: `--from RUN`, and a directory that was trained by hand."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobkit.contract import State
from jobkit.errors import ConfigError, StorageError
from jobkit.rundir import commits
from jobkit.rundir.files import checksum, files_below
from jobkit.rundir.store import Store
from launch.backends import begin_from
from launch.backends.local import Local
from launch.cli.names import BEGINNING
from launch.lifecycle import run_status, verbs
from launch.lifecycle.submission import open_run
from launch.spec.jobspec import JobSpec
from tests.fakes.gcs_server import GcsServer
from tests.harness import jobs
from tests.harness.desk import Desk
from tests.harness.jobs import Project, until_over

TRAIN = """\
import sys
import numpy as np
import jobkit

where = sys.argv[1] if len(sys.argv) > 2 else None
with jobkit.Run(where, save_every="5 steps", keep=9, keep_best=("loss", "min")) as run:
    run.resume(w=np.zeros(3), noise=(noise := np.random.default_rng(0)), optimizer=None)
    for step in run.steps(int(sys.argv[-1])):
        run.state.w = run.state.w + noise.normal(size=3)
        if step == 4:
            run.save(loss=0.1)
    print("ends with", run.step, float(run.state.w.sum()), flush=True)
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project whose script trains."""
    for made in jobs.project(tmp_path):
        (made.path / "train.py").write_text(TRAIN)
        yield made


def content(path: Path) -> dict[str, tuple[int, str]]:
    """Return every file below a directory, with its checksum."""
    return {name: checksum(path / name) for name in files_below(path)}


def printed(store: Store, attempt: int) -> str:
    """Return the last line of an attempt."""
    return store.read(f"attempts/{attempt}/log-0.txt").decode().splitlines()[-1]


def by_hand(project: Project, run: str, steps: int) -> str:
    """Train by hand; return the last line."""
    words = [sys.executable, "train.py", str(project.runs / run), str(steps)]
    environ = os.environ | {"PYTHONPATH": str(jobs.ROOT)}
    done = subprocess.run(words, cwd=project.path, env=environ, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_by_hand_then_submitted_then_another_run(project: Project) -> None:
    """One training by hand goes on with more steps, submitted it goes on, others begin with its steps: bit for bit."""
    whole = by_hand(project, "whole", 20)
    by_hand(project, "r", 8)
    by_hand(project, "r", 10)  # the same by hand, where steps(total) grew
    store = open_run(project.runs / "r")
    done = project.cli("submit", "--run", store.url, "--wait", "--", "python", "train.py", "20")
    assert done.returncode == 0, done.stderr
    assert printed(store, 2) == whole
    status = run_status.status(store)
    assert [(one.outcome, one.step) for one in status.endings] == [("done", 8), ("done", 10), ("done", 20)]
    (submitted,) = jobs.events(store, "submitted")
    assert (submitted["attempts"], submitted["committed"]) == (2, 10)
    before = content(store.path)
    for text, words, says in (("@10", (), whole), ("@best", ("--reset-step",), None)):
        run = str(project.runs / f"from{text.strip('@')}")
        words = ("--from", store.url + text, *words, "--run", run, "--wait", "--", "python", "train.py", "20")
        done = project.cli("submit", *words)
        assert done.returncode == 0, done.stderr
        new = open_run(run)
        (begun,) = jobs.events(new, "begun_from")
        step = {"@10": 10, "@best": 5}[text]
        assert (begun["source"], begun["step"], begun["begins"]) == (store.url, step, 0 if says is None else step)
        assert says is None or printed(new, 0) == says
        assert run_status.status(new).committed_step == 20
    assert content(store.path) == before
    assert f"It began with step 10 of {store.url}." in project.cli("explain", str(project.runs / "from10")).stdout
    story = project.cli("explain", str(project.runs / "frombest")).stdout
    assert f"It began with step 5 of {store.url}, counted as step 0." in story


def test_a_training_by_hand_that_lives_is_not_submitted_over(project: Project) -> None:
    """What is trained by hand just now is refused, with what to do."""
    by_hand(project, "r", 3)
    ledger = project.runs / "r" / "attempts" / "0" / "events-0.jsonl"
    opened = json.dumps({"t": 1.0, "event": "opened", "pid": os.getpid(), "host": os.uname().nodename})
    ledger.write_text(opened + "\n")
    with pytest.raises(ConfigError, match=r"is trained by hand just now: 'jobkit stop .*r' first"):
        project.submit("exit:0")
    with pytest.raises(ConfigError, match="has checkpoints of its own"):
        begin_from.refuse_own(open_run(project.runs / "r"))


def source(project: Project, *steps: int) -> Store:
    """Commit steps in a run."""
    store = Store(project.runs / "source")
    for step in steps:
        stage = commits.new_stage(store, step, 0)
        stage.mkdir()
        (stage / "weights").write_text(f"weights of {step}")
        made = commits.Commit(step=step, attempt=3, reason="interval", at=1.0, files={})
        commits.publish(store, stage, state={"w": 1}, commit=made)
    return store


MISTAKES = [
    ("", "--from is empty"),
    ("nowhere", "does not exist"),
    ("{}@4", "step 4 is not committed there; committed are 3, 7"),
    ("{}@best", "no step of it is the best"),
]


@pytest.mark.parametrize(("text", "said"), MISTAKES)
def test_what_is_not_there_is_refused(project: Project, text: str, said: str) -> None:
    """A run, a step or a best one that is not there: one sentence."""
    with pytest.raises(ConfigError, match=said):
        begin_from.choose(text.format(source(project, 3, 7).url), reset_step=False)


def test_names_as_ls_prints_them(project: Project) -> None:
    """--from takes them, with a step or without; a directory that is called so as a whole comes first."""
    source(project, 3, 7)
    (project.runs / "a@3").mkdir()
    with contextlib.chdir(project.runs.parent):
        texts = ("source", "source@3", "runs/source@best", "a@3", "gs://bucket/r@5", "none@5")
        names = [BEGINNING.convert(text, None, None) for text in texts]
    assert names == [
        "runs/source", "runs/source@3", "runs/source@best", "runs/a@3", "gs://bucket/r@5", "none@5",
    ]  # fmt: skip
    whole = Store(project.runs / "source").path.rename(project.runs / "b@3")
    assert begin_from.choose(str(whole), reset_step=False).step == 7


def test_a_beginning_that_fails_late_leaves_nothing(project: Project) -> None:
    """A step that is copied into a directory that was there is gone where the submit then fails."""
    beginning = begin_from.choose(source(project, 3).url, reset_step=False)
    (project.runs / "r").mkdir()

    def fail(store: Store) -> dict[str, object]:
        beginning.copy(store)
        raise StorageError("the disk is full")

    with pytest.raises(StorageError, match="the disk is full"):
        verbs.submit(Local(), project.spec("exit:0"), begin=fail)
    assert commits.steps(Store(project.runs / "r")) == []


def test_a_damaged_step_is_no_beginning(project: Project) -> None:
    """A flipped bit in the source is found before there is a run, and nothing is left."""
    store = source(project, 3)
    store.file("checkpoints/3/weights").write_text("weights of 4")
    with pytest.raises(StorageError, match="weights differs from its checksum; choose another step"):
        verbs.submit(Local(), project.spec("exit:0"), begin=begin_from.choose(store.url, reset_step=False).copy)
    assert not (project.runs / "r").exists()


KILLED = """
import os, signal, sys
from jobkit.rundir import commits, mirror, remote_steps
from launch.backends import begin_from
from launch.backends.local import Local
from launch.lifecycle import submission, verbs
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec
where, source, run, cwd = sys.argv[1:]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
owner, name = {
    "before copy": (commits, "publish"), "after copy": (specs, "create"), "after run.json": (submission, "record"),
    "in the bucket": (specs, "create"),
}[where]
setattr(owner, name, die)
spec = JobSpec(command=("true",), run=run, cwd=cwd)
verbs.submit(Local(), spec, begin=begin_from.choose(source, reset_step=False).copy)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before copy", "after copy", "after run.json", "in the bucket"])
def test_killed_before_the_new_run_begins(project: Project, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGKILL leaves no run, or one with its beginning; the next submit begins with what that one says."""
    store, run = source(project, 3, 7), str(project.runs / "r")
    with GcsServer() as gcs:
        for name, value in {**gcs.environment(), "JOBKIT_HOME": str(project.path / "homes")}.items():
            monkeypatch.setenv(name, value)
        run = "gs://bucket/r" if where == "in the bucket" else run
        environ = os.environ | {"PYTHONPATH": str(jobs.ROOT)}
        words = [sys.executable, "-c", KILLED, where, f"{store.url}@7", run, str(project.path)]
        done = subprocess.run(words, env=environ, check=False)
        assert done.returncode == -signal.SIGKILL
        new = open_run(run)
        if where == "after run.json":
            assert commits.read(new, 7).reason == "from"
            return
        assert not new.exists("run.json")
        again = JobSpec(command=("true",), run=run, cwd=str(project.path))
        verbs.submit(Local(), again, begin=begin_from.choose(f"{store.url}@3", reset_step=False).copy)
        if where == "in the bucket":
            steps = {name.split("/")[2] for name in gcs.names(prefix="r/checkpoints/")}
            assert steps == {"3"}
        else:
            assert 7 not in commits.steps(new)
            assert commits.read(new, 3).files == commits.read(store, 3).files
        assert until_over(open_run(run)).state is State.DONE


@pytest.mark.slow
def test_from_one_bucket_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between object stores the step is carried over, its step count kept, and the new run goes on from it."""
    with GcsServer() as gcs:
        desk = Desk(tmp_path, gcs)
        desk.use(monkeypatch, gcs.environment() | {"PYTHONPATH": str(jobs.ROOT)})
        desk.write(TRAIN)
        desk.jobkit("submit", "--run", "gs://bucket/one", "--wait", "--", "python", "train.py", "10")
        words = ("--run", "gs://bucket/two", "--wait", "--", "python", "train.py", "15")
        desk.jobkit("submit", "--from", "gs://bucket/one@5", *words)
        assert "attempt 0 resumes at step 5" in desk.jobkit("logs", "gs://bucket/two")
        assert "ends with 15" in desk.jobkit("logs", "gs://bucket/two")


def test_a_beginning_that_another_submit_took_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a URL whose copy is gone when it would begin is refused, and is not there."""
    with GcsServer() as gcs:
        desk = Desk(tmp_path, gcs)
        desk.use(monkeypatch, gcs.environment())
        store = open_run("gs://bucket/new")
        with pytest.raises(ConfigError, match="got in between: submit again"):
            verbs.submit(Local(), JobSpec(command=("true",), run=store.url), begin=lambda store: {"begins": 3})
        assert not [name for name in gcs.names() if name.endswith("run.json")]
