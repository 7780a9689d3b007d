"""Formats: what a newer jobkit has written is refused in one sentence, and nothing is lost by it."""

import contextlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from jobkit import contract
from jobkit.errors import ConfigError
from jobkit.rundir import commits
from jobkit.rundir.store import Store
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec
from tests.harness import training
from tests.harness.jobs import command_line

NEWER = contract.RUN_VERSION + 1
SAID = rf"run\.json has format {NEWER}, written by jobkit 7\.1\.0; .* upgrade jobkit here to 7\.1\.0 or newer"


def newer(path: Path, **more: object) -> Path:
    """Make a run as a newer jobkit would: of a format, and with a content, that nobody knows yet."""
    path.mkdir(parents=True)
    spec = {"command": "in another form", **more}
    (path / "run.json").write_text(json.dumps({"version": NEWER, "jobkit": "7.1.0", "spec": spec}))
    return path


def jobkit(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    with contextlib.chdir(cwd):
        return command_line(*words)


@pytest.mark.parametrize(
    "verb",
    ["status", "logs", "resume", "cancel", "stop", "save", "report", "explain", "checkpoints"],
)
def test_every_verb_refuses_a_run_of_a_newer_format(verb: str, tmp_path: Path) -> None:
    """Each says which version is needed, ends with 2, and leaves the run as it was."""
    run = newer(tmp_path / "run")
    done = jobkit(verb, "run", cwd=tmp_path)
    assert done.returncode == contract.Exit.USAGE, done.stdout + done.stderr
    assert re.search(SAID, " ".join(done.stderr.split()))
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_a_submit_into_a_run_of_a_newer_format(tmp_path: Path) -> None:
    """A submit to the same place is refused with the same sentence, or as one that holds a run; it changes nothing."""
    run = newer(tmp_path / "run")
    before = (run / "run.json").read_bytes()
    done = jobkit("submit", "--run", "run", "--no-snapshot", "--", "true", cwd=tmp_path)
    assert done.returncode == contract.Exit.USAGE, done.stdout + done.stderr
    assert "upgrade jobkit here" in " ".join(done.stderr.split())
    assert (run / "run.json").read_bytes() == before


def test_a_list_names_it_and_shows_the_others(tmp_path: Path) -> None:
    """A run that this jobkit cannot read hides no other, in `ls` and in `report`."""
    newer(tmp_path / "runs/new")
    assert specs.create(Store(tmp_path / "runs/old"), JobSpec(command=("true",)), "local")
    for verb in ("ls", "report"):
        done = jobkit(verb, "--json", "runs", cwd=tmp_path)
        (told,) = json.loads(done.stdout)
        assert Path(told["run"]).name == "old"
        assert re.search(SAID, " ".join(done.stderr.split()))


def test_the_points_of_a_sweep_of_a_newer_format(tmp_path: Path) -> None:
    """A point that has not started yet is known by its sweep's run.json alone, which is refused."""
    run = newer(tmp_path / "run", sweep="in another form")
    with pytest.raises(ConfigError, match=SAID):
        specs.read(Store(run / "points/0"))


@pytest.mark.slow
def test_a_program_of_an_older_jobkit_leaves_the_run_alone(tmp_path: Path) -> None:
    """It ends with 78 before it claims an attempt, which would end a newer one that is alive."""
    run = newer(tmp_path / "run")
    code, printed = training.attempt(run, steps=2)
    assert code == contract.Exit.CONFIG, printed
    assert "upgrade jobkit here to 7.1.0 or newer" in printed
    assert not (run / contract.ATTEMPTS).exists()


@pytest.mark.slow
def test_a_step_of_a_newer_format_is_not_set_aside(tmp_path: Path) -> None:
    """An attempt that meets one ends with 78: it neither goes back to an older step nor moves anything."""
    run = tmp_path / "run"
    code, printed = training.attempt(run, steps=20)
    assert code == 0, printed
    store = Store(run)
    (newest,) = commits.steps(store)[-1:]
    place = store.file(contract.step_dir(newest)) / contract.COMMIT
    told = json.loads(place.read_bytes()) | {"version": NEWER, "seal": commits._UNSEALED, "files": "elsewhere"}
    place.write_bytes(commits._sealed(json.dumps(told, indent=1).encode()))
    before = commits.steps(store)
    code, printed = training.attempt(run, steps=30)
    assert code == contract.Exit.CONFIG, printed
    assert f"has format {NEWER}, written by a newer jobkit" in printed
    assert commits.steps(store) == before
    assert store.names(contract.SET_ASIDE) == []


@pytest.mark.slow
def test_what_a_newer_jobkit_adds_to_a_ledger_is_passed_over(tmp_path: Path) -> None:
    """Ledgers have no format of their own: an event and a field that nobody knows yet hide none that are known."""
    run = tmp_path / "run"
    code, printed = training.attempt(run, steps=20)
    assert code == 0, printed
    (ledger,) = (run / "attempts/0").glob("events*.jsonl")
    lines = [{"t": 1.0, "event": "unheard_of", "deep": {"a": [1]}}]
    lines += [{**json.loads(line), "unheard_of": "field"} for line in ledger.read_text().splitlines()]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, printed = training.attempt(run, steps=30)
    assert code == 0, printed
    assert commits.steps(Store(run))[-1] == 30
