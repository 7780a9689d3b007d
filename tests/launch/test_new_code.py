"""A run goes on with other code: what runs, what is written down of it, and what a kill in between leaves."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobkit.contract import State
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from launch.backends import move_run, registry
from launch.lifecycle import run_status
from launch.spec import changes
from launch.spec import jobspec as specs
from tests.harness import jobs
from tests.harness.jobs import Project, until_over, until_stepping


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project."""
    yield from jobs.project(tmp_path)


def mend(project: Project, text: str = "# mended\n") -> None:
    """Change the code."""
    with (project.path / "job.py").open("a") as file:
        file.write(text)


def log(store: Store, attempt: int) -> str:
    """Return what an attempt printed."""
    return store.read(f"attempts/{attempt}/log-0.txt").decode()


def test_resume_names_what_has_changed_and_goes_on_with_the_snapshot(project: Project) -> None:
    """Who changes the program and resumes is told which files differ, and how they would be used."""
    store = project.submit("exit:4", max_failures=0)
    until_over(store)
    assert "has changed since" not in project.cli("resume", "--wait", store.url).stderr
    mend(project)
    (project.path / "new.py").write_text("")
    done = project.cli("resume", "--wait", store.url)
    assert "has changed since its snapshot was taken (job.py changed; new.py added)" in done.stderr
    assert f"'jobkit resume {store.url} --new-code'" in done.stderr
    assert done.returncode == 1


@pytest.mark.slow
def test_a_mended_bug_continues_the_run(project: Project) -> None:
    """The code of now runs from the newest committed step on; ledger, explain and resume say what differs."""
    store = project.submit("commit:7,exit:4", "exit:0", max_failures=0)
    assert until_over(store).state is State.FAILED
    mend(project, 'print("mended", flush=True)\n')
    (project.path / "config.py").write_text("x = 1\n")
    words = ("python", "job.py", "exit:4", "commit:9,exit:0", "--lr", "0.1")
    done = project.cli("resume", store.url, "--new-code", "--wait", "--", *words)
    assert done.returncode == 0, done.stderr
    told = (
        "job.py changed; config.py added; python job.py commit:7,exit:4 exit:0 -> python job.py exit:4 commit:9,exit:0"
    )
    assert f"from step 7 on with other code or options: {told}; --lr 0.1 added" in done.stderr
    assert until_over(store).committed_step == 9
    assert log(store, 1).splitlines()[0] == "attempt 1: commit:9,exit:0"
    (event,) = jobs.events(store, "new_code")
    assert (event["changed"], event["added"], event["options"][1:]) == (["job.py"], ["config.py"], ["--lr 0.1 added"])
    assert (event["attempts"], event["committed"], event["code"]) == (1, 7, specs.read(store).code)
    story = project.cli("explain", store.url).stdout
    assert "From step 7 on (attempt 1) other code or options ran: job.py changed; config.py added" in story
    assert "other code or options" in json.dumps(json.loads(project.cli("explain", "--json", store.url).stdout))


def test_a_finished_run_goes_on_with_more_steps(project: Project) -> None:
    """What is done is left alone by a resume, and trains on with another command."""
    store = project.submit("commit:3,exit:0")
    until_over(store)
    assert "--new-code -- COMMAND" in project.cli("resume", store.url).stdout
    assert "leave --new-code out" in project.cli("resume", "--new-code", store.url).stderr
    assert "give --new-code too" in project.cli("resume", store.url, "--", "python", "job.py", "exit:0").stderr
    assert run_status.status(store).attempts == 1
    move_run.resume(store.url, command=("python", "job.py", "exit:1", "commit:8,exit:0"))
    over = until_over(store)
    assert (over.state, over.attempts, over.committed_step) == (State.DONE, 2, 8)


def test_a_run_that_lives_keeps_its_code(project: Project) -> None:
    """New code for a run that is alive is refused, and nothing of it is written."""
    store = project.submit("hold", "exit:0")
    until_stepping(store)
    before = store.read("run.json"), store.names("code")
    mend(project)
    with pytest.raises(ConfigError, match="is alive"):
        move_run.resume(store.url, command=())
    assert (store.read("run.json"), store.names("code")) == before
    registry.cancel(store.url)


def test_what_cannot_run_is_refused_before_anything_is_written(project: Project) -> None:
    """A script that is not there, a sweep, a name of a sweep: one sentence, and the run is as it was."""
    store = project.submit("exit:1")
    until_over(store)
    before = store.read("run.json"), store.read("events.jsonl"), store.names("code")
    for words, said in ((("python", "gone.py"), "does not exist"), (("python", "job.py", "{lr}"), "add --sweep")):
        with pytest.raises(ConfigError, match=said):
            move_run.resume(store.url, command=words)
    assert (store.read("run.json"), store.read("events.jsonl"), store.names("code")) == before


KILLED = """
import os, signal, sys
from jobkit.rundir.store import Store
from launch.backends import move_run, new_code
from launch.lifecycle import submission
from launch.spec import jobspec as specs, snapshot
where, url, words = sys.argv[1], sys.argv[2], sys.argv[3:]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
def before(owner, name):
    setattr(owner, name, lambda *_, **__: die())
def after(owner, name):
    real = getattr(owner, name)
    setattr(owner, name, lambda *args, **named: (real(*args, **named), die()))
{
    "after archive": lambda: after(snapshot, "take"),
    "before run.json": lambda: before(specs, "rewrite"),
    "after run.json": lambda: after(specs, "rewrite"),
    "after ledger": lambda: after(submission, "record"),
    "resumed": lambda: after(submission, "record_taken_up"),
}[where]()
move_run.resume(url, command=words)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "new", "finished"),
    [
        ("after archive", False, False),
        ("before run.json", False, True),
        ("after run.json", True, False),
        ("after run.json", True, True),
        ("after ledger", True, False),
        ("after ledger", True, True),
        ("resumed", True, True),
    ],
)
def test_killed_between_two_writes(project: Project, where: str, new: bool, finished: bool) -> None:
    """A SIGKILL anywhere leaves all of the old or all of the new; the same said again gets there, and once alone."""
    store = project.submit("commit:2,exit:0" if finished else "commit:2,exit:4", max_failures=0)
    until_over(store)
    mend(project, 'print("never")\n')
    words = ["python", "job.py", "exit:4", "read:job.py,commit:5,exit:0"]
    environ = os.environ | {"PYTHONPATH": str(jobs.ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, where, store.url, *words], env=environ, check=False)
    assert done.returncode == -signal.SIGKILL
    spec = specs.read(store)
    assert list(spec.command) == (words if new else [*words[:2], "commit:2,exit:0" if finished else "commit:2,exit:4"])
    assert changes.of_archive(store, str(spec.code)).keys() == {"job.py"}
    if new and (not finished or where == "resumed"):  # what has begun is finished by a plain resume
        registry.resume(store.url)
    else:
        move_run.resume(store.url, command=words)
    over = until_over(store)
    assert (over.state, over.committed_step) == (State.DONE, 5)
    assert 'print("never")' in log(store, 1)
    (event,) = jobs.events(store, "new_code")
    assert (event["changed"], event["committed"]) == (["job.py"], 2)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("python a.py --lr 1 --x", "python a.py --lr=2 --wd -0.1", ["--lr 1 -> 2", "--x removed", "--wd -0.1 added"]),
        ("python a.py 1", "python b.py 1", ["python a.py 1 -> python b.py 1"]),
        ("python a.py --layers 1 2", "python a.py --layers 1 2 3", ["--layers 1 2 -> 1 2 3"]),
        ("python a.py", "python a.py", []),
    ],
)  # fmt: skip
def test_options_that_differ_are_named(before: str, after: str, told: list[str]) -> None:
    """Two commands are compared option by option."""
    assert changes.of_commands(before.split(), after.split()) == told


def test_a_directory_is_named_once() -> None:
    """A directory that is new or gone as a whole is named and not what lies in it: weights that were exported, say."""
    before = {"train.py": "1", "lib/a.py": "1", "old/a": "1", "old/b/c": "1"}
    after = {"train.py": "2", "lib/a.py": "1", "lib/b.py": "1", "weights/a": "1", "weights/d/b": "1", "lib/sub/c": "1"}
    assert str(changes.between(before, after)) == "train.py changed; lib/b.py, lib/sub/, weights/ added; old/ removed"
    assert changes.between({}, {"a/b": "1", "c": "1"}).added == ("a/", "c")


def test_what_is_no_list_of_changes_is_none() -> None:
    """A ledger that somebody else has written to breaks no reader."""
    event = {"event": "new_code", "t": 1.0, "changed": 5, "added": "a.py", "options": {"--lr": 1}}
    assert changes.told(event) == "what differs is not known"


def test_code_is_not_taken_from_wherever_one_is(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the directory of the submit is gone, the code of another one is taken only with a command for it."""
    store = project.submit("exit:4", max_failures=0)
    until_over(store)
    before = store.read("run.json"), store.names("code")
    project.path.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is not on this machine: change to the directory whose code"):
        move_run.resume(store.url, command=())
    assert (store.read("run.json"), store.names("code")) == before


@pytest.mark.slow
def test_a_finished_run_without_a_snapshot_goes_on(project: Project) -> None:
    """Whether the directory itself has changed nobody can tell: --new-code is taken at its word."""
    store = project.submit("commit:3,exit:0", "commit:5,exit:0", snapshot=False)
    until_over(store)
    move_run.resume(store.url, command=())
    over = until_over(store)
    assert (over.state, over.attempts, over.committed_step) == (State.DONE, 2, 5)
