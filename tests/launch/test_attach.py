"""`jobkit attach`: a command beside the live attempt."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobkit import contract
from jobkit.rundir.store import Store
from launch.backends import registry
from launch.lifecycle import orphans
from launch.spec import jobspec as specs
from launch.spec.container import Container
from tests.harness import jobs
from tests.harness.jobs import Project, until_over, until_stepping
from tests.harness.login import Login


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project."""
    yield from jobs.project(tmp_path)


def test_beside_a_local_attempt(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command has the attempt's environment and directory, is no part of it, and says nothing of itself."""
    monkeypatch.setenv("TOKEN_OF_THE_RUN", "secret-word")
    store = project.submit("hold", "exit:0")
    monkeypatch.delenv("TOKEN_OF_THE_RUN")
    until_stepping(store)
    script = "echo $TOKEN_OF_THE_RUN; pwd -P; ls; env | grep -c ^JOBKIT_ATTEMPT="
    done = project.cli("attach", store.url, "--", "sh", "-c", script)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["secret-word", str(store.path / "code" / _code(store.path)), "job.py", "0"]
    with project.start("attach", store.url, "--", "sleep", "60") as shell:
        jobs.until(lambda: Path(f"/proc/{shell.pid}/comm").read_text() == "sleep\n", "the command runs")
        assert shell.pid not in orphans.processes_of(store)
        registry.cancel(store.url)
        assert shell.poll() is None
        shell.kill()
    until_over(store)
    assert "nothing of" in project.cli("attach", store.url).stderr


def _code(run: Path) -> str:
    return next(path.name for path in (run / "code").iterdir() if path.is_dir())


def test_what_is_no_run(project: Project) -> None:
    """A directory that is no run is refused in a sentence."""
    done = project.cli("attach", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not a run" in done.stderr


def test_the_shell_of_an_image(project: Project, tmp_path: Path) -> None:
    """In a container it is one that every image has, not the one of the person's machine."""
    store = Store(project.runs / "r")
    store.make(shared=False)
    assert specs.create(store, project.spec("exit:0", container=Container(image="train:1", runtime="docker")), "local")
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\n[ "$1" = ps ] && echo abc || echo "$@"\n')
    docker.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = project.cli("attach", store.url, PATH=path, SHELL="/opt/fancy")
    assert " abc env -u JOBKIT_" in done.stdout, done
    assert done.stdout.endswith(" /bin/sh\n"), done


@pytest.mark.slow
def test_beside_a_job(login: Login) -> None:
    """On SLURM it is a step of the job, beside the attempt, and ends nothing."""
    job = login.submit(pause_s=0.3)
    login.until_step(2)
    words = login.jobkit("attach", "run", "--", "sh", "-c", "echo $SLURM_JOB_ID $PPID")
    assert words.split()[0] == job
    login.until_step((login.status()["step"] or 0) + 2)
    login.jobkit("cancel", "run")
    assert contract.ENV_ATTEMPT not in os.environ
