"""`jobkit rm`: what it removes and what it keeps, what it refuses, and what is left where it was interrupted."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jobkit import contract, versions
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from launch.backends import registry, remove_run
from launch.cli.main import cli
from launch.lifecycle import submission
from launch.spec import jobspec as specs
from tests.harness import jobs
from tests.harness.jobs import Project, until_over


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "home"))
    for made in jobs.project(tmp_path):
        made.runs = made.path / "runs"
        monkeypatch.chdir(made.path)
        yield made


def call(*arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli, arguments)


def ended(project: Project, url: str = "") -> Store:
    """Write down a run that has ended, with an attempt, a committed step and code that links to data."""
    store = Store(url or project.runs / "r")
    store.make(shared=False)
    assert specs.create(store, project.spec("exit:0"), "local")
    submission.record(store, "ended", state=contract.State.DONE, reason="finished")
    files = {"attempts/0/log-0.txt": "x", "checkpoints/5/commit.json": "{}", "checkpoints/5/default/d": "x" * 100}
    for name, content in files.items():
        store.write(name, content)
    (project.path / "data").mkdir()
    (project.path / "data" / "words").write_text("mine")
    store.file("code/abc").mkdir(parents=True)
    store.file("code/abc/data").symlink_to(project.path / "data")
    if store.remote is not None:
        for name in (*files, contract.RUN_JSON, contract.EVENTS):
            store.remote.write(name, store.read(name))
    return store


def test_it_removes_what_is_the_runs(project: Project) -> None:
    """A run goes with all that is jobkit's of it, after --yes alone; data that its code links to stays."""
    store = ended(project)
    refused = call("rm", "r")
    assert "removing runs/r (done, 1 committed step, " in str(refused.exception)
    assert "asks first: give --yes" in str(refused.exception)
    assert store.exists("checkpoints/5/commit.json")
    done = call("rm", "r", "--yes")
    assert (done.exit_code, done.stdout.startswith("removed runs/r (done, 1 committed step, ")) == (0, True), done
    assert not store.path.exists()
    assert (project.path / "data" / "words").read_text() == "mine"
    assert call("ls").stdout == f"no runs below {project.runs}\n"


def test_what_is_not_jobkits_stays(project: Project) -> None:
    """Files of somebody else in a run's directory stay, and are named; that of a run by hand may be a project."""
    store = ended(project)
    store.file("thesis.tex").write_text("mine")
    assert json.loads(call("rm", "r", "--yes", "--json").stdout)["kept"] == ["thesis.tex"]
    assert [path.name for path in store.path.iterdir()] == ["thesis.tex"]
    for name in ("strategy.json", "attempts/0/events-0.jsonl", "train.py", "README.md"):
        Store(project.runs / "hand").write(name, "{}")
    before = sorted((project.runs / "hand").rglob("*"))
    refused = str(call("rm", "hand", "--yes").exception)
    assert "its directory holds more than the run (README.md, train.py)" in refused
    assert sorted((project.runs / "hand").rglob("*")) == before
    (project.runs / "hand" / "train.py").unlink()
    (project.runs / "hand" / "README.md").unlink()
    assert call("rm", "hand", "--yes").exit_code == 0
    assert not (project.runs / "hand").exists()


def test_one_that_is_alive_is_refused(project: Project) -> None:
    """A run that goes on is not removed; what ends it is said, and after that it can be removed."""
    store = project.submit("hold")
    jobs.until_stepping(store)
    refused = call("rm", "r", "--yes")
    assert f"is running: end it first with 'jobkit cancel {store.url}'" in str(refused.exception)
    assert store.exists(contract.RUN_JSON)
    assert call("cancel", "r").exit_code == 0
    until_over(store)
    assert call("rm", "r", "--yes").exit_code == 0
    assert not store.path.exists()
    assert "is not a run" in str(call("rm", "r", "--yes").exception)


def test_one_that_a_program_of_a_persons_own_has_open(project: Project) -> None:
    """Between two loops, or behind its last one, it is neither removed nor submitted over; once it is closed it is."""
    store = Store(project.runs / "hand")
    store.write(contract.STRATEGY, "{}")
    ledger = Ledger(store.file(contract.events_file(0, 0)))
    ledger.append("opened", pid=os.getpid(), host=os.uname().nodename)
    ledger.append("finished", step=3)
    said = f"was started by hand, and process {os.getpid()} has it open still: end that first"
    assert said in str(call("rm", "hand", "--yes").exception)
    with pytest.raises(ConfigError, match=f"is open in process {os.getpid()}, by hand"):
        project.submit("exit:0", run="hand")
    ledger.close()
    assert call("rm", "hand", "--yes").exit_code == 0
    assert not store.path.exists()


@pytest.mark.parametrize("url", ["", "memory://bucket/runs/r"])
@pytest.mark.parametrize("count", range(12))
def test_what_a_removal_leaves_is_no_run(
    project: Project, monkeypatch: pytest.MonkeyPatch, url: str, count: int
) -> None:
    """Interrupted anywhere it leaves no run: nothing lists, resumes, submits over or trains it; again it is gone."""
    store = ended(project, url)
    left = [count]

    def interrupted(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    remove, forget = remove_run._remove, Remote.remove
    with monkeypatch.context() as patch:
        patch.setattr(remove_run, "_remove", lambda path: (interrupted(), remove(path)))
        patch.setattr(
            Remote, "remove", lambda self, names: [(interrupted(), forget(self, [name])) for name in list(names)]
        )
        result = call("rm", url or "r", "--yes")
    if result.exit_code == 0:
        assert left[0] >= 0
    elif store.exists(contract.RUN_JSON):
        content = (
            (store.remote or store).read(contract.RUN_JSON) if store.remote is None or store.remote.find() else b""
        )
        for words in (["status"], ["resume"], ["logs"], ["submit", "--run"]):
            rest = ["--", "python", "job.py", "exit:0"] if words[0] == "submit" else []
            if content or words[0] != "submit":
                assert "is being removed" in str(call(*words, url or "runs/r", *rest).exception), words
        assert call("ls", *([url.rpartition("/")[0]] if url else []), "--json").stdout.splitlines()[-1] == "[]"
        if content:
            with pytest.raises(ConfigError, match="is being removed"):
                versions.check_run(content, "run.json")
        assert call("rm", url or "r", "--yes").exit_code == 0
    assert not store.path.exists()
    assert store.remote is None or store.remote.find() == {}
    with pytest.raises(JobkitError, match="is not a run"):
        specs.read(store)


def test_runs_begun_by_hand_in_a_bucket(project: Project) -> None:
    """Below a URL runs without a submit are listed, what lies in a run is none, and they are removed as any."""
    remote = Remote("memory://bucket/runs")
    for name in ("hand/strategy.json", "sent/strategy.json", "sent/run.json", "sent/code/x/strategy.json", "y/words"):
        remote.write(name, b"{}")
    assert registry.runs_below("memory://bucket/runs")[1] == [
        f"memory://bucket/runs/{name}" for name in ("hand", "sent")
    ]
    assert registry.runs_below("memory://bucket/runs/hand")[1] == ["memory://bucket/runs/hand"]
    row = json.loads(call("status", "memory://bucket/runs/hand", "--json").stdout)
    assert (row["backend"], row["state"]) == ("by hand", "failed")
    assert call("rm", "memory://bucket/runs/hand", "--yes").exit_code == 0
    assert remote.find("hand") == {}
    assert remote.find("y")
    remote.remove(remote.find())


def test_homes_of_other_processes_go_too(project: Project) -> None:
    """What other processes of a run in a bucket had on this machine goes with it, but for what is not jobkit's."""
    store = ended(project, "memory://bucket/runs/several")
    others = [store.of_process(process) for process in (1, 2)]
    for other in others:
        other.write("checkpoints/5/part-1.json", "{}")
        other.write(contract.ID, "x")
    others[1].write("own.txt", "mine")
    assert call("rm", store.url, "--yes").exit_code == 0
    assert [one.path.exists() for one in (store, *others)] == [False, False, True]
    assert [path.name for path in others[1].path.iterdir()] == ["own.txt"]
