"""Lines of --setup on their way into a job's script: where they come from, and that they stay nowhere."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from launch.backends.slurm import batch_script
from launch.lifecycle import submission
from launch.spec import jobspec as specs
from tests.harness import jobs
from tests.harness.jobs import Project

LINE = "export TOKEN=secret-word"
PROFILES = """
[profile.default]
on = "slurm"
setup = ["export TOKEN=secret-word"]

[profile.big]
partition = "big"
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project."""
    yield from jobs.project(tmp_path)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a SLURM on PATH whose sbatch keeps what it was given, and refuses it while there is a file `full`."""
    place = tmp_path / "slurm"
    place.mkdir()
    scripts = {
        "sbatch": f'cd {place}; stat -c %a "$1" >mode; cp "$1" script; [ ! -e full ] && echo Submitted batch job 12',
        "squeue": "exit 0",
        "srun": "exit 0",
    }
    for name, script in scripts.items():
        (place / name).write_text(f"#!/bin/sh\n{script}\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return place


def made(project: Project, **fields: tuple[str, ...]) -> Store:
    """Write down a run that has failed on SLURM."""
    store = Store(project.runs / "r")
    store.make(shared=True)
    assert specs.create(store, project.spec("exit:0", name="r", root=str(project.path), **fields), "slurm")
    submission.record(store, "ended", state=State.FAILED, reason="the disk was full")
    return store


def holding(store: Store, text: str) -> list[str]:
    """Name the files of a run that hold a text."""
    files = [path for path in store.path.rglob("*") if path.is_file()]
    return [path.name for path in files if text.encode() in path.read_bytes()]


@pytest.mark.parametrize("full", [False, True])
def test_they_stay_in_no_file(project: Project, slurm: Path, full: bool) -> None:
    """The script is its owner's alone while sbatch reads it, and gone afterwards, accepted or refused."""
    store, spec = made(project), project.spec("exit:0", name="r", setup=(LINE,))
    if full:
        (slurm / "full").touch()
        with pytest.raises(ConfigError, match="SLURM refused the job"):
            batch_script.sbatch(store, spec)
    else:
        assert batch_script.sbatch(store, spec) == "12"
    assert (slurm / "mode").read_text() == "600\n"
    assert LINE in (slurm / "script").read_text()
    assert holding(store, "secret-word") == []
    if not full:
        batch_script.sbatch(store, project.spec("exit:0", name="r"))
        assert "12_submission.sh" in store.names(contract.SLURM)  # what holds nothing of the kind is kept, to look at


@pytest.mark.parametrize("had", [False, True])
def test_a_resume_takes_those_of_default_only_if_the_run_had_them(project: Project, slurm: Path, had: bool) -> None:
    """--profile brings its own lines; those of [profile.default] go on where they are the ones of the submit."""
    store = made(project, setup=(LINE,) if had else ())
    (project.path / "jobkit.toml").write_text(PROFILES)
    done = project.cli("resume", store.url, "--profile", "big")
    assert done.returncode == 0, done.stderr
    script = (slurm / "script").read_text()
    assert "--partition=big" in script
    assert (LINE in script) == had
